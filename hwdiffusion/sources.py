"""Every source of pictures and labels, split by split, not yet decoded.

There are the embedded digits and shapes, a data set of the Hub, a folder of parquet files, a folder with one
sub-folder a class, a folder of pictures without labels or with a list of theirs, arrays in an .npz file, and what a
function of the user's returns (`--dataset_name MODULE:NAME`): a dict of `Source`, one a split.
"""

import difflib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hwdiffusion import InputError
from hwdiffusion.places import is_here, load_own


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
NULL_LABEL = -1
EMBEDDED = {  # what `--dataset_name` names that needs no network: for a model card, what it is and its licence
    "digits": {
        "about": "The embedded digits, scikit-learn's copy of UCI's handwritten digits",
        "license": "cc-by-4.0",
    },
    "shapes": {"about": "The embedded shapes, pictures that hwdiffusion renders", "license": "apache-2.0"},
}
METADATA_FILE = "metadata.jsonl"  # as `datasets` has it
OBJECTS_FILE, LISTING_FILE = "objects.json", "train.json"  # as i-CLEVR has them


@dataclass
class Source:
    """A split before its pictures are decoded: `open(i)` gives picture i, `name(i)` what to call it in an error."""

    size: int
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray  # (N, T) ids, padded with -1; T = 0 without labels
    class_names: list[str]


def describe(args) -> str:
    return args.train_data_dir if args.train_data_dir is not None else f"data set {args.dataset_name}"


def read_sources(args) -> dict[str, Source]:
    """The splits of what the arguments name, with room for as many labels a picture in each."""
    sources = _read_sources(args)
    most = max(source.labels.shape[1] for source in sources.values())
    for source in sources.values():
        room = ((0, 0), (0, most - source.labels.shape[1]))
        source.labels = np.pad(source.labels, room, constant_values=NULL_LABEL)
    return sources


def _read_sources(args) -> dict[str, Source]:
    if args.train_data_dir is not None:
        folder = Path(args.train_data_dir)
        if folder.suffix == ".npz":
            return from_arrays(args, folder)
        if _is_iclevr(folder) or _has_metadata(folder):
            return from_lists(args, folder)
        if not folder.is_dir() and not (folder.suffix == ".parquet" and folder.is_file()):
            raise InputError(f"--train_data_dir {folder} is not a folder")
    elif args.dataset_name == "digits":
        return embedded_digits()
    elif args.dataset_name == "shapes":
        return embedded_shapes(args)
    elif ":" in args.dataset_name:
        return from_function(args)
    splits, train, validation = load_splits(args)
    if splits is None:
        return from_image_folder(args, Path(args.train_data_dir))
    return from_datasets(args, splits, train, validation)


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


def embedded_shapes(args) -> dict[str, Source]:
    """Rendered pictures with sets of labels, see `shapes.py`: 18,009 to train on, 2,001 held out."""
    from hwdiffusion import shapes

    if args.image_column or args.label_column:
        column = args.image_column or args.label_column
        raise InputError(f"the embedded shapes have no columns, so column {column!r} can't be chosen")
    size = (args.resolution[0], args.resolution[-1])

    def source_of(split: str) -> Source:
        count = shapes.SPLITS[split] * shapes.MOST
        # a few are rendered as they are asked for
        pictures = shapes.cached(split, size) if args.max_train_samples is None else None

        def open_one(index: int) -> Image.Image:
            return Image.fromarray(
                shapes.render(split, index, size) if pictures is None else np.asarray(pictures[index])
            )

        return Source(
            size=count,
            open=open_one,
            name=lambda index: f"picture {index} of the embedded shapes",
            labels=padded([shapes.label_set(split, index) for index in range(count)]),
            class_names=list(shapes.NAMES),
        )

    return {split: source_of(split) for split in shapes.SPLITS}


def from_function(args) -> dict[str, Source]:
    """What the function MODULE:NAME of the user's returns, which is called with the arguments."""
    try:
        sources = load_own(args.dataset_name)(args)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's module trips over
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--dataset_name {args.dataset_name} can't be loaded: {reason}") from error
    if not isinstance(sources, dict) or not sources or not all(isinstance(one, Source) for one in sources.values()):
        raise InputError(f"--dataset_name {args.dataset_name} must return a dict of `Source`, one a split")
    for split, source in sources.items():
        flaw = _flaw_of(source)
        if flaw is not None:
            raise InputError(f"--dataset_name {args.dataset_name}, split {split!r}: {flaw}")
    return sources


