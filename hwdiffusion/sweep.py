"""Sweeps: one evaluation for every combination of sampler, steps and guidance, as a table and as plots."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from hwdiffusion.arguments import EvaluationArguments, SweepArguments
from hwdiffusion.evaluation import build_judge, check_sampling, device_of, load_pipeline
from hwdiffusion.figures import sweep_plots
from hwdiffusion.models import swap_scheduler
from hwdiffusion.report import write_json
from hwdiffusion.samples import Samples
from hwdiffusion.trainer import current_processes


def sweep(args: SweepArguments, train_classifier: Callable) -> list[dict]:
    """Evaluate a run at every combination; the rows are returned, printed, and written as `sweep.json`, `sweep.md`,
    `sweep.png` and `sweep.svg`. What an interrupted sweep has done is kept.

    Raises:
        InputError: before any sample is drawn, where a combination can't be drawn.
    """
    processes, output_dir = current_processes(), Path(args.output_dir)
    shared = {item.name: getattr(args, item.name) for item in dataclasses.fields(EvaluationArguments)}
    swept = args.swept()
    combinations = [
        EvaluationArguments(**{**shared, **dict(zip(swept, values))})
        for values in itertools.product(*(values or [None] for values in swept.values()))
    ]
    pipe = load_pipeline(combinations[0], device_of(combinations[0]))
    own = pipe.scheduler
    for one in combinations:
        _choose(pipe, own, one)
        check_sampling(pipe, one)
    judge = build_judge(combinations[0], pipe, list(pipe.id2label.values()), args.num_samples, train_classifier)
    output_dir.mkdir(parents=True, exist_ok=True)

    path = output_dir / "sweep.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    extractor, rows = judge.extractor.describe(), []
    for place, one in enumerate(combinations):
        _choose(pipe, own, one)
        samples = Samples(output_dir, pipe, one)
        same = {"n": len(samples), "sampling": samples.settings, "extractor": extractor}
        same["reference"] = judge.reference()
        row = next((row for row in done if {key: row[key] for key in same} == same), None)
        if row is None:
            if processes.is_main_process:
                print(f"{place + 1}/{len(combinations)}: {samples.describe()}")
            samples.draw(pipe, processes)
            processes.wait_for_everyone()
            if processes.is_main_process:
                row = {**judge(samples, of=Path(args.run).name)[0], "images_per_second": samples.images_per_second()}
                done.append(row)
                write_json(path, done)
                samples.keep("none", output_dir)
            processes.wait_for_everyone()
        rows.append(row)
    if processes.is_main_process:
        table = as_table(rows)
        (output_dir / "sweep.md").write_text(table + "\n", encoding="utf-8")
        sweep_plots(rows, output_dir / "sweep")
        print(table)
    return rows


def _choose(pipe, own, args: EvaluationArguments):
    pipe.scheduler = own
    if args.scheduler is not None:
        swap_scheduler(pipe, args.scheduler)


def as_table(rows: list[dict]) -> str:
    """A line a combination, in Markdown."""
    columns: dict[str, Callable[[dict], str]] = {
        "scheduler": lambda row: row["sampling"]["scheduler"].removesuffix("Scheduler"),
        "steps": lambda row: str(row["sampling"]["num_inference_steps"]),
        "guidance": lambda row: f"{row['sampling']['guidance_scale']:g}",
    }
    first = rows[0]
    if "labels" in first:
        columns["label accuracy (95 %)"] = lambda row: "{:.4f} ({:.3f}–{:.3f})".format(
            row["labels"]["accuracy"], *row["labels"]["accuracy_95"]
        )
        columns["worst class"] = lambda row: f"{row['labels']['worst_class']:.3f}"
    if "distances" in first:
        columns["Fréchet distance"] = lambda row: f"{row['distances']['frechet_distance']:.3f}"
    if "manifold" in first:
        columns["precision"] = lambda row: f"{row['manifold']['precision']:.3f}"
        columns["recall"] = lambda row: f"{row['manifold']['recall']:.3f}"
        columns["coverage"] = lambda row: f"{row['manifold']['coverage']:.3f}"
    if "memorisation" in first:
        columns["nearest training ratio"] = lambda row: f"{row['memorisation']['features']['ratio']:.3f}"
    columns["images/s"] = lambda row: f"{row['images_per_second']:.1f}"
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[column(row) for column in columns.values()] for row in rows]
    reference, floor = first["reference"], first["floor"]
    about = (
        f"{first['n']} samples a line, against {reference['n']} pictures of {reference['name']} "
        f"({reference['split']}), by the extractor {first['extractor']['extractor']} {first['extractor']['model']}"
    )
    if "distances" in first:
        about += (
            f"; the Fréchet distance of {floor['n']} real pictures is {floor['distances']['frechet_distance']:.3f}"
        )
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])
