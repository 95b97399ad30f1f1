"""The driver of evaluations: draw samples, extract features, measure, report."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hwdiffusion import InputError, figures
from hwdiffusion.arguments import EvaluationArguments
from hwdiffusion.comparison import batches_of, nearest_pairs, places_among
from hwdiffusion.config import output_folder
from hwdiffusion.data import Data, load_images
from hwdiffusion.extractors import load_classifier
from hwdiffusion.host import prepare_host
from hwdiffusion.judge import Judge, build_judge, classifier_config, trained
from hwdiffusion.label_sets import names_of, number_of_samples, read_label_sets, sets_to_draw
from hwdiffusion.model_card import update_card
from hwdiffusion.models import PIPELINES, load_pipeline, swap_scheduler
from hwdiffusion.reference import RealSide, data_arguments
from hwdiffusion.report import as_table, write_json
from hwdiffusion.run_folder import check_processes, current_processes, make_folder
from hwdiffusion.samples import Samples, sampling_options, save_npz, scheduler_name, weights_digest


def evaluate(args: EvaluationArguments, train_classifier: Callable, judge: Judge | None = None) -> dict:
    """Measure a run, or pictures; the report is returned, printed and written as `evaluation.json`, for a run also
    into its folder and its card. All processes draw, the main one measures.

    Args:
        train_classifier: `train` of train_classifier.py, for an extractor that isn't given, and for CAS.
        judge: whose real side is the run's. Default: the one that the arguments ask for.

    Raises:
        InputError: before any sample is drawn, where the sides don't fit together.
    """
    output_dir = Path(args.output_dir)
    device = start(args)
    processes = current_processes()
    pipe, pictures = None, None
    if args.run is None:
        size, mode = args.resolution, args.image_mode
        pictures = load_images(data_arguments(args.images, size, mode, skip_bad_images=args.skip_bad_images))
        labelled = bool((pictures.labels >= 0).any())
        class_names, count = pictures.class_names if labelled else [], len(pictures)
    else:
        pipe, digest = load_to_draw(args.run, args, device)
        choose_scheduler(pipe, args.scheduler)
        check_sampling(pipe, args)
        sets = None if args.label_sets is None else read_label_sets(args.label_sets, pipe)
        class_names = list(pipe.id2label.values())
        count = number_of_samples(args, sets)
    judge = judge or build_judge(args, pipe, class_names, count, train_classifier, device)
    make_folder(output_dir)
    if pipe is not None:
        sets = sets_to_draw(pipe, judge.real.held_out, args.label_frequencies) if sets is None else sets
        pictures = Samples(output_dir, pipe, args, sets, digest)
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
    if report.get("labels", {}).get("attributes"):
        figures.confusion_plot(report["labels"]["attributes"], output_dir / "confusion.png")
    if args.label_sets is not None:
        grid_of_sets(pictures, sets).save(output_dir / "sets.png")
    write_json(output_dir / "evaluation.json", report)
    carded = None
    if pipe is not None:
        pictures.keep(args.save_images, output_dir)
        run = Path(args.run)
        if run.is_dir() and output_dir.resolve() == output_folder("evaluate", args).resolve():
            if args.label_sets is None:
                write_json(run / "evaluation.json", report)
            carded = run  # elsewhere, it is an experiment
    print(as_table(report))
    if carded is not None:
        update_card(carded, report["sampling"]["weights_sha256"])
    return report


def grid_of_sets(samples: Samples, sets: torch.Tensor, most: int = 64) -> Image.Image:
    """The first sample of every set, with its labels under it."""
    sets = sets[:most]
    images = figures.to_pil(samples.images(torch.arange(len(sets))).float() / 127.5 - 1)
    captions = [names_of(ids, samples.class_names) for ids in sets]
    return figures.image_grid(images, columns=8, cell=96, captions=captions)


def start(args: EvaluationArguments) -> torch.device:
    """Check what doesn't depend on any data, and return the device to work on."""
    check_processes()
    processes = current_processes()
    prepare_host(processes.device)
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise InputError(f"--output_dir {args.output_dir} is a file; name a folder")
    ours = ("*evaluation.json", "evaluation-of-*", "sweep.json", "compare.json")
    ours += ("classifier-*", "cas-*", "samples*")
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not any(any(folder.glob(pattern)) for pattern in ours):
        raise InputError(f"--output_dir {folder} holds something else than an evaluation; name another folder")
    if args.device is None:
        return processes.device
    if processes.num_processes > 1:
        raise InputError("--device is for one process; accelerate gives each of several its own")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} is not there: {' '.join(str(error).split())[:100]}") from error
    return torch.device(args.device)


