"""Data larger than memory, or than the disk: pictures of a data set read in passing, in an order that a resumed run
and any number of processes see alike."""

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

import numpy as np
import torch
from PIL import Image

from hwdiffusion import InputError
from hwdiffusion.randomness import BatchOrder
from hwdiffusion.sources import Source, choose_columns, describe, few, load_splits, open_stored, read_image


AHEAD = 4  # batches that are read before they are asked for
_KEPT_BYTES = 2**28


class PictureStream:
    """uint8 pictures with labels from a streamed data set, as an endless sequence of shuffled epochs.

    Every process reads all of it, undecoded, and decodes its part of every batch. So a step's batch is the same
    whatever their number, and a resumed run reads on from where it was after passing over what came before.

    Args:
        examples: a `datasets.IterableDataset` whose pictures are not decoded.
        size: the examples of an epoch.
        columns: names of the image column, and of the label column or `None`.
        class_names: of the labels.
        decode: from a picture to uint8 `(C, H, W)`.
        args: the [`DataArguments`], and the seed.
    """

    def __init__(self, examples, size: int, columns: tuple[str, str | None], class_names: list[str], decode, args):
        self.examples, self.size, self.columns = examples, size, columns
        self.class_names, self.decode = class_names, decode
        self.seed, self.buffer_size, self.skip_bad_images = args.seed, args.shuffle_buffer_size, args.skip_bad_images
        self._first: dict[int, torch.Tensor] = {}
        self.threads, self.name = max(1, args.dataloader_num_workers), describe(args)

    def __len__(self) -> int:
        return self.size

    @property
    def max_labels(self) -> int:
        return 0 if self.columns[1] is None else 1

    def read(self, order: BatchOrder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one process, uint8 `(B, C, H, W)` and int64 `(B, T)`, read and decoded ahead by threads."""
        positions = order.positions()
        first = next(positions)
        yield from self._read(chain([first], positions), int(first[0]))

    def starting_pictures(self, count: int, _seed: int) -> torch.Tensor:
        """The first `count`, uint8 `(B, C, H, W)`, the same on every process."""
        return torch.cat(list(self.spread_pictures(count)))

    def spread_pictures(self, count: int, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """The first `count`, in batches: any others would have to be looked for."""
        count = min(count, self.size)
        if self._first.get(count) is None:
            batches = self._read(iter(np.split(np.arange(count), range(batch_size, count, batch_size))), 0)
            images = torch.cat([images for images, _ in batches])
            if images.numel() > _KEPT_BYTES:
                yield from images.split(batch_size)
                return
            self._first[count] = images  # asked for at every checkpoint; to open a stream may take seconds
        yield from self._first[count].split(batch_size)

    def _read(self, positions: Iterator[np.ndarray], first: int):
        raw = self._batches(positions, self._from(first))
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self.threads) as decoders:

            def read_one() -> list[tuple[int, Future]] | None:
                batch = next(raw, None)
                return batch and [(place, decoders.submit(self._decode, place, example)) for place, example in batch]

            ahead: deque[Future] = deque(reader.submit(read_one) for _ in range(AHEAD))
            try:
                while (batch := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(read_one))
                    yield self._collate([(place, future.result()) for place, future in batch])
            finally:
                for future in ahead:
                    future.cancel()

    def _from(self, position: int) -> Iterator[tuple[int, dict]]:
        """Examples with their positions in the sequence of epochs, from one on."""
        epoch, skipped = divmod(position, self.size)
        while True:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            shuffled = _shuffled(self.examples, seed, self.buffer_size)
            count = skipped
            for example in islice(shuffled.skip(skipped), self.size - skipped):
                yield epoch * self.size + count, example
                count += 1
            if count < self.size:
                raise InputError(f"{self.name} was said to have {self.size} pictures, but gave {count}")
            epoch, skipped = epoch + 1, 0

    @staticmethod
    def _batches(positions: Iterator[np.ndarray], examples: Iterator[tuple[int, dict]]):
        for wanted in positions:  # ascending, as the examples are
            batch = []
            for position in wanted.tolist():
                place, example = next(examples)
                while place < position:
                    place, example = next(examples)
                batch.append((place, example))
            yield batch

    def _decode(self, position: int, example: dict) -> tuple[np.ndarray | None, list[int]]:
        image_column, label_column = self.columns
        epoch, place = divmod(position, self.size)
        source = Source(
            size=1,
            open=lambda _: open_stored(example[image_column]),
            name=lambda _: f"picture {place} of pass {epoch} over {self.name}",
            labels=np.zeros((1, 0)),
            class_names=self.class_names,
        )
        try:
            image = read_image(source, 0, self.decode)
        except InputError:
            if not self.skip_bad_images:
                raise
            image = None
        if label_column is None:
            return image, []
        label = example[label_column]
        if label is None or not 0 <= label < len(self.class_names):
            raise InputError(
                f"{source.name(0)} has the label {label}; allowed are the ids 0 to {len(self.class_names) - 1} "
                f"({few(self.class_names)})"
            )
        return image, [label]

    def _collate(self, batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        good = [decoded for _, decoded in batch if decoded[0] is not None]
        if not good:
            raise InputError(f"none of the {len(batch)} pictures of a batch of {self.name} can be read")
        # in the place of a bad one, another of the same batch: positions must not shift
        chosen = [decoded if decoded[0] is not None else good[place % len(good)] for place, decoded in batch]
        labels = torch.tensor([labels for _, labels in chosen], dtype=torch.int64).reshape(len(chosen), -1)
        return torch.from_numpy(np.stack([image for image, _ in chosen])), labels


def open_stream(args, decode: Callable[[Image.Image], np.ndarray], held_out: int):
    """The training pictures of a data set as a stream, and some held-out ones.

    Args:
        args: the [`DataArguments`], and the seed.
        decode: from a picture to uint8 `(C, H, W)`.
        held_out: how many pictures are read for validation, at most.

    Returns:
        A [`PictureStream`] and a [`Source`].

    Raises:
        InputError: the data can't be streamed.
    """
    splits, train_name, validation_name = load_splits(args, streaming=True)
    if splits is None:
        raise InputError(
            f"--streaming is for data sets of the Hub and parquet files, not for {describe(args)}; leave it out: "
            "pictures of more than --image_memory_gb are read lazily without it"
        )
    train = splits[train_name]
    columns, class_names = _columns(args, train)
    train = _undecoded(train, columns[0])
    size = _size(train, train_name)
    if args.max_train_samples is not None:
        raise InputError("--max_train_samples can't be had with --streaming; give --max_train_steps")
    if validation_name is not None:
        validation = _undecoded(splits[validation_name], columns[0])
        found = list(_shuffled(validation, args.seed, args.shuffle_buffer_size).take(held_out))
    else:
        count = min(held_out, round(args.validation_fraction * size))
        if count == 0:
            raise InputError(f"{describe(args)} has {size} pictures, too few to split off some for validation")
        mixed = _shuffled(train, args.seed, args.shuffle_buffer_size)
        found, train, size = list(mixed.take(count)), mixed.skip(count), size - count
    if not found or size == 0:
        raise InputError(f"no images found in {describe(args)}")
    image_column, label_column = columns
    labels = np.zeros((len(found), 0)) if label_column is None else [[example[label_column]] for example in found]
    held_out_source = Source(
        size=len(found),
        open=lambda index: open_stored(found[index][image_column]),
        name=lambda index: f"held-out picture {index} of {describe(args)}",
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
    )
    return PictureStream(train, size, columns, class_names, decode, args), held_out_source


def _shuffled(examples, seed: int, buffer_size: int):
    # Several files are read by turns, by threads whose end the library awaits for seconds; one file needs none.
    options = {}
    if examples.num_shards == 1 and "max_buffer_input_shards" in inspect.signature(examples.shuffle).parameters:
        options["max_buffer_input_shards"] = 1
    return examples.shuffle(seed=seed, buffer_size=buffer_size, **options)


def _columns(args, split) -> tuple[tuple[str, str | None], list[str]]:
    import datasets

    image_column, label_column = choose_columns(args, split.features)
    if label_column is None:
        return (image_column, None), []
    kind = split.features[label_column]
    if not isinstance(kind, datasets.ClassLabel):
        raise InputError(
            f"column {label_column!r} of {describe(args)} holds {kind}, of which a stream can't tell all classes; it "
            "must be a ClassLabel, or leave --streaming out"
        )
    return (image_column, label_column), list(kind.names)


def _undecoded(split, image_column: str):
    import datasets

    return split.cast_column(image_column, datasets.Image(decode=False))


def _size(split, name: str) -> int:
    known = (split.info.splits or {}).get(name)
    if known is not None and known.num_examples:
        return known.num_examples
    return sum(1 for _ in split)  # once, undecoded
