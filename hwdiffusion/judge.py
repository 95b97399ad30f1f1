"""Who judges: the real side, an extractor, and the metrics that fit both."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object

from hwdiffusion import InputError, __version__
from hwdiffusion.arguments import METRICS, EvaluationArguments
from hwdiffusion.comparison import Features, Pictures, accuracy_of_repetitions, extract, measure
from hwdiffusion.config import Config, parse
from hwdiffusion.data import Data
from hwdiffusion.extractors import load_extractor
from hwdiffusion.label_sets import labels_in_turn, sets_to_draw
from hwdiffusion.metrics import MANIFOLD_PICTURES
from hwdiffusion.reference import RealSide, load_real_side
from hwdiffusion.run_folder import current_processes
from hwdiffusion.samples import CHUNK, Samples, draw, image_mode_of
from hwdiffusion.sources import describe, few


class Judge:
    """The real side, and the extractor by which pictures are held against it; real features are extracted once."""

    def __init__(self, real: RealSide, extractor, wanted: set[str], seed: int):
        self.real, self.extractor, self.wanted, self.seed = real, extractor, wanted, seed

    def __call__(self, pictures, of: str) -> tuple[dict, Features]:
        """The report of samples or of a data set, and their features; `of` is their name."""
        ours = extract(self.extractor, pictures, "pictures to judge")
        needed = self.real.training is not None and not self.wanted <= {"labels"}
        training = self.training if needed else None
        report = {
            "version": __version__,
            "of": of,
            "n": len(pictures),
            "metrics": sorted(self.wanted),
            "sampling": pictures.settings if isinstance(pictures, Samples) else None,
            "extractor": self.extractor.describe(),
            "reference": self.reference(),
            **measure(ours, self.held_out, training, self.wanted, self.extractor.class_names, self.seed),
        }
        repetitions = pictures.repetitions if isinstance(pictures, Samples) else None
        if repetitions is not None and "labels" in report:
            report["labels"]["over_seeds"] = accuracy_of_repetitions(ours, repetitions)
        return report, ours

    def reference(self) -> dict:
        """What pictures are compared with, for the report."""
        real = self.real
        return {"name": real.name, "split": real.split, "n": len(real.held_out), "fingerprint": real.fingerprint()}

    @cached_property
    def held_out(self) -> Features:
        return extract(self.extractor, self.real.held_out, "held-out pictures")

    @cached_property
    def training(self) -> Features:
        return extract(self.extractor, self.real.training, "training pictures")


def build_judge(
    args: EvaluationArguments, pipe, class_names: list[str], count: int, train_classifier: Callable, device
) -> Judge:
    """The judge that the arguments ask for; a classifier that isn't given is trained, once, and kept.

    Args:
        pipe: whose samples are judged; `None` for pictures.
        class_names: of what is judged; empty without labels.
        count: how many pictures there will be.

    Raises:
        InputError: the sides, the extractor and the metrics that were asked for don't fit together.
    """
    size, mode = args.resolution, args.image_mode
    if pipe is not None:
        size, mode = list(pipe.image_size), image_mode_of(pipe)
    real = load_real_side(args, size, mode)
    wanted = check_metrics(args, class_names, real)
    source = args.extractor_weights
    if args.extractor == "classifier":
        source = args.classifier
        if source is None and real.training is None:
            raise InputError(
                "a classifier must be trained on other pictures than it compares, but there are none beside "
                f"{args.reference or 'the held-out ones of a stream'}; give --classifier FOLDER"
            )
        if source is None and real.held_out.class_names != real.training.class_names:
            raise InputError(
                f"a classifier can't be trained on classes ({few(real.training.class_names) or 'none'}) and tested on "
                f"others ({few(real.held_out.class_names) or 'none'}); give --classifier FOLDER"
            )
        if source is None:
            data = Data(real.training, real.held_out, 0)
            config = classifier_config(data, real.name, _beside(args) / f"classifier-{real.fingerprint()}")
            names = real.training.class_names if len(real.training.class_names) > 1 else None
            dimension = config.sections["classifier"]["hidden_sizes"][-1]
            check_extractor(args, "the classifier to be trained", names, dimension, class_names, count, real, wanted)
            source = trained(config, data, train_classifier)
    extractor = load_extractor(args.extractor, None if source is None else str(source), device)
    what = f"--classifier {source}" if args.extractor == "classifier" else f"--extractor {args.extractor}"
    names, dimension = extractor.class_names, extractor.dimension
    check_extractor(args, what, names, dimension, class_names, count, real, wanted)
    return Judge(real, extractor, wanted, args.seed)


def _beside(args: EvaluationArguments) -> Path:
    """Where a classifier is kept, so that evaluations and sweeps of a run share it."""
    return Path(args.run) if args.run is not None and Path(args.run).is_dir() else Path(args.output_dir)


class TrainingJudge:
    """Judges a pipeline while it is trained, on the held-out pictures: always the same labels and seeds.

    Args:
        args: the [`JudgedArguments`] of the run.
        class_names: of the labels that the model takes; empty if it takes none.

    Raises:
        InputError: the classifier doesn't fit the pictures or their number.
    """

    def __init__(self, args, data: Data, class_names: list[str]):
        extractor = load_extractor(
            "classifier", args.evaluation_classifier, current_processes().device, "--evaluation_classifier"
        )
        wanted = {"distances"}
        if class_names and extractor.class_names is not None:
            wanted.add("labels")
        elif args.best_metric == "label_accuracy":
            raise InputError("--best_metric label_accuracy needs a model and a classifier that know labels")
        real = RealSide(data.validation, None, describe(args), "held-out", trained_on=False)
        what, count = f"--evaluation_classifier {args.evaluation_classifier}", args.evaluation_samples
        names, dimension = extractor.class_names, extractor.dimension
        check_extractor(EvaluationArguments(), what, names, dimension, class_names, count, real, wanted)
        self.judge, self.count, self.seed = Judge(real, extractor, wanted, args.seed), count, args.seed
        sha = extractor.describe()["weights_sha256"]
        self.by_labels = args.best_metric == "label_accuracy"
        self.identity = {"n": count, "classifier_sha256": sha, "best_metric": args.best_metric}

    def rank(self, measured: dict[str, float]) -> float:
        """The higher, the better is what was measured."""
        return measured["eval_label_accuracy"] if self.by_labels else -measured["eval_frechet_distance"]

    def __call__(self, pipe) -> dict[str, float]:
        """All processes must call it; each draws its share, and all have the figures."""
        pipe.set_progress_bar_config(disable=True)
        names = list(pipe.id2label.values())
        rank, world_size = current_processes().process_index, current_processes().num_processes
        share = -(-self.count // world_size)
        begin, end = min(rank * share, self.count), min((rank + 1) * share, self.count)
        sets = sets_to_draw(pipe, self.judge.real.held_out)
        drawn = [
            draw(pipe, first, min(first + CHUNK, end), self.seed, sets=sets) for first in range(begin, end, CHUNK)
        ]
        images = torch.cat(gather_object(drawn) if world_size > 1 else drawn)
        report, _ = self.judge(Pictures(images, labels_in_turn(sets, 0, self.count), names), of="run")
        measured = {"eval_frechet_distance": report["distances"]["frechet_distance"]}
        if "labels" in report:
            measured["eval_label_accuracy"] = report["labels"]["accuracy"]
        return measured


def training_judge(args, data: Data, labelled: bool) -> TrainingJudge | None:
    """The judge that `--evaluation_steps` asks for, if it does; of a model that takes the labels, or takes none."""
    if args.evaluation_steps is None:
        return None
    return TrainingJudge(args, data, list(data.id2label.values()) if labelled else [])


# ---------------------------------------------------------------------------------------------------------------------
# Checks, before anything is drawn
# ---------------------------------------------------------------------------------------------------------------------


def check_metrics(args: EvaluationArguments, class_names: list[str], real: RealSide) -> set[str]:
    """The metrics to take: those that were asked for, or all that can be had.

    Raises:
        InputError: one was asked for that can't be had.
    """
    usual = ("labels", "distances", "manifold", "memorisation")
    if args.label_sets is not None:  # whose pictures aren't distributed as the real ones
        usual = ("labels",)
    wanted = set(args.metrics if args.metrics is not None else usual)

    def leave_out(metrics: set[str], why: str):
        if args.metrics is not None and wanted & metrics:
            raise InputError(f"{why}, so the metric {sorted(wanted & metrics)[0]} can't be taken; leave it out")
        wanted.difference_update(metrics)

    if not class_names:
        leave_out({"labels", "cas"}, f"{args.run or args.images} has no labels")
    if not real.trained_on:
        leave_out({"memorisation"}, "the pictures that were trained on aren't known")
    if real.training is None:
        leave_out({"cas"}, f"there are no real pictures beside {args.reference or 'the held-out ones of a stream'}")
    elif "cas" in wanted:
        names = real.training.class_names
        if set(names) != set(class_names) or names != real.held_out.class_names or len(names) < 2:
            leave_out({"cas"}, f"{real.name} has other classes ({few(real.held_out.class_names) or 'none'})")
    return wanted


def check_extractor(
    args: EvaluationArguments,
    what: str,
    names: list[str] | None,
    dimension: int,
    class_names: list[str],
    count: int,
    real: RealSide,
    wanted: set[str],
):
    """Raise InputError where an extractor doesn't fit the pictures or their number; `wanted` loses what it can't give.

    Args:
        what: what the extractor is called.
        names: of the classes that it tells apart; `None` if it tells none apart.
        dimension: of its features.
        class_names, count: of what is judged.
    """
    if names is None:
        if args.metrics is not None and "labels" in wanted:
            raise InputError(f"{what} knows no labels, so the metric labels can't be taken; leave it out")
        wanted.discard("labels")
    if "labels" in wanted:
        unknown = [name for name in (*class_names, *real.held_out.class_names) if name not in names]
        if unknown:
            raise InputError(
                f"{what} tells apart {few(names)}, but there are pictures of {unknown[0]!r}; use one that was trained "
                "on these classes, or leave the metric labels out"
            )
    if not wanted:
        raise InputError("none of the metrics can be taken of these pictures")
    sides = ((count, "pictures to judge"), (len(real.held_out), "held-out pictures"))
    for number, side in sides:
        if "distances" in wanted and number <= dimension:
            others = [name for name in METRICS if name in wanted - {"distances"}]
            raise InputError(
                f"a Fréchet distance of {dimension} features needs at least {dimension + 1} {side}, but there are "
                f"{number}; give more, or leave the metric distances out: --metrics {' '.join(others)}"
            )
        if "manifold" in (args.metrics or []) and number < MANIFOLD_PICTURES:  # else it is left out of the report
            raise InputError(
                f"precision, recall, density and coverage need at least {MANIFOLD_PICTURES} {side}, but there are "
                f"{number}; give more, or leave the metric manifold out"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers
# ---------------------------------------------------------------------------------------------------------------------


def classifier_config(data: Data, name: str, output_dir: Path) -> Config:
    """How a classifier for an evaluation is trained: some 360,000 pictures, at most 40 epochs."""
    count, images = len(data.train), data.train[[0]][0]
    epochs = max(1, min(40, round(360_000 / count)))
    batch_size = max(8, min(128, count // 16) // current_processes().num_processes)
    argv = ["--preset", "mnist-classifier", "--dataset_name", name, "--output_dir", str(output_dir), "--resolution"]
    argv += [*map(str, images.shape[-2:]), "--image_mode", "L" if images.shape[1] == 1 else "RGB"]
    argv += ["--num_train_epochs", str(epochs), "--train_batch_size", str(batch_size)]
    return dataclasses.replace(parse("train_classifier", argv), command=[])  # it is one that nobody has typed


def trained(config: Config, data: Data, train_classifier: Callable) -> Path:
    """The folder of a classifier, trained if it isn't there; all processes train."""
    folder = Path(config.args.output_dir)
    finished = (folder / "config.json").is_file() and (folder / "README.md").is_file()  # the card comes last
    current_processes().wait_for_everyone()  # all have looked
    return folder if finished else train_classifier(config, data)
