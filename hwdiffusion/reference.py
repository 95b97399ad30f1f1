"""The real side of an evaluation: held-out pictures to compare with, and those that were trained on."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from hwdiffusion import InputError
from hwdiffusion.arguments import SCRIPTS, DataArguments, EvaluationArguments
from hwdiffusion.config import run_config
from hwdiffusion.data import ImageDataset, has_splits, load_data, load_images
from hwdiffusion.places import is_here


@dataclass
class RealSide:
    """Real pictures: those that nothing was trained on, and others, where they are known.

    Attributes:
        held_out: what generated pictures are compared with.
        training: other real pictures: for the floor, and to train a classifier on; `None` if there are none.
        name, split: what `held_out` is, for the report.
        trained_on: whether `training` is what the generator was trained on, so that copies can be told.
    """

    held_out: ImageDataset
    training: ImageDataset | None
    name: str
    split: str
    trained_on: bool

    def fingerprint(self) -> str:
        """Some digits that differ between real sides: of their numbers, labels and some hundred pictures."""
        digest = hashlib.sha256()
        for pictures in (self.training, self.held_out):
            if pictures is not None:
                places = np.linspace(0, len(pictures) - 1, min(200, len(pictures))).astype(int)
                digest.update(f"{len(pictures)} {pictures.class_names}".encode())
                digest.update(pictures.labels.numpy().tobytes())
                digest.update(pictures[places.tolist()][0].numpy().tobytes())
        return digest.hexdigest()[:8]


def data_arguments(source: str | None, size, mode: str, **settings) -> SimpleNamespace:
    """The [`DataArguments`] that name a folder, a file or a data set, with a seed.

    Args:
        source: what they name; `None` leaves it to `settings`.
        size: height and width.
        mode: `L` or `RGB`.
    """
    values = {item.name: getattr(DataArguments(), item.name) for item in fields(DataArguments)}
    values |= {"seed": 0, **settings}
    if source is not None:
        is_file = is_here(source, "the pictures") or source.endswith((".npz", ".parquet"))
        values |= {"train_data_dir": source if is_file else None, "dataset_name": None if is_file else source}
    values |= {"resolution": list(size), "image_mode": mode}
    return SimpleNamespace(**values)


def load_real_side(args: EvaluationArguments, size, mode: str) -> RealSide:
    """The held-out pictures are those of `--reference`, else of the run's own data; a run's training pictures are
    always those of its own data, if they can be had.

    Raises:
        InputError: there is nothing to compare with, or it can't be read.
    """
    settings = {} if args.run is None else run_settings(args.run)
    of_data = {item.name for item in fields(DataArguments)} | {"seed"}
    settings = {key: value for key, value in settings.items() if key in of_data}
    settings["skip_bad_images"] = args.skip_bad_images
    own = data_arguments(args.train_data_dir, size, mode, **settings)
    known = own.train_data_dir is not None or own.dataset_name is not None
    if args.reference is None:
        if not known:
            what = "--images" if args.run is None else f"{args.run}, which has no config.yaml,"
            raise InputError(f"{what} needs --reference: a folder, an .npz, or a data set to compare with")
        data = load_data(own)
        if own.streaming:  # too large to look for copies in
            return RealSide(data.validation, None, _name(own), "held-out", trained_on=False)
        return RealSide(data.validation, data.train, _name(own), "held-out", trained_on=True)

    # the run's columns and limits belong to the run's data
    settings = {key: settings[key] for key in ("center_crop", "seed", "skip_bad_images") if key in settings}
    named = data_arguments(args.reference, size, mode, **settings)
    training, trained_on = None, False
    if known and not own.streaming:
        try:
            training, trained_on = load_data(own).train, True
        except InputError as error:
            if args.train_data_dir is not None:
                raise
            print(f"what the run was trained on is not there, so copies can't be told: {error}")
    if has_splits(named):
        data = load_data(named)
        held_out = data.validation
        if training is None:  # of pictures without a run, the reference's own are taken for it
            training, trained_on = data.train, args.run is None
        split = "held-out"
    else:
        held_out, split = load_images(named), "all of it"
    if training is not None and set(held_out.class_names) <= set(training.class_names) and held_out.class_names:
        held_out = held_out.relabelled(training.class_names)
    return RealSide(held_out, training, _name(named), split, trained_on)


def _name(named) -> str:
    return Path(named.train_data_dir).name if named.train_data_dir else named.dataset_name


def run_settings(run: str) -> dict:
    """The flags of the script that made a run, from its config.yaml, or that of the run whose checkpoint it is; empty
    if there is none."""
    path = run_config(run)
    if path is None:
        return {}
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return saved.get(saved.get("script"), {}) if isinstance(saved, dict) and saved.get("script") in SCRIPTS else {}
