"""Runs side by side: one table of what was measured of each, one picture of the same labels. Any pipelines of ours.

What is compared must be alike: the same labels, pictures of one size, and evaluations of as many samples, against the
same real pictures, by the same extractor.
"""

import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hwdiffusion import InputError, figures
from hwdiffusion.arguments import CompareArguments, EvaluationArguments
from hwdiffusion.checkpoints import STATE_FILE, find_checkpoints, flaw_of
from hwdiffusion.config import output_folder
from hwdiffusion.evaluation import check_sampling, choose_scheduler, evaluate, load_to_draw, start
from hwdiffusion.figures import read_metrics
from hwdiffusion.judge import Judge, build_judge
from hwdiffusion.label_sets import names_of, number_of_samples, read_label_sets, sets_to_draw
from hwdiffusion.reference import load_real_side, run_settings
from hwdiffusion.report import comparison_table, write_json
from hwdiffusion.run_folder import current_processes, make_folder
from hwdiffusion.samples import (
    draw,
    image_mode_of,
    networks,
    sampling_options,
    scheduler_digest,
    scheduler_name,
    sets_digest,
)
from hwdiffusion.sources import few
from hwdiffusion.training_log import METRICS_FILE


ROWS = 10  # labels in the picture
TIMED = 100  # pictures by which the speed of sampling is measured, again and again

# What says by whom, and against what, runs are judged; where it is given, saved evaluations must fit it.
_OF_THE_JUDGE = {"classifier", "extractor", "extractor_weights", "reference", "train_data_dir", "metrics",
                 "num_samples", "num_seeds", "seed", "skip_bad_images"}  # fmt: skip
_ALIKE = ("n", "metrics", "extractor", "reference")  # of two reports that compare


def compare(args: CompareArguments, train_classifier: Callable) -> list[dict]:
    """Compare runs; a row for each is returned, printed as a table and written: `compare.json`, `compare.md` and
    `compare.png`. Evaluations that were saved in the runs are taken, where they compare; the others are made, and
    saved there, or, of a run that has one, beside the table.

    Args:
        train_classifier: `train` of train_classifier.py, for an extractor that isn't given.

    Raises:
        InputError: before any sample is drawn, where runs don't compare.
    """
    device, output_dir = start(args), Path(args.output_dir)
    if current_processes().num_processes > 1:
        raise InputError("compare is for one process; evaluate the runs on several, and compare what they have saved")
    loaded = {run: load_to_draw(run, args, device) for run in args.runs}
    pipes = {run: pipe for run, (pipe, _) in loaded.items()}
    check_alike(pipes)
    arguments = {run: arguments_of(args, run) for run in args.runs}
    for run, pipe in pipes.items():
        choose_scheduler(pipe, args.scheduler)
        check_sampling(pipe, arguments[run])
    reports = {run: saved_report(pipe, digest, arguments[run]) for run, (pipe, digest) in loaded.items()}
    judge = judge_for(reports, pipes, arguments, args, train_classifier, device)
    if judge is not None:
        reports = {run: report or evaluate(arguments[run], train_classifier, judge) for run, report in reports.items()}
    make_folder(output_dir)

    sets = _sets_to_show(next(iter(pipes.values())), next(iter(arguments.values())), judge)
    names, speeds = names_apart(args.runs), sampling_speeds(pipes, arguments, sets)
    rows = [
        {
            **reports[run],
            "run": names[run],
            "parameters": sum(parameter.numel() for part in networks(pipe) for parameter in part.parameters()),
            "training": training_of(run),
            "speed": speeds[run],
        }
        for run, pipe in pipes.items()
    ]
    write_json(output_dir / "compare.json", rows)
    table = comparison_table(rows, device.type)
    (output_dir / "compare.md").write_text(table + "\n", encoding="utf-8")
    side_by_side(pipes, arguments, sets, args.columns).save(output_dir / "compare.png")
    print(table)
    return rows


