"""Pictures and label sets to train on: splits, decoding, keeping in memory. Where they come from: `sources.py`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from hwdiffusion import InputError
from hwdiffusion.randomness import Draws, epoch_order
from hwdiffusion.sources import NULL_LABEL, VALIDATION_SPLITS, Source, describe, few, read_image, read_sources
from hwdiffusion.streams import PictureStream, open_stream


HELD_OUT_OF_A_STREAM = 2000


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

    @property
    def max_labels(self) -> int:
        """The most labels that a picture has."""
        return self.labels.shape[1]

    def starting_pictures(self, count: int, seed: int) -> torch.Tensor:
        """The first `count` of the first epoch, the same on every process, whatever the batch size."""
        return self[epoch_order(seed, 0, len(self))[:count]][0]

    def spread_pictures(self, count: int, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """Some `count` pictures from all over the data set, in batches."""
        places = np.arange(0, len(self), max(1, len(self) // count))
        for batch in np.array_split(places, -(-len(places) // batch_size)):
            yield self[batch][0]

    def subset(self, places: np.ndarray) -> "ImageDataset":
        """Some of the pictures, as a data set of its own."""
        chosen = ImageDataset(self.source, self.decode, self.indices[places])
        chosen.labels, chosen.class_names = self.labels[torch.as_tensor(places)], self.class_names
        chosen.images = None if self.images is None else self.images[torch.as_tensor(places)]
        return chosen

    def relabelled(self, class_names: list[str]) -> "ImageDataset":
        """The same pictures by the ids of other class names, among which theirs must be."""
        places = torch.tensor([class_names.index(name) for name in self.class_names] + [NULL_LABEL])
        same = self.subset(np.arange(len(self)))
        same.labels, same.class_names = places[self.labels], class_names  # -1, the last, stays -1
        return same

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

    train: ImageDataset | PictureStream
    validation: ImageDataset
    skipped: int

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.train.class_names))

    def summary(self) -> str:
        """What was found, in a line."""
        names = self.train.class_names
        labels = f"{len(names)} classes ({few(names)})" if names else "no labels"
        skipped = f", skipped {self.skipped} unreadable picture{'s'[: self.skipped != 1]}" if self.skipped else ""
        return f"{len(self.train)} training and {len(self.validation)} validation pictures, {labels}{skipped}"

    @property
    def max_labels(self) -> int:
        return self.train.max_labels

    @property
    def has_sets(self) -> bool:
        """Whether pictures have sets of labels: not each exactly one, or none at all."""
        labels = getattr(self.train, "labels", None)  # those of a stream aren't known
        return self.max_labels > 1 or (labels is not None and bool((labels < 0).any()))


def load_images(args) -> ImageDataset:
    """All pictures of what [`DataArguments`] name, undivided: of its only split, or of the one to train on.

    Raises:
        InputError: as `load_data`.
    """
    sources = read_sources(args)
    source = sources.get("train", next(iter(sources.values())))
    if source.size == 0:
        raise InputError(f"no images found in {describe(args)}")
    dataset = ImageDataset(source, decoder(args.image_mode, image_size(args), args.center_crop), range(source.size))
    dataset.read_all(_fits_memory(args, len(dataset)), args.skip_bad_images)
    return dataset


def has_splits(args) -> bool:
    """Whether what the arguments name has a split to train on and one for validation."""
    sources = read_sources(args)
    return "train" in sources and any(name in VALIDATION_SPLITS for name in sources)


def load_data(args) -> Data:
    """The training and validation pictures that [`DataArguments`] ask for.

    Raises:
        InputError: no pictures, an empty class, an unreadable picture, a column that isn't there.
    """
    decode = decoder(args.image_mode, image_size(args), args.center_crop)
    if args.streaming:
        stream, source = open_stream(args, decode, HELD_OUT_OF_A_STREAM)
        validation = ImageDataset(source, decode, range(source.size))
        return Data(stream, validation, validation.read_all(True, args.skip_bad_images))
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

    train = ImageDataset(train_source, decode, train_indices)
    validation = ImageDataset(validation_source, decode, validation_indices)
    keep = _fits_memory(args, len(train) + len(validation))
    skipped = sum(dataset.read_all(keep, args.skip_bad_images) for dataset in (train, validation))
    check_classes(train, validation, args)
    return Data(train, validation, skipped)


def _fits_memory(args, count: int) -> bool:
    height, width = image_size(args)
    return count * height * width * image_channels(args) <= args.image_memory_gb * 2**30


def check_classes(train: ImageDataset, validation: ImageDataset, args):
    if args.class_balance > 0 and not train.class_names:
        raise InputError(f"--class_balance evens out classes, but {describe(args)} has none; give it 0")
    empty = [name for name, count in pictures_of_classes(train).items() if count == 0]
    if empty and args.max_train_samples is None:
        held_out = pictures_of_classes(validation).get(empty[0], 0)
        why, remedy = "has no pictures to train on", "remove it or fill it"
        if held_out and validation.source is train.source:
            why += f", but {held_out} held out for validation"
            remedy = "add more, or give another --validation_fraction or --seed"
        elif held_out:
            why += f", but {held_out} in the validation split"
            remedy = "move some to the training split, or remove it"
        raise InputError(f"class {empty[0]!r} of {describe(args)} {why}; {remedy}")


def pictures_of_classes(dataset: ImageDataset) -> dict[str, int]:
    """How many pictures have each label."""
    counts = np.bincount(dataset.labels[dataset.labels >= 0].numpy().reshape(-1), minlength=len(dataset.class_names))
    return dict(zip(dataset.class_names, counts.tolist()))


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


def views_of(images: torch.Tensor, random_flip: bool) -> torch.Tensor:
    """The F views of pictures `(B, C, H, W)` that flipping chooses from, `(B, F, C, H, W)`: one, or two."""
    return torch.stack([images, images.flip(-1)] if random_flip else [images], dim=1)


def pixels_to_sample(random_flip: bool) -> Callable:
    """A function of uint8 pictures `(B, C, H, W)` and of a batch's draws, to what is noised, in [-1, 1]."""

    def to_sample(images: torch.Tensor, draws: Draws) -> torch.Tensor:
        sample = to_model_range(images)
        return flip(sample, draws.uniform("flip") < 0.5) if random_flip else sample

    return to_sample


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
