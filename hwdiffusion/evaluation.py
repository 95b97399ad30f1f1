"""The driver of evaluations: draw samples, extract features, measure, report."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml

from hwdiffusion import InputError, __version__, hub
from hwdiffusion.arguments import SCRIPTS, DataArguments, EvaluationArguments
from hwdiffusion.comparison import Features, Pictures, batches_of, extract, measure, nearest_pairs
from hwdiffusion.config import parse
from hwdiffusion.data import Data, ImageDataset, has_splits, load_data, load_images
from hwdiffusion.extractors import load_extractor
from hwdiffusion.models import swap_scheduler
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.report import as_table, write_json
from hwdiffusion.samples import CHUNK, Samples, draw, labels_of, sampling_defaults, save_npz
from hwdiffusion.sources import describe, few
from hwdiffusion.trainer import current_processes


def evaluate(args: EvaluationArguments, train_classifier: Callable) -> dict:
    """Measure a run, or pictures; the report is returned, printed and written as `evaluation.json`.

    Args:
        train_classifier: `train` of train_classifier.py, for an extractor that isn't given, and for CAS.

    Raises:
        InputError: before any sample is drawn, where the sides don't fit together.
    """
    processes, output_dir = current_processes(), Path(args.output_dir)
    pipe = None if args.run is None else load_pipeline(args, device_of(args))
    pictures = None
    if pipe is None:
        size, mode = args.resolution, args.image_mode
        pictures = load_images(data_arguments(args.images, size, mode, skip_bad_images=args.skip_bad_images))
        class_names, count = pictures.class_names, len(pictures)
    else:
        check_sampling(pipe, args)
        class_names, count = list(pipe.id2label.values()), args.num_samples
    judge = build_judge(args, pipe, class_names, count, train_classifier)
    output_dir.mkdir(parents=True, exist_ok=True)
    if pipe is not None:
        pictures = Samples(output_dir, pipe, args)
        pictures.draw(pipe, processes)
    cas = None
    if "cas" in judge.wanted:
        cas = classification_accuracy_score(pictures, judge.real, args.seed, train_classifier, output_dir)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return {}

    report, ours = judge(pictures, of=Path(args.run or args.images).name)
    if cas is not None:
        report["cas"] = cas
    if "memorisation" in report:
        nearest_pairs(ours, judge.training, pictures, judge.real.training).save(output_dir / "nearest.png")
    write_json(output_dir / "evaluation.json", report)
    if pipe is not None:
        pictures.keep(args.save_images, output_dir)
        if Path(args.run).is_dir():
            hub.add_to_card(Path(args.run), "Evaluation", as_table(report, markdown=True))
    print(as_table(report))
    return report


class Judge:
    """The real side, and the extractor by which pictures are held against it; real features are extracted once."""

    def __init__(self, real: "RealSide", extractor, wanted: set[str], seed: int):
        self.real, self.extractor, self.wanted, self.seed = real, extractor, wanted, seed

    def __call__(self, pictures, of: str) -> tuple[dict, Features]:
        """The report of samples or of a data set, and their features; `of` is their name."""
        ours = extract(self.extractor, pictures, "pictures to judge")
        training = self.training if self.real.training is not None else None
        report = {
            "version": __version__,
            "of": of,
            "n": len(pictures),
            "sampling": pictures.settings if isinstance(pictures, Samples) else None,
            "extractor": self.extractor.describe(),
            "reference": self.reference(),
            **measure(ours, self.held_out, training, self.wanted, self.extractor.class_names, self.seed),
        }
        return report, ours

    def reference(self) -> dict:
        return {"name": self.real.name, "split": self.real.split, "n": len(self.real.held_out)}

    @cached_property
    def held_out(self) -> Features:
        return extract(self.extractor, self.real.held_out, "held-out pictures")

    @cached_property
    def training(self) -> Features:
        return extract(self.extractor, self.real.training, "training pictures")


def build_judge(args: EvaluationArguments, pipe, class_names: list[str], count: int, train_classifier) -> Judge:
    """The judge that the arguments ask for; a classifier that isn't given is trained, once, beside the evaluation.

    Args:
        pipe: whose samples are judged; `None` for pictures.
        class_names: of what is judged; empty without labels.
        count: how many pictures there will be.

    Raises:
        InputError: the sides, the extractor and the metrics that were asked for don't fit together.
    """
    size, mode = args.resolution, args.image_mode
    if pipe is not None:
        size, mode = list(pipe.image_size), "L" if image_channels_of(pipe) == 1 else "RGB"
    real = load_real_side(args, size, mode)
    wanted = check_metrics(args, class_names, count, real)
    source = args.extractor_weights
    if args.extractor == "classifier":
        source = args.classifier
        if source is None and real.training is None:
            raise InputError(
                f"a classifier must be trained on other pictures than it compares, but {args.reference} has no train "
                "split; give --classifier FOLDER"
            )
        if source is None:
            data = Data(real.training, real.held_out, 0)
            source = train_on(data, real.name, train_classifier, Path(args.output_dir) / "classifier")
    extractor = load_extractor(args.extractor, None if source is None else str(source), device_of(args))
    check_extractor(args, extractor, class_names, count, real, wanted)
    return Judge(real, extractor, wanted, args.seed)


def train_on(data: Data, name: str, train_classifier: Callable, output_dir: Path) -> Path:
    """Train a classifier for an evaluation: some 360,000 pictures, at most 40 epochs."""
    count, images = len(data.train), data.train[[0]][0]
    epochs = max(1, min(40, round(360_000 / count)))
    argv = ["--preset", "mnist-classifier", "--dataset_name", name, "--output_dir", str(output_dir), "--resolution"]
    argv += [*map(str, images.shape[-2:]), "--image_mode", "L" if images.shape[1] == 1 else "RGB"]
    argv += ["--num_train_epochs", str(epochs), "--train_batch_size", str(min(128, max(16, count // 16)))]
    return train_classifier(parse("train_classifier", argv), data)


def classification_accuracy_score(pictures, real: "RealSide", seed: int, train_classifier, output_dir: Path) -> dict:
    """CAS (Ravuri and Vinyals 2019): accuracy on real held-out pictures of a classifier that has only seen generated
    ones, beside that of one that has seen as many real ones. All processes train."""
    from transformers import AutoConfig

    path, processes = output_dir / "cas-generated.npz", current_processes()
    processes.wait_for_everyone()  # until all have drawn
    if processes.is_main_process:
        save_npz(path, batches_of(pictures), pictures.class_names)
    processes.wait_for_everyone()
    count = min(len(pictures), len(real.training))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(real.training))[:count])
    images = real.training[[0]][0]
    generated = data_arguments(str(path), images.shape[-2:], "L" if images.shape[1] == 1 else "RGB")
    sides = {"generated": load_images(generated), "real": real.training.subset(chosen)}
    scores = {"n": count}
    for name, side in sides.items():
        folder = train_on(Data(side, real.held_out, 0), real.name, train_classifier, output_dir / f"cas-{name}")
        scores[name] = AutoConfig.from_pretrained(folder).test_accuracy
    if processes.is_main_process:
        path.unlink()
    return scores


def training_judge(args, data: Data) -> Callable[[ClassConditionalPipeline], dict] | None:
    """What judges a pipeline while it is trained, on the held-out pictures: always the same labels and seeds.

    Args:
        args: the [`DiffusionArguments`] of the run.

    Returns:
        A function from the pipeline to a few figures; `None` if none was asked for.

    Raises:
        InputError: the classifier doesn't fit the pictures or their number.
    """
    if args.evaluation_steps is None:
        return None
    if args.best_metric == "label_accuracy" and not data.id2label:
        raise InputError("--best_metric label_accuracy needs labels; use frechet_distance")
    real = RealSide(data.validation, None, describe(args), "held-out")
    wanted = {"labels", "distances"} if data.id2label else {"distances"}
    extractor = load_extractor("classifier", args.evaluation_classifier, current_processes().device)
    asked = EvaluationArguments(classifier=args.evaluation_classifier)
    check_extractor(asked, extractor, list(data.id2label.values()), args.evaluation_samples, real, wanted)
    judge, count = Judge(real, extractor, wanted, args.seed), args.evaluation_samples

    def figures_of(pipe: ClassConditionalPipeline) -> dict:
        pipe.set_progress_bar_config(disable=True)
        images = [draw(pipe, start, min(start + CHUNK, count), args.seed) for start in range(0, count, CHUNK)]
        names = list(pipe.id2label.values())
        report, _ = judge(Pictures(torch.cat(images), labels_of(names, 0, count), names), of="run")
        measured = {"eval_frechet_distance": report["distances"]["frechet_distance"], "eval_samples": count}
        if data.id2label:
            measured["eval_label_accuracy"] = report["labels"]["accuracy"]
        return measured

    return figures_of


# ---------------------------------------------------------------------------------------------------------------------
# The two sides
# ---------------------------------------------------------------------------------------------------------------------


def load_pipeline(args: EvaluationArguments, device) -> ClassConditionalPipeline:
    """The pipeline of a run folder or of the Hub, with the scheduler that was asked for."""
    try:
        pipe = ClassConditionalPipeline.from_pretrained(args.run).to(device)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{args.run} is not a pipeline of hwdiffusion: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler is not None:
        swap_scheduler(pipe, args.scheduler)
    return pipe


def check_sampling(pipe, args: EvaluationArguments):
    """Raise InputError for what a call of the pipeline would refuse."""
    steps, guidance = sampling_defaults(pipe, args)
    try:
        pipe.check_inputs(
            batch_size=1,
            num_images_per_prompt=1,
            num_inference_steps=steps,
            timesteps=None,
            guidance_scale=guidance,
            guidance_interval=(0.0, 1.0),
            guidance_rescale=0.0,
            eta=0.0,
            generator=None,
            latents=None,
            output_type="pt",
            callback_on_step_end_tensor_inputs=None,
        )
    except ValueError as error:
        raise InputError(f"{args.run}: {error}") from error


def device_of(args: EvaluationArguments) -> torch.device:
    return torch.device(args.device) if args.device else current_processes().device


def image_channels_of(pipe) -> int:
    return pipe.unet.config.out_channels if pipe.vqvae is None else pipe.vqvae.config.out_channels


@dataclass
class RealSide:
    """What pictures are held against: those held out, and those that were trained on, where they are known."""

    held_out: ImageDataset
    training: ImageDataset | None
    name: str
    split: str


def data_arguments(source: str | None, size, mode: str, **settings) -> SimpleNamespace:
    """The [`DataArguments`] that name a folder, a file or a data set."""
    values = {item.name: getattr(DataArguments(), item.name) for item in fields(DataArguments)}
    values |= {"seed": 0, **settings}
    if source is not None:
        is_file = Path(source).exists() or source.endswith(".npz")
        values |= {"train_data_dir": source if is_file else None, "dataset_name": None if is_file else source}
    values |= {"resolution": list(size), "image_mode": mode}
    return SimpleNamespace(**values)


def load_real_side(args: EvaluationArguments, size, mode: str) -> RealSide:
    """The pictures that `--reference` names, or those of the run's own configuration."""
    settings = {} if args.run is None else run_settings(args.run)
    if args.reference is None and not settings:
        what = "--images" if args.run is None else f"{args.run}, which has no config.yaml,"
        raise InputError(f"{what} needs --reference: a folder, an .npz, or a data set to compare with")
    of_data = {item.name for item in fields(DataArguments)} | {"seed"}
    if args.reference is not None:  # the run's columns and limits belong to the run's data
        of_data = {"center_crop", "seed", "validation_fraction"}
    settings = {key: value for key, value in settings.items() if key in of_data}
    source = args.reference if args.reference is not None else args.train_data_dir
    named = data_arguments(source, size, mode, **{**settings, "skip_bad_images": args.skip_bad_images})
    name = Path(named.train_data_dir).name if named.train_data_dir else named.dataset_name
    if args.reference is not None and not has_splits(named):
        return RealSide(load_images(named), None, name, "all of it")
    data = load_data(named)
    return RealSide(data.validation, data.train, name, "held-out")