def arguments_of(args: CompareArguments, run: str) -> EvaluationArguments:
    """By what one of the runs is evaluated, and where its evaluation is kept."""
    shared = {item.name: getattr(args, item.name) for item in dataclasses.fields(EvaluationArguments)}
    one = EvaluationArguments(**{**shared, "run": run})
    own = output_folder("evaluate", one)
    if any((place / "evaluation.json").is_file() for place in (own, Path(run))):  # which stays as it is
        own = Path(args.output_dir) / ("evaluation-of-" + re.sub(r"[^\w.-]+", "-", run).strip("-.")) / own.name
    return dataclasses.replace(one, output_dir=str(own))


def names_apart(runs: list[str]) -> dict[str, str]:
    """The last part of each run's path, and of the parts before it as many as tell the runs apart."""
    parts = {run: Path(os.path.abspath(run) if Path(run).exists() else run).parts for run in runs}
    names: dict[str, str] = {}
    for depth in range(1, 1 + max(map(len, parts.values()))):
        names = {run: "/".join(those[-depth:]).replace("//", "/") for run, those in parts.items()}
        if len({*names.values()}) == len(runs):
            break
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What compares
# ---------------------------------------------------------------------------------------------------------------------


def check_alike(pipes: dict):
    """Raise InputError where pipelines, by their runs, draw other labels than the first, or another shape."""
    (first, one), *others = pipes.items()
    for run, pipe in others:
        ours, theirs = list(one.id2label.values()), list(pipe.id2label.values())
        if sorted(ours) != sorted(theirs):
            raise InputError(
                f"{run} knows the labels {few(theirs) or 'none'}, but {first} {few(ours) or 'none'}; compare runs of "
                "the same labels"
            )
        if ours != theirs:
            raise InputError(f"{run} has the labels of {first} in another order; train both on the same folder")
        ours, theirs = ((side.image_channels, *side.image_size) for side in (one, pipe))
        if ours != theirs:
            raise InputError(
                f"{run} draws pictures of (channels, height, width) {theirs}, but {first} of {ours}; compare runs of "
                "the same pictures"
            )
        if one.config.max_labels != pipe.config.max_labels:
            raise InputError(
                f"{run} takes up to {pipe.config.max_labels} labels a picture, but {first} up to "
                f"{one.config.max_labels}; compare runs of the same pictures"
            )


def saved_report(pipe, digest: str, args: EvaluationArguments) -> dict | None:
    """The evaluation in a run's folder, if it is of these very weights, drawn as the arguments ask."""
    places = [Path(args.output_dir), output_folder("evaluate", args)]
    places += [Path(args.run)] if args.label_sets is None else []
    paths = [place / "evaluation.json" for place in places if (place / "evaluation.json").is_file()]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    asked = {
        "scheduler": scheduler_name(pipe),
        "scheduler_sha256": scheduler_digest(pipe),
        "guidance_interval": None,
        "truncation": None,
        "guide": None,
        **sampling_options(pipe, args),
        "torch_dtype": None if args.torch_dtype == "float32" else args.torch_dtype,
        "weights_sha256": digest,
    }
    file = None if args.label_sets is None else Path(args.label_sets).name
    digest_of_sets = None if file is None else sets_digest(read_label_sets(args.label_sets, pipe))

    def fits(sampling: dict) -> bool:
        sets = sampling.get("label_sets", {})  # without a file those of the held-out pictures
        same_sets = sets.get("file") == file and digest_of_sets in (None, sets.get("sha256"))
        same_sets &= ("label_frequencies" in sampling) == (args.label_frequencies != "equal")
        return same_sets and all(sampling.get(key) == value for key, value in asked.items())

    return next((report for report in reports if fits(report.get("sampling") or {})), None)