def _flaw_of(source: Source) -> str | None:
    """What is wrong with a source of the user's, in a few words."""
    labels, names = source.labels, source.class_names
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        return (
            f"labels must be an array (N, T) of whole numbers, not {getattr(labels, 'shape', type(labels).__name__)}"
        )
    if len(labels) != source.size:
        return f"there are {len(labels)} rows of labels for {source.size} pictures"
    if labels.size and not (labels.min() >= NULL_LABEL and labels.max() < len(names)):
        return f"labels must be in -1 to {len(names) - 1}, as there are {len(names)} class names"
    if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        return "class_names must be words, each once"
    return None


def padded(sets: list[list[int]]) -> np.ndarray:
    """Sets of ids as an array `(N, T)`, T the size of the largest, padded with -1."""
    labels = np.full((len(sets), max(map(len, sets), default=0)), NULL_LABEL, dtype=np.int64)
    for row, ids in enumerate(sets):
        labels[row, : len(ids)] = ids
    return labels


def from_lists(args, folder: Path) -> dict[str, Source]:
    """A folder whose pictures have sets of labels, which a file lists.

    As i-CLEVR is distributed: `objects.json`, every name's id, and `train.json`, every picture's names, beside the
    pictures or a sub-folder with them. Or as `datasets` has it: `metadata.jsonl`, a line a picture with its
    `file_name` and a column of names (in every line a list, or in every line one name), in the folder or in its
    sub-folders train, validation or test.
    """
    if not _has_metadata(folder):
        return {"train": _from_iclevr(folder)}
    if _is_iclevr(folder):
        raise InputError(
            f"{folder} holds both a {METADATA_FILE} and i-CLEVR's {OBJECTS_FILE} or {LISTING_FILE}; move away what "
            "the pictures are not to be labelled by"
        )
    places = {path.name: path for path in sorted(folder.iterdir()) if path.name in ("train", *VALIDATION_SPLITS)}
    places = {name: path for name, path in places.items() if (path / METADATA_FILE).is_file()} or {"train": folder}
    lists = {name: _read_metadata(args, place / METADATA_FILE) for name, place in places.items()}
    class_names = sorted({name for names in lists["train"].values() for name in names})
    return {
        name: _listed(places[name] / METADATA_FILE, places[name], entries, class_names)
        for name, entries in lists.items()
    }


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METADATA_FILE, f"train/{METADATA_FILE}"))


