"""Sweeps: one evaluation for every combination of sampler, steps and guidance, as a table and as plots."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from hwdiffusion.arguments import EvaluationArguments, SweepArguments
from hwdiffusion.evaluation import check_sampling, choose_scheduler, load_to_draw, start
from hwdiffusion.figures import sweep_plots
from hwdiffusion.judge import build_judge
from hwdiffusion.label_sets import number_of_samples, read_label_sets, sets_to_draw
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.report import sweep_table, write_json
from hwdiffusion.run_folder import current_processes, make_folder
from hwdiffusion.samples import Samples, draw


def sweep(args: SweepArguments, train_classifier: Callable) -> list[dict]:
    """Evaluate a run at every combination; the rows are returned, printed, and written as `sweep.json`, `sweep.md`,
    `sweep.png` and `sweep.svg`. What an interrupted sweep has done is kept.

    Raises:
        InputError: before any sample is drawn, where a combination can't be drawn.
    """
    device = start(args)
    processes, output_dir = current_processes(), Path(args.output_dir)
    shared = {item.name: getattr(args, item.name) for item in dataclasses.fields(EvaluationArguments)}
    swept = args.swept()
    combinations = [
        EvaluationArguments(**{**shared, **dict(zip(swept, values))})
        for values in itertools.product(*(dict.fromkeys(values or [None]) for values in swept.values()))
    ]
    pipe, digest = load_to_draw(args.run, args, device, (ClassConditionalPipeline,))
    own = pipe.scheduler
    for one in combinations:
        pipe.scheduler = own
        choose_scheduler(pipe, one.scheduler)
        check_sampling(pipe, one)
    sets = None if args.label_sets is None else read_label_sets(args.label_sets, pipe)
    count = number_of_samples(args, sets)
    judge = build_judge(combinations[0], pipe, list(pipe.id2label.values()), count, train_classifier, device)
    sets = sets_to_draw(pipe, judge.real.held_out, args.label_frequencies) if sets is None else sets
    make_folder(output_dir)

    path = output_dir / "sweep.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    processes.wait_for_everyone()  # all have read it before one of them writes
    common = {"n": count, "metrics": sorted(judge.wanted), "extractor": judge.extractor.describe()}
    common["reference"] = judge.reference()
    rows: list[dict] = []
    for place, one in enumerate(combinations):
        pipe.scheduler = own
        choose_scheduler(pipe, one.scheduler)
        samples = Samples(output_dir, pipe, one, sets, digest)
        same = {**common, "sampling": samples.settings}
        row = next((row for row in done if {key: row.get(key) for key in same} == same), None)
        if row is None:
            if processes.is_main_process:
                print(f"{place + 1}/{len(combinations)}: {samples.describe()}")
            # what is compiled first isn't timed
            draw(pipe, 0, min(len(samples), args.batch_size), args.seed, sets, num_inference_steps=2)
            samples.draw(pipe, processes)
            processes.wait_for_everyone()
            if processes.is_main_process:
                row = {**judge(samples, of=Path(args.run).name)[0], "images_per_second": samples.images_per_second()}
                done.append(row)
                write_json(path, done)
                samples.keep("none", output_dir)
            processes.wait_for_everyone()
        if row is not None and row not in rows:  # the pipeline's own setting may also have been named
            rows.append(row)
    if processes.is_main_process:
        table = sweep_table(rows)
        (output_dir / "sweep.md").write_text(table + "\n", encoding="utf-8")
        sweep_plots(rows, output_dir / "sweep")
        print(table)
    return rows