def judge_for(
    reports: dict[str, dict | None], pipes: dict, arguments: dict, args: CompareArguments, train_classifier, device
) -> Judge | None:
    """Who evaluates the runs whose saved report is missing or doesn't compare, which `reports` then loses; `None`
    where all compare.

    Raises:
        InputError: it can't be told by whom; the runs were trained on different pictures.
    """
    saved = {run: report for run, report in reports.items() if report is not None}
    free = not _OF_THE_JUDGE & {*args.given}
    if len(saved) == len(reports) and free:
        (first, one), *others = saved.items()
        different = [(run, key) for run, report in others for key in _ALIKE if report[key] != one[key]]
        different += [(run, "seed") for run, report in others if report["sampling"]["seed"] != one["sampling"]["seed"]]
        if different:
            run, key = different[0]
            raise InputError(
                f"the saved evaluations of {first} and {run} differ in {key}; say by --classifier and --num_samples "
                "how both are to be judged"
            )
        return None
    if saved and free:
        missing = next(run for run in reports if run not in saved)
        raise InputError(
            f"{missing} has no saved evaluation of its present weights and settings, as {next(iter(saved))} has; say "
            "by --classifier how it is to be judged"
        )
    if saved and not {"num_samples", "num_seeds"} & {*args.given} and args.label_sets is None:
        for one in arguments.values():
            one.num_samples = next(iter(saved.values()))["n"]

    first = args.runs[0]
    one, pipe = arguments[first], pipes[first]
    sets = None if one.label_sets is None else read_label_sets(one.label_sets, pipe)
    count = number_of_samples(one, sets)
    judge = build_judge(one, pipe, list(pipe.id2label.values()), count, train_classifier, device)
    asked = {"n": count, "metrics": sorted(judge.wanted), "extractor": judge.extractor.describe()}
    asked["reference"] = judge.reference()
    for run, report in saved.items():
        if {key: report[key] for key in _ALIKE} != asked or report["sampling"]["seed"] != one.seed:
            reports[run] = None
    for run in args.runs[1:]:
        if reports[run] is None:
            real = load_real_side(arguments[run], pipes[run].image_size, image_mode_of(pipes[run]))
            if real.fingerprint() != judge.real.fingerprint():
                raise InputError(
                    f"{run} was trained on other pictures than {first}, or holds out others; compare runs of the same "
                    "pictures"
                )
    return judge


# ---------------------------------------------------------------------------------------------------------------------
# What is known of a run besides its evaluation
# ---------------------------------------------------------------------------------------------------------------------


def training_of(run: str) -> dict:
    """What a run's training took, with that of its first stage: `seconds`, `images` seen and the most memory,
    `peak_memory_gb`; empty where its checkpoints are not there. `given` says what it was given
    that was trained before, which isn't counted: an autoencoder, a teacher."""
    folder = Path(run)
    whole = folder.parent if (folder / STATE_FILE).is_file() else folder  # `folder` may be a checkpoint
    stages = [stage for stage in (folder, whole / "first-stage") if stage.is_dir()]
    known: dict = {}
    for stage in stages:
        state = _newest_state(stage)
        if state is None or "seconds" not in state:  # earlier versions kept none
            return {}
        known["seconds"] = known.get("seconds", 0.0) + state["seconds"]
        known["images"] = known.get("images", 0) + state["step"] * state["step_size"]
        peaks = [line["peak_memory_gb"] for line in read_metrics(stage / METRICS_FILE) if "peak_memory_gb" in line]
        if peaks:
            known["peak_memory_gb"] = max(known.get("peak_memory_gb", 0.0), *peaks)
    settings = run_settings(run)
    given = [what for what, flag in (("autoencoder", "vqvae"), ("teacher", "teacher")) if settings.get(flag)]
    if known and given:
        known["given"] = given
    return known


def _newest_state(folder: Path) -> dict | None:
    candidates = [folder] if (folder / STATE_FILE).is_file() else find_checkpoints(folder)
    whole = next((path for path in candidates if flaw_of(path) is None), None)
    if whole is None:
        return None
    return torch.load(whole / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)