def _is_iclevr(folder: Path) -> bool:
    """Whether one of its two files is there; many a train.json holds something else than lists of names."""
    try:
        entries = json.loads((folder / LISTING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = None
    listed = isinstance(entries, dict) and bool(entries) and all(map(_is_list_of_names, entries.values()))
    return listed or (folder / OBJECTS_FILE).is_file()


def _from_iclevr(folder: Path) -> Source:
    for name, other, gives in (
        (OBJECTS_FILE, LISTING_FILE, 'every name its id, such as {"red cube": 0}'),
        (LISTING_FILE, OBJECTS_FILE, 'every picture its names, such as {"a.png": ["red cube"]}'),
    ):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} holds {other}, as i-CLEVR does, but no {name}, which gives {gives}; put it beside"
            )
    ids = read_json(folder / OBJECTS_FILE, {"red cube": 0})
    if not all(isinstance(value, int) for value in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise InputError(f"{folder / OBJECTS_FILE} must give every name an id of its own, from 0 on")
    entries = read_json(folder / LISTING_FILE, {"a.png": ["red cube"]})
    if not entries or not all(map(_is_list_of_names, entries.values())):
        raise InputError(f"{folder / LISTING_FILE} must give every picture a list of names")
    inside = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    where = next((path for path in inside if (path / next(iter(entries))).is_file()), folder)
    return _listed(folder / LISTING_FILE, where, entries, sorted(ids, key=ids.get))


def read_json(path: Path, example: dict | list, called: str | None = None):
    """What a JSON file holds, an object or a list as the example is one; `called` is what to call the file."""
    called, kinds = called or str(path), {dict: "an object", list: "a list"}
    if not path.is_file():
        raise InputError(f"{called} {'is a folder' if path.is_dir() else 'is not there'}; name a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{called} can't be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, type(example)):
        held = kinds.get(type(content), json.dumps(content)[:80])
        raise InputError(f"{called} must hold {kinds[type(example)]} such as {json.dumps(example)}, not {held}")
    return content


def _read_metadata(args, path: Path) -> dict[str, list[str]]:
    """Every picture's names, from lines with a `file_name` and a column of names."""
    entries, column, first = {}, args.label_column, None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(f"line {number} of {path} must be an object with a `file_name`")
        if column is None:
            column = next((key for key in row if key != "file_name" and _names_in(row[key]) is not None), None)
        names = None if column is None else _names_in(row.get(column))
        if names is None:
            wanted = "column of names" if column is None else f"names in {column!r}"
            raise InputError(f"line {number} of {path} has no {wanted}; its columns are {few(list(row))}")
        first = first or (number, isinstance(row[column], list))
        if isinstance(row[column], list) != first[1]:  # is the string one name, or several in one?
            before, here = ("a list", "one name") if first[1] else ("one name", "a list")
            raise InputError(
                f"line {number} of {path} gives {column!r} {here}, {json.dumps(row[column])[:80]}, but line "
                f"{first[0]} {before}; give every picture a list, or every picture one name"
            )
        if row["file_name"] in entries:
            raise InputError(f"line {number} of {path} names {row['file_name']} again")
        entries[row["file_name"]] = names
    if not entries:
        raise InputError(f"{path} names no pictures")
    return entries


def _names_in(value) -> list[str] | None:
    names = [value] if isinstance(value, str) else value
    return names if _is_list_of_names(names) else None


def _is_list_of_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _listed(listing: Path, folder: Path, entries: dict[str, list[str]], class_names: list[str]) -> Source:
    ids = {name: index for index, name in enumerate(class_names)}
    for picture, names in entries.items():
        if Path(picture).is_absolute() or ".." in Path(picture).parts:
            raise InputError(f"{listing} names {picture}; it must be a path inside of {folder}, without '..'")
        for name in names:
            if name not in ids:
                nearest = difflib.get_close_matches(str(name), class_names, n=1)
                hint = f"; the nearest known name is {nearest[0]!r}" if nearest else ""
                raise InputError(f"{listing} gives {picture} the unknown name {name!r}{hint}")
        if len(set(names)) < len(names):
            raise InputError(f"{listing} gives {picture} a name twice: {few(names)}; a set has each once")
    missing = [picture for picture in entries if not (folder / picture).is_file()]
    if missing:
        raise InputError(f"{listing} names {len(missing)} pictures that aren't in {folder}: {few(missing, 3)}")
    listed = {folder / picture for picture in entries}
    others = [path.name for path in _images_in(folder) if path not in listed]
    if others:
        raise InputError(f"{folder} holds {len(others)} pictures that {listing} doesn't name: {few(others, 3)}")
    paths = [folder / picture for picture in entries]
    return Source(
        size=len(paths),
        open=lambda index: Image.open(paths[index]),
        name=lambda index: str(paths[index]),
        labels=padded([[ids[name] for name in names] for names in entries.values()]),
        class_names=class_names,
    )


def from_arrays(args, path: Path) -> dict[str, Source]:
    """Arrays of an .npz file: `images`, uint8 `(N, H, W)` or `(N, H, W, C)`, and optionally `labels`, ids `(N,)` or
    sets of them as zeros and ones `(N, K)`, and `class_names`; `arr_0` and `arr_1`, as `numpy.savez` names what has no
    name, do for the first two."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} can't be read as an .npz file of arrays: {' '.join(str(error).split())}") from error
    images, labels = (
        arrays.get(name, arrays.get(other)) for name, other in (("images", "arr_0"), ("labels", "arr_1"))
    )
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (1,), (3,))
    ):
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise InputError(
            f"{path} must hold `images`, uint8 (N, H, W) or (N, H, W, 1 or 3), but holds {held or 'nothing'}"
        )
    if args.image_column or args.label_column:
        raise InputError(
            f"{path} has no columns, so column {(args.image_column or args.label_column)!r} can't be chosen"
        )
    class_names: list[str] = []
    if labels is not None and labels.ndim == 2:
        if len(labels) != len(images) or labels.dtype.kind not in "iub" or not np.isin(labels, (0, 1)).all():
            raise InputError(
                f"`labels` of {path} must be {len(images)} ids or rows of zeros and ones, not {labels.dtype} "
                f"{labels.shape}"
            )
        class_names = [str(name) for name in arrays.get("class_names", np.arange(labels.shape[1]))]
        if len(set(class_names)) < labels.shape[1] or len(class_names) != labels.shape[1]:
            raise InputError(f"`class_names` of {path} must be {labels.shape[1]} that differ, not {few(class_names)}")
        labels = padded([np.flatnonzero(row).tolist() for row in labels])
    elif labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
            least = f", the least {labels.min()}" if labels.size and labels.dtype.kind in "iu" else ""
            held = f"{labels.dtype} {labels.shape}{least}"
            raise InputError(f"`labels` of {path} must be {len(images)} ids from 0 on, not {held}")
        names = arrays.get("class_names", np.arange(labels.max(initial=-1) + 1))
        class_names = [str(name) for name in names]
        if len(set(class_names)) < len(class_names):
            raise InputError(f"`class_names` of {path} must differ, but are {few(class_names)}")
        if labels.max(initial=-1) >= len(class_names):
            raise InputError(
                f"`labels` of {path} go up to {labels.max()}, but there are {len(class_names)} class_names"
            )
        labels = labels.astype(np.int64)[:, None]
    source = Source(
        size=len(images),
        open=lambda index: Image.fromarray(images[index].squeeze(-1) if images.shape[3:] == (1,) else images[index]),
        name=lambda index: f"picture {index} of {path}",
        labels=np.zeros((len(images), 0), np.int64) if labels is None else labels,
        class_names=class_names,
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
                f"pictures ({few(classes)}); if train is a class, rename it"
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


def load_splits(args, streaming: bool = False):
    """The splits of a data set of the Hub, or of parquet files, by the `datasets` library.

    Returns:
        The splits, and the names of those to train on and for validation, or `None` where there is none of its own;
        three times `None` if the arguments name something else.

    Raises:
        InputError: it can't be loaded.
    """
    import datasets

    folder = None if args.train_data_dir is None else Path(args.train_data_dir)
    if folder is None:
        is_here(args.dataset_name, "--dataset_name")
        path, options = args.dataset_name, {"name": args.dataset_config_name}
    elif folder.suffix == ".parquet" and folder.is_file():
        path, options = "parquet", {"data_files": str(folder)}
    elif folder.is_dir() and any(folder.rglob("*.parquet")):
        path, options = "parquet", {"data_dir": str(folder)}
    else:
        path, options = None, {}
    if path in (None, "digits"):
        return None, None, None
    try:
        splits = datasets.load_dataset(path, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{describe(args)} can't be loaded: {reason}") from error
    train = "train" if "train" in splits else next(iter(splits))
    return splits, train, next((name for name in VALIDATION_SPLITS if name in splits and name != train), None)


def from_datasets(args, splits: dict, train: str, validation: str | None) -> dict[str, Source]:
    """Splits of the `datasets` library."""
    class_names: list[str | int] | None = None  # the training split decides
    sources = {}
    for name in (train, validation):
        if name is not None:
            sources[name], class_names = _from_split(args, name, splits[name], class_names)
    return sources


def choose_columns(args, features: dict) -> tuple[str, str | None]:
    """The names of the image column and of the label column, if there is one.

    Raises:
        InputError: there is no image column, or not the one that was asked for.
    """
    import datasets

    def choose(wanted: str | None, kind: str, fitting: list[str]) -> str | None:
        if wanted is None:
            return fitting[0] if fitting else None
        if wanted not in features:
            raise InputError(
                f"{describe(args)} has no {kind} column {wanted!r}; its columns are {', '.join(features)}"
            )
        return wanted

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image_column = choose(args.image_column, "image", images)
    if image_column is None:
        raise InputError(f"{describe(args)} has no image column; its columns are {', '.join(features)}")
    lists = (datasets.List, datasets.LargeList)
    classes = [
        name
        for name, kind in features.items()
        if isinstance(kind.feature if isinstance(kind, lists) else kind, datasets.ClassLabel)
    ]
    return image_column, choose(args.label_column, "label", classes)


def open_stored(stored: dict | None) -> Image.Image:
    """A picture as an undecoded `datasets.Image` column holds it."""
    if stored is None:
        raise OSError("there is no picture")
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


def _from_split(args, split_name: str, split, class_names: list | None) -> tuple[Source, list]:
    import datasets

    image_column, label_column = choose_columns(args, split.features)
    if not isinstance(split.features[image_column], datasets.Image):
        split = _cast_to_images(args, split, image_column)
    encoded = split.cast_column(image_column, datasets.Image(decode=False))
    pictures = encoded.select_columns([image_column])

    labels = np.zeros((len(split), 0), dtype=np.int64)
    if label_column is not None:
        labels, class_names = _class_labels(args, split_name, split, label_column, class_names)
    source = Source(
        size=len(split),
        open=lambda index: open_stored(pictures[index][image_column]),
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
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        return _label_sets(args, split_name, kind.feature, column, values, class_names)
    if isinstance(kind, datasets.ClassLabel):
        labels = [NULL_LABEL if value is None else value for value in values]
        class_names = kind.names
        allowed = f"the ids 0 to {len(class_names) - 1} ({few(class_names)})"
    elif all(isinstance(value, (int, str, type(None))) for value in values):
        class_names = class_names or sorted({value for value in values if value is not None})  # numbers by their size
        ids = {name: index for index, name in enumerate(class_names)}
        labels = [ids.get(value, NULL_LABEL) for value in values]
        allowed = few(class_names)
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


def _label_sets(args, split_name: str, kind, column: str, values: list, class_names: list | None):
    """Sets of labels from a column of lists: of class labels, of names, or, all of one length, of zeros and ones."""
    import datasets

    rows = [[] if value is None else value for value in values]
    where = f"of split {split_name} of {describe(args)}"
    entries = {type(entry) for row in rows for entry in row}
    if isinstance(kind, datasets.ClassLabel):
        class_names, sets = kind.names, rows
    elif entries <= {str}:
        class_names = class_names or sorted({name for row in rows for name in row})
        ids = {name: index for index, name in enumerate(class_names)}
        sets = [[ids.get(name, NULL_LABEL) for name in row] for row in rows]
    elif (
        entries <= {int, bool} and len({len(row) for row in rows}) == 1 and {n for row in rows for n in row} <= {0, 1}
    ):
        class_names = class_names or list(map(str, range(len(rows[0]))))
        sets = [[index for index, present in enumerate(row) if present] for row in rows]
    else:
        raise InputError(
            f"column {column!r} of {describe(args)} holds lists of {kind}; they must be class labels, names, or "
            "vectors of zeros and ones, all of one length"
        )
    for place, ids in enumerate(sets):
        if len(set(ids)) < len(ids):
            raise InputError(f"row {place} {where} has a label twice, in {values[place]}; a set has each once")
        if not all(0 <= label < len(class_names) for label in ids):
            raise InputError(f"row {place} {where} has the labels {values[place]}; allowed are {few(class_names)}")
    return padded(sets), class_names


def read_image(source: Source, index: int, decode: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """One decoded picture.

    Raises:
        InputError: it can't be read; it is named.
    """
    try:
        return decode(source.open(index))
    except MemoryError:
        raise
    except Exception as error:  # broken EXIF alone raises half a dozen kinds
        raise InputError(
            f"{source.name(index)} can't be read as a picture ({type(error).__name__}); mend or remove it, or give "
            "--skip_bad_images"
        ) from error


def few(names: list, count: int = 10) -> str:
    return ", ".join(map(str, names[:count])) + (", …" if len(names) > count else "")