# ---------------------------------------------------------------------------------------------------------------------
# The generated side
# ---------------------------------------------------------------------------------------------------------------------


def choose_scheduler(pipe, name: str | None):
    """Give a pipeline the scheduler that was asked for, if any was."""
    if name is not None and scheduler_name(pipe) is None:
        raise InputError(f"--scheduler {name} is for diffusion models; a GAN draws in one pass")
    try:
        if name is not None:
            swap_scheduler(pipe, name)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"--scheduler {name} can't be made for this pipeline: {error}") from error


def load_to_draw(run: str, args: EvaluationArguments, device: torch.device, kinds: tuple[type, ...] = PIPELINES):
    """The pipeline of a run in the precision, and with the guide, that the arguments ask for; and the digest of the
    weights that it has been saved with, which is the same whatever they ask for."""
    pipe = load_pipeline(run, device, kinds)
    digest = weights_digest(pipe)
    if args.torch_dtype != "float32":  # diffusers warns of any cast
        pipe.to(getattr(torch, args.torch_dtype))
    if args.guide is not None:
        if scheduler_name(pipe) is None:
            raise InputError("--guide is for diffusion models; a GAN draws in one pass")
        pipe.classifier = load_classifier(args.guide, "--guide").to(device)  # its gradient wants float32
    return pipe, digest


def check_sampling(pipe, args: EvaluationArguments):
    """Raise InputError for what a call of the pipeline would refuse."""
    if args.label_frequencies != "equal" and (not pipe.id2label or pipe.config.max_labels > 1):
        raise InputError("--label_frequencies is for models of single labels; leave it out")
    try:
        pipe.check_inputs(**sampling_options(pipe, args))
    except ValueError as error:
        raise InputError(f"{args.run}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Classification accuracy score
# ---------------------------------------------------------------------------------------------------------------------


def classification_accuracy_score(
    pictures, real: RealSide, seed: int, train_classifier: Callable, output_dir: Path
) -> dict:
    """CAS (Ravuri and Vinyals 2019): accuracy on real held-out pictures of a classifier that has only seen generated
    ones, beside that of one that has seen as many real ones. All processes train."""
    from transformers import AutoConfig

    processes = current_processes()
    processes.wait_for_everyone()  # until all have drawn
    count, names = min(len(pictures), len(real.training)), real.training.class_names
    path = output_dir / "cas-generated.npz"
    if processes.is_main_process:
        ids = places_among(names, pictures.class_names)
        save_npz(path, ((images, ids[labels]) for images, labels in batches_of(pictures)), names, count)
    processes.wait_for_everyone()
    images = real.training[[0]][0]
    generated = load_images(data_arguments(str(path), images.shape[-2:], "L" if images.shape[1] == 1 else "RGB"))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(real.training))[:count])
    scores: dict = {"n": count}
    for side, training in {"generated": generated, "real": real.training.subset(chosen)}.items():
        data = Data(training, real.held_out, 0)
        # by its data, so that only an interrupted evaluation of the same samples continues one
        key = RealSide(real.held_out, training, real.name, "", trained_on=False).fingerprint()
        folder = trained(classifier_config(data, real.name, output_dir / f"cas-{side}-{key}"), data, train_classifier)
        scores[side] = AutoConfig.from_pretrained(folder).test_accuracy
    processes.wait_for_everyone()
    if processes.is_main_process:
        path.unlink()
        for folder in output_dir.glob("cas-*"):
            shutil.rmtree(folder)
    return scores