def sampling_speeds(pipes: dict, arguments: dict, sets: torch.Tensor | None) -> dict[str, dict]:
    """Of each run the pictures a second, drawn `n` at once: the median of several `rounds`, with the `slowest` and the
    `fastest`, and on a GPU the memory that it takes beside other models' weights. The runs draw in turn, so that a
    machine that gets busier slows all of them, each until a second has passed or more."""
    for run, pipe in pipes.items():
        _timed_draw(pipe, arguments[run], sets)  # what is done once, at first, doesn't count
    timed: dict[str, list[dict]] = {run: [] for run in pipes}
    while waiting := [run for run, rounds in timed.items() if not _suffice([one["seconds"] for one in rounds])]:
        for run in waiting:
            timed[run].append(_timed_draw(pipes[run], arguments[run], sets))
    measured = {}
    for run, rounds in timed.items():
        count = rounds[0]["n"]
        speeds = [count / one["seconds"] for one in rounds]
        measured[run] = {
            "n": count,
            "images_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "rounds": len(rounds),
            "device": pipes[run].device.type,
        }
        if "memory_gb" in rounds[0]:
            measured[run]["memory_gb"] = max(one["memory_gb"] for one in rounds)
    return measured


def _suffice(seconds: list[float]) -> bool:
    return sum(seconds) >= 10 or (sum(seconds) >= 1 and len(seconds) >= 3)


def _timed_draw(pipe, args: EvaluationArguments, sets: torch.Tensor | None) -> dict:
    device, count = pipe.device, min(TIMED, args.batch_size)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    draw(
        pipe, 0, count, args.seed, sets, **sampling_options(pipe, args)
    )  # on the CPU at its end: nothing is under way
    measured: dict = {"n": count, "seconds": time.perf_counter() - began}
    if on_gpu:
        weights = sum(tensor.nbytes for part in networks(pipe) for tensor in part.state_dict().values())
        measured["memory_gb"] = (torch.cuda.max_memory_allocated(device) - before + weights) / 2**30
    return measured


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def _sets_to_show(pipe, args: EvaluationArguments, judge: Judge | None) -> torch.Tensor | None:
    """The sets of labels `(S, T)` that are timed and shown: those of `--label_sets`, else of single labels each
    in turn, and of sets those of the held-out pictures."""
    if args.label_sets is not None:
        return read_label_sets(args.label_sets, pipe)
    held_out = None
    if pipe.config.max_labels > 1 and pipe.id2label:
        real = judge.real if judge is not None else load_real_side(args, pipe.image_size, image_mode_of(pipe))
        held_out = real.held_out
    return sets_to_draw(pipe, held_out)


def side_by_side(pipes: dict, arguments: dict, sets: torch.Tensor | None, columns: int):
    """A row a label (or set of them), and in it some pictures of each run, which are drawn by the same seeds."""
    rows = ROWS if sets is None else min(ROWS, len(sets))
    names = None if sets is None else [", ".join(names_of(ids, next(iter(pipes.values())).id2label)) for ids in sets]
    count, apart = rows * columns, names_apart([*pipes])
    repeated = None if sets is None else sets[:rows].repeat_interleave(columns, dim=0)  # (rows · columns, T)
    grids, titles = [], []
    for place, (run, pipe) in enumerate(pipes.items()):
        args, options = arguments[run], sampling_options(pipe, arguments[run])
        starts = range(0, count, args.batch_size)
        parts = [draw(pipe, at, min(at + args.batch_size, count), args.seed, repeated, **options) for at in starts]
        pictures = figures.to_pil(torch.cat(parts).float() / 127.5 - 1)
        grids.append(figures.image_grid(pictures, columns, names[:rows] if names and place == 0 else None))
        titles.append(apart[run])
    return figures.beside_each_other(grids, titles)
