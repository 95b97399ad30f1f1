"""Every source of pictures and labels → data sets of uint8 pictures and label sets.

Sources: the embedded digits, a data set of the Hub, a folder of parquet files, a folder with one sub-folder a class, a
folder of pictures without labels. To add one, write a function that returns a dict of `Source`, one a split, and call
it in `read_sources`.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from hwdiffusion import InputError
from hwdiffusion.randomness import epoch_order


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
NULL_LABEL = -1


@dataclass
class Source:
    """A split before its pictures are decoded: `open(i)` gives picture i, `name(i)` what to call it in an error."""

    size: int
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray  # (N, T) ids, padded with -1; T = 0 without labels
    class_names: list[str]


class ImageDataset:
    """uint8 pictures with label sets, decoded once and kept in memory, or read from their files each time.

    `dataset[indices]` gives `(images, labels)`: uint8 `(B, C, H, W)` and int64 `(B, T)`, padded with -1.
    """

    def __init__(self, source: Source, decode: Callable[[Image.Image], np.ndarray], indices):
        self.source, self.decode = source, decode
        self.indices = np.asarray(indices)
        self.labels = torch.from_numpy(source.labels[self.indices])  # (N, T)
        self.class_names = source.class_names
        self.images: torch.Tensor | None = None

    @property
    def reads_files(self) -> bool:
        return self.images is None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.as_tensor(indices)
        if self.images is not None:
            return self.images[places], self.labels[places]
        arrays = [read_image(self.source, int(self.indices[place]), self.decode) for place in places.tolist()]
        return torch.from_numpy(np.stack(arrays)), self.labels[places]

    __getitems__ = __getitem__  # the name by which a DataLoader asks for a whole batch

    def read_all(self, keep: bool, skip_bad_images: bool) -> int:
        """Decode every picture once, so that a bad one is found before any work, and `keep` them in memory or not.

        Returns:
            The number of unreadable pictures, which were left out.

        Raises:
            InputError: an unreadable picture, unless they are skipped.
        """
        kept: np.ndarray | None = None

        def read(place: int) -> bool:
            try:
                array = read_image(self.source, int(self.indices[place]), self.decode)
            except InputError:
                if not skip_bad_images:
                    raise
                return False
            if kept is not None:
                kept[place] = array
            return True

        if keep:
            blank = self.decode(Image.new("L", (8, 8)))
            kept = np.zeros((len(self), *blank.shape), dtype=np.uint8)
        with ThreadPoolExecutor() as pool:
            good = np.array(list(pool.map(read, range(len(self)))), dtype=bool)
        if not good.any():
            raise InputError(f"none of the {len(good)} pictures can be read, from {self.source.name(0)} on")
        if not good.all():
            self.indices, self.labels = self.indices[good], self.labels[good]
            kept = None if kept is None else kept[good]
        self.images = None if kept is None else torch.from_numpy(kept)
        return int((~good).sum())


@dataclass
class Data:
    """What a script trains on."""

    train: ImageDataset
    validation: ImageDataset
    skipped: int

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.train.class_names))

    def summary(self) -> str:
        """What was found, in a line."""
        names = self.train.class_names
        labels = f"{len(names)} classes ({_few(names)})" if names else "no labels"
        skipped = f", skipped {self.skipped} unreadable picture{'s'[: self.skipped != 1]}" if self.skipped else ""
        return f"{len(self.train)} training and {len(self.validation)} validation pictures, {labels}{skipped}"

    @property
    def max_labels(self) -> int:
        return self.train.labels.shape[1]


def load_data(args) -> Data:
    """The training and validation pictures that [`DataArguments`] ask for.

    Raises:
        InputError: no pictures, an empty class, an unreadable picture, a column that isn't there.
    """
    sources = read_sources(args)
    train_name = "train" if "train" in sources else next(iter(sources))
    train_source = sources.pop(train_name)
    validation_name = next((name for name in VALIDATION_SPLITS if name in sources), None)
    for source in [train_source] + ([sources[validation_name]] if validation_name else []):
        if source.size == 0:
            raise InputError(f"no images found in {describe(args)}")

    if validation_name is not None:
        validation_source = sources[validation_name]
        train_indices, validation_indices = np.arange(train_source.size), np.arange(validation_source.size)
    else:
        order = epoch_order(args.seed, 0, train_source.size)
        held_out = round(args.validation_fraction * train_source.size)
        if held_out == 0 or held_out == train_source.size:
            raise InputError(
                f"{describe(args)} has {train_source.size} pictures, too few to split off a validation share of "
                f"{args.validation_fraction}"
            )
        validation_source = train_source
        train_indices, validation_indices = np.sort(order[held_out:]), np.sort(order[:held_out])
    if args.max_train_samples is not None:  # any, not the first: those may be all of one class
        chosen = epoch_order(args.seed, 1, len(train_indices))[: args.max_train_samples]
        train_indices = train_indices[np.sort(chosen)]

    decode = decoder(args.image_mode, image_size(args), args.center_crop)
    train = ImageDataset(train_source, decode, train_indices)
    validation = ImageDataset(validation_source, decode, validation_indices)
    height, width = image_size(args)
    picture_bytes = height * width * image_channels(args)
    keep = (len(train) + len(validation)) * picture_bytes <= args.image_memory_gb * 2**30
    skipped = sum(dataset.read_all(keep, args.skip_bad_images) for dataset in (train, validation))
    check_classes(train, args)
    return Data(train, validation, skipped)


def check_classes(train: ImageDataset, args):
    counts = np.bincount(train.labels[train.labels >= 0].numpy().reshape(-1), minlength=len(train.class_names))
    empty = [name for name, count in zip(train.class_names, counts) if count == 0]
    if empty and args.max_train_samples is None:
        raise InputError(f"class {empty[0]!r} of {describe(args)} has no pictures to train on; remove it or fill it")


def describe(args) -> str:
    return args.train_data_dir if args.train_data_dir is not None else f"data set {args.dataset_name}"


def image_size(args) -> tuple[int, int]:
    """Height and width in pixels."""
    return (args.resolution[0], args.resolution[-1])


def image_channels(args) -> int:
    return 1 if args.image_mode == "L" else 3


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def flip(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mirror the chosen pictures `(B,)` of `(B, C, H, W)` left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def decoder(mode: str, size: tuple[int, int], center_crop: bool) -> Callable[[Image.Image], np.ndarray]:
    """A function from a picture of any mode and size to uint8 `(C, H, W)`."""
    height, width = size

    def decode(image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit gray would be clipped at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = image.convert(mode)
        if image.size != (width, height):
            if center_crop:
                image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            else:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

    return decode


def read_image(source: Source, index: int, decode: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """One decoded picture.

    Raises:
        InputError: it can't be read; it is named.
    """
    try:
        return decode(source.open(index))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{source.name(index)} can't be read as a picture ({type(error).__name__}); mend or remove it, or give "
            "--skip_bad_images"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def read_sources(args) -> dict[str, Source]:
    """The splits of what the arguments name."""
    if args.train_data_dir is not None:
        folder = Path(args.train_data_dir)
        if not folder.is_dir():
            raise InputError(f"--train_data_dir {folder} is not a folder")
        if any(folder.rglob("*.parquet")):
            return from_datasets(args, "parquet", data_dir=str(folder))
        return from_image_folder(args, folder)
    if args.dataset_name == "digits":
        return embedded_digits()
    return from_datasets(args, args.dataset_name, name=args.dataset_config_name)


def embedded_digits() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits, 8×8, 17 gray levels)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    source = Source(
        size=len(pictures),
        open=lambda index: Image.fromarray(pictures[index]),
        name=lambda index: f"digit {index}",
        labels=digits.target.astype(np.int64)[:, None],
        class_names=[str(name) for name in digits.target_names],
    )
    return {"train": source}


def from_image_folder(args, folder: Path) -> dict[str, Source]:
    """A folder with one sub-folder a class, or with pictures only; or sub-folders train, validation or test of it."""
    splits = {path.name: path for path in sorted(folder.iterdir()) if path.name in ("train", *VALIDATION_SPLITS)}
    splits = {name: path for name, path in splits.items() if path.is_dir()}
    if "train" not in splits:
        splits = {"train": folder}
    else:
        others = [path for path in sorted(folder.iterdir()) if _is_class_folder(path) and path.name not in splits]
        classes = [path.name for path in others if _images_in(path)]
        if classes:
            raise InputError(
                f"{folder} holds a folder train, which would be the training split, beside other folders with "
                f"pictures ({_few(classes)}); if train is a class, rename it"
            )
    class_names = [path.name for path in sorted(splits["train"].iterdir()) if _is_class_folder(path)]
    return {name: _image_folder_split(args, path, class_names) for name, path in splits.items()}


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _image_folder_split(args, folder: Path, class_names: list[str]) -> Source:
    if args.image_column or args.label_column:
        column = args.image_column or args.label_column
        raise InputError(f"{folder} is a folder of pictures and has no columns, so column {column!r} can't be chosen")
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = _images_in(folder / name)
        if not found and (folder / name).is_dir():
            raise InputError(f"class folder {folder / name} holds no images; remove it or fill it")
        files += found
        labels += [label] * len(found)
    unlabelled = [path for path in _images_in(folder) if path.parent == folder]
    if files and unlabelled:
        raise InputError(
            f"{folder} holds both class folders and pictures outside of them, such as {unlabelled[0].name}; "
            "put every picture into a class folder, or all into one folder"
        )
    subfolders = [path.name for path in sorted(folder.iterdir()) if _is_class_folder(path)]
    unknown = [name for name in subfolders if name not in class_names]
    if unknown:
        raise InputError(f"{folder} has a class {unknown[0]!r} that the training split lacks; it has {class_names}")
    if not files and not unlabelled:
        raise InputError(f"no images found in {folder}")
    paths = files or unlabelled
    return Source(
        size=len(paths),
        open=lambda index: Image.open(paths[index]),
        name=lambda index: str(paths[index]),
        labels=np.array(labels, dtype=np.int64)[:, None] if files else np.zeros((len(paths), 0), dtype=np.int64),
        class_names=class_names if files else [],
    )


def from_datasets(args, path: str, **kwargs) -> dict[str, Source]:
    """A data set of the Hub, or parquet files, by the `datasets` library."""
    import datasets

    try:
        splits = datasets.load_dataset(path, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{describe(args)} can't be loaded: {reason}") from error
    train = "train" if "train" in splits else next(iter(splits))
    validation = next((name for name in VALIDATION_SPLITS if name in splits and name != train), None)
    class_names: list[str | int] | None = None  # the training split decides
    sources = {}
    for name in (train, validation):
        if name is not None:
            sources[name], class_names = _from_split(args, name, splits[name], class_names)
    return sources


def _from_split(args, split_name: str, split, class_names: list | None) -> tuple[Source, list]:
    import datasets

    def choose(wanted: str | None, kind: str, fitting: list[str]) -> str | None:
        if wanted is None:
            return fitting[0] if fitting else None
        if wanted not in split.features:
            raise InputError(
                f"{describe(args)} has no {kind} column {wanted!r}; its columns are {', '.join(split.features)}"
            )
        return wanted

    images = [name for name, kind in split.features.items() if isinstance(kind, datasets.Image)]
    image_column = choose(args.image_column, "image", images)
    if image_column is None:
        raise InputError(f"{describe(args)} has no image column; its columns are {', '.join(split.features)}")
    if not isinstance(split.features[image_column], datasets.Image):
        split = _cast_to_images(args, split, image_column)
    classes = [name for name, kind in split.features.items() if isinstance(kind, datasets.ClassLabel)]
    label_column = choose(args.label_column, "label", classes)

    encoded = split.cast_column(image_column, datasets.Image(decode=False))
    pictures = encoded.select_columns([image_column])

    def open_image(index: int) -> Image.Image:
        stored = pictures[index][image_column]
        if stored is None:
            raise OSError("there is no picture")
        return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])

    labels = np.zeros((len(split), 0), dtype=np.int64)
    if label_column is not None:
        labels, class_names = _class_labels(args, split_name, split, label_column, class_names)
    source = Source(
        size=len(split),
        open=open_image,
        name=lambda index: f"row {index} of split {split_name} of {describe(args)}",
        labels=labels,
        class_names=[str(name) for name in class_names or []],
    )
    return source, class_names or []


def _cast_to_images(args, split, column: str):
    import datasets

    try:
        return split.cast_column(column, datasets.Image())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"column {column!r} of {describe(args)} holds {split.features[column]}, not images"
        ) from error


def _class_labels(args, split_name: str, split, column: str, class_names: list | None) -> tuple[np.ndarray, list]:
    import datasets

    kind, values = split.features[column], split[column][:]
    if isinstance(kind, datasets.ClassLabel):
        labels = [NULL_LABEL if value is None else value for value in values]
        class_names = kind.names
        allowed = f"the ids 0 to {len(class_names) - 1} ({_few(class_names)})"
    elif all(isinstance(value, (int, str, type(None))) for value in values):
        class_names = class_names or sorted({value for value in values if value is not None})  # numbers by their size
        ids = {name: index for index, name in enumerate(class_names)}
        labels = [ids.get(value, NULL_LABEL) for value in values]
        allowed = _few(class_names)
    else:
        raise InputError(f"column {column!r} of {describe(args)} holds {kind}, not one label a picture")
    labels = np.array(labels, dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise InputError(
            f"row {wrong[0]} of split {split_name} of {describe(args)} has the label {values[int(wrong[0])]}; allowed "
            f"are {allowed}"
        )
    return labels[:, None], class_names


def _few(names: list) -> str:
    return ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")