def run_settings(run: str) -> dict:
    """The flags of the script that made a run, from its config.yaml; empty if there is none."""
    path = Path(run) / "config.yaml"
    if not Path(run).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(run, "config.yaml"))
        except EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    return saved.get(saved.get("script"), {}) if isinstance(saved, dict) and saved.get("script") in SCRIPTS else {}


# ---------------------------------------------------------------------------------------------------------------------
# Checks, before anything is drawn
# ---------------------------------------------------------------------------------------------------------------------


def check_metrics(args: EvaluationArguments, class_names: list[str], count: int, real: RealSide) -> set[str]:
    """The metrics to take: those that were asked for, or all that can be had.

    Raises:
        InputError: one was asked for that can't be had.
    """
    wanted = set(args.metrics if args.metrics is not None else ("labels", "distances", "manifold", "memorisation"))
    if wanted & {"labels", "cas"} and not class_names:
        what = args.run or args.images
        if args.metrics is not None:
            raise InputError(f"{what} has no labels, so the metrics labels and cas can't be taken; leave them out")
        wanted -= {"labels", "cas"}
    if wanted & {"memorisation", "cas"} and real.training is None:
        if args.metrics is not None:
            raise InputError(
                "memorisation and cas need the pictures that were trained on, but --reference "
                f"{args.reference} has no train split beside the one to compare with; leave them out"
            )
        wanted -= {"memorisation", "cas"}
    smallest = min(count, len(real.held_out))
    if "manifold" in wanted and smallest <= 5:
        raise InputError(f"precision and coverage look at 5 neighbours, so more than {smallest} pictures are needed")
    return wanted


def check_extractor(args, extractor, class_names: list[str], count: int, real: RealSide, wanted: set[str]):
    """Raise InputError where the extractor doesn't fit the pictures or their number."""
    names = extractor.class_names
    for pictures in (class_names, real.held_out.class_names):
        unknown = [name for name in pictures if names is not None and name not in names]
        if unknown and "labels" in wanted:
            raise InputError(
                f"--classifier {args.classifier} tells apart {few(names)}, but there are pictures of {unknown[0]!r}; "
                "use one that was trained on these classes, or leave the metric labels out"
            )
    if "labels" in wanted and names is None:
        if args.metrics is not None and args.extractor == "classifier":
            raise InputError(f"--classifier {args.classifier} knows no labels, so the metric labels can't be taken")
        wanted.discard("labels")
    if "distances" in wanted:
        for number, what in ((count, "samples"), (len(real.held_out), "held-out pictures")):
            if number <= extractor.dimension:
                raise InputError(
                    f"a Fréchet distance of {extractor.dimension} features needs at least {extractor.dimension + 1} "
                    f"{what}, but there are {number}; give more, or leave the metric distances out"
                )
