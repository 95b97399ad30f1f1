import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hwdiffusion import InputError
from hwdiffusion.arguments import DataArguments
from hwdiffusion.data import decoder, flip, load_data, to_model_range


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """`datasets` keeps what it read; a test must not find what another run left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def arguments(folder=None, seed: int = 0, **options) -> DataArguments:
    options = {"resolution": [8], "image_mode": "L", **options}
    args = DataArguments(train_data_dir=None if folder is None else str(folder), **options)
    args.seed = seed  # a flag of the machine, which load_data reads too
    return args


def picture(seed: int, mode: str = "L", size: tuple[int, int] = (8, 8)) -> Image.Image:
    bands = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *bands), dtype=np.uint8)
    return Image.fromarray(values, mode)


def save_pictures(folder: Path, count: int, first_seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        picture(seed).save(folder / f"{seed:03}.png")
    return folder


def array(image: Image.Image) -> np.ndarray:
    """What PIL says of a picture, as uint8 `(C, H, W)`."""
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def names_of(dataset) -> list[str]:
    return [dataset.source.name(int(index)) for index in dataset.indices]


def check_folder(dataset, labelled: bool):
    """Every picture is what PIL reads from the file of its name, with the label of the file's folder."""
    images, labels = dataset[range(len(dataset))]
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    for image, label, name in zip(images, labels, names_of(dataset)):
        with Image.open(name) as expected:
            assert np.array_equal(image.numpy(), array(expected.convert("L")))
        assert [dataset.class_names[index] for index in label] == ([Path(name).parent.name] if labelled else [])


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def test_the_embedded_digits_are_all_there_once_as_scikit_learn_has_them():
    data = load_data(arguments(dataset_name="digits"))
    assert sorted([*data.train.indices, *data.validation.indices]) == list(range(1797))
    assert len(data.validation) == 180
    digits = load_digits()
    for dataset in (data.train, data.validation):
        images, labels = dataset[range(len(dataset))]
        assert torch.equal(labels[:, 0], torch.from_numpy(digits.target[dataset.indices]).long())
        # 17 gray levels over the range of a byte
        assert np.array_equal((images[:, 0].numpy() / (255 / 16)).round(), digits.images[dataset.indices])
        assert images.min() == 0 and images.max() == 255
    assert data.id2label == {digit: str(digit) for digit in range(10)}


def test_the_split_depends_on_the_seed_alone():
    first, again, other = (load_data(arguments(dataset_name="digits", seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.validation.indices, again.validation.indices)
    assert not np.array_equal(first.validation.indices, other.validation.indices)


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "lazy"])
def test_class_folders(tmp_path, memory):
    for place, name in enumerate(("cat", "wild dog")):
        save_pictures(tmp_path / name, 6, 10 * place)
    save_pictures(tmp_path / ".hidden", 2)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    data = load_data(arguments(tmp_path, validation_fraction=0.25, image_memory_gb=memory))
    assert data.id2label == {0: "cat", 1: "wild dog"}
    check_folder(data.train, labelled=True)
    check_folder(data.validation, labelled=True)
    files = sorted(str(path) for path in tmp_path.glob("[cw]*/*.png"))
    assert sorted(names_of(data.train) + names_of(data.validation)) == files


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_train_and_validation_folders(tmp_path, validation):
    for place, name in enumerate(("a", "b", "c")):
        save_pictures(tmp_path / "train" / name, 3, 10 * place)
    for place, name in enumerate(("b", "c")):  # a validation split may lack a class
        save_pictures(tmp_path / validation / name, 2, 100 + 10 * place)
    data = load_data(arguments(tmp_path))
    check_folder(data.train, labelled=True)
    check_folder(data.validation, labelled=True)
    assert {Path(name).parents[1].name for name in names_of(data.train)} == {"train"}
    assert {Path(name).parents[1].name for name in names_of(data.validation)} == {validation}
    assert (len(data.train), len(data.validation)) == (9, 4)


def test_a_folder_of_pictures_without_labels(tmp_path):
    save_pictures(tmp_path, 10)
    data = load_data(arguments(tmp_path, validation_fraction=0.2))
    check_folder(data.train, labelled=False)
    check_folder(data.validation, labelled=False)
    assert (len(data.train), len(data.validation), data.max_labels, data.id2label) == (8, 2, 0, {})


def write_parquet(folder: Path, labels: list, kind, split: str = "train", columns=("image", "label"), seed: int = 0):
    folder.mkdir(exist_ok=True)
    pictures = [picture(seed + place) for place in range(len(labels))]
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: kind})
    table = datasets.Dataset.from_dict({columns[0]: pictures, columns[1]: labels}, features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return pictures


@pytest.mark.parametrize(
    "labels, kind, columns, chosen",
    [
        ([1, 0, 2, 1, 0], datasets.ClassLabel(names=["cat", "dog", "fox"]), ("image", "label"), {}),
        (
            ["dog", "cat", "fox", "dog", "cat"],
            datasets.Value("string"),
            ("image", "label"),
            {"label_column": "label"},
        ),
        ([7, 3, 5, 7, 3], datasets.Value("int64"), ("image", "label"), {"label_column": "label"}),
        ([1, 0, 2, 1, 0], datasets.ClassLabel(names=["cat", "dog", "fox"]), ("scan", "kind"), {}),
        (
            ["dog", "cat", "fox", "dog", "cat"],
            datasets.Value("string"),
            ("scan", "kind"),
            {"image_column": "scan", "label_column": "kind"},
        ),
    ],
    ids=["ClassLabel", "strings", "ints", "other columns", "chosen columns"],
)
@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "lazy"])
def test_parquet_files(tmp_path, labels, kind, columns, chosen, memory):
    stored = {
        split: write_parquet(tmp_path / "data", labels, kind, split, columns, seed)
        for split, seed in (("train", 0), ("test", 50))
    }
    data = load_data(arguments(tmp_path / "data", image_memory_gb=memory, **chosen))
    names = [kind.names[label] for label in labels] if isinstance(kind, datasets.ClassLabel) else map(str, labels)
    names = list(names)
    for dataset, pictures in ((data.train, stored["train"]), (data.validation, stored["test"])):
        images, ids = dataset[range(len(labels))]
        assert np.array_equal(images.numpy(), np.stack([array(image) for image in pictures]))
        assert [dataset.class_names[label] for label in ids[:, 0]] == names


def test_a_column_without_class_labels_is_taken_when_it_is_named_only(tmp_path):
    write_parquet(tmp_path / "data", ["a", "b"] * 5, datasets.Value("string"))
    assert load_data(arguments(tmp_path / "data")).max_labels == 0
    assert load_data(arguments(tmp_path / "data", label_column="label")).max_labels == 1


def test_mnist_is_read_bit_for_bit():
    root = os.environ.get("HWDIFFUSION_DATA")
    if not root or not Path(root, "mnist").is_dir():
        pytest.skip("HWDIFFUSION_DATA names no folder with mnist/ in it")
    data = load_data(arguments(Path(root, "mnist"), resolution=[28], image_memory_gb=0))
    assert (len(data.train), len(data.validation)) == (60000, 10000)
    for dataset, split in ((data.train, "train"), (data.validation, "test")):
        (file,) = Path(root, "mnist").glob(f"{split}-*.parquet")
        table = pyarrow.parquet.read_table(file)
        rows = [0, 1, 4321, len(dataset) - 1]
        images, labels = dataset[rows]
        for image, label, row in zip(images, labels, rows):
            stored = Image.open(io.BytesIO(table["image"][row]["bytes"].as_py()))
            assert (stored.mode, stored.size) == ("L", (28, 28))
            assert np.array_equal(image.numpy(), array(stored))
            assert dataset.class_names[label] == str(table["label"][row].as_py())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def store(image: Image.Image, suffix: str = "png", **options) -> Image.Image:
    """The picture as it comes out of a file."""
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("declared", ["L", "RGB"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_any_mode_come_out_as_declared(mode, declared):
    if mode in ("1", "P"):
        image = picture(0, "RGB", (6, 4)).convert(mode)
    else:
        image = picture(0, mode, (6, 4))
    stored = store(image, "tiff" if mode == "CMYK" else "png")
    assert stored.mode == mode
    decoded = decoder(declared, (4, 6), center_crop=True)(stored)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, array(image.convert(declared)))


@pytest.mark.parametrize("declared, channels", [("L", 1), ("RGB", 3)])
def test_16_bit_gray_keeps_its_range(declared, channels):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    stored = store(Image.fromarray(values.astype(np.uint16) * 257))
    assert stored.mode.startswith("I")
    assert np.array_equal(decoder(declared, (16, 16), True)(stored), np.stack([values] * channels))


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda image: image),
        (2, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        (3, lambda image: image.rotate(180)),
        (6, lambda image: image.rotate(-90, expand=True)),
        (8, lambda image: image.rotate(90, expand=True)),
    ],
)
def test_the_rotation_that_a_camera_notes_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(0, "RGB", (6, 4))
    expected = array(upright(image))
    assert np.array_equal(decoder("RGB", expected.shape[1:], True)(store(image, exif=exif)), expected)


def test_center_crop_keeps_the_aspect_and_its_absence_the_margins():
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (4, 0, 12, 8))  # a white square in the centre
    cropped, squeezed = (decoder("L", (8, 8), center_crop)(image) for center_crop in (True, False))
    assert cropped.shape == squeezed.shape == (1, 8, 8)
    assert cropped.min() == 255
    assert squeezed[0, :, [0, 7]].max() == 0 and squeezed[0, :, 3:5].min() == 255


def test_resolution_is_height_and_width(tmp_path):
    save_pictures(tmp_path, 10)
    images, _ = load_data(arguments(tmp_path, resolution=[4, 12])).train[[0]]
    assert images.shape == (1, 1, 4, 12)


def test_bytes_survive_the_way_to_the_models_range_and_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scaled = to_model_range(images)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), images)


def test_flip_mirrors_the_chosen_pictures_only():
    images = torch.arange(2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    flipped = flip(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0, :, :, [4, 3, 2, 1, 0]])
    assert torch.equal(flipped[1], images[1])
    assert torch.equal(flip(flipped, torch.tensor([True, False])), images)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_read_lazily_are_those_kept_in_memory():
    kept, lazy = (load_data(arguments(dataset_name="digits", image_memory_gb=size)) for size in (4, 0))
    assert kept.train.images is not None and lazy.train.images is None
    order = [5, 1600, 0, 5]
    for ours, theirs in zip(kept.train[order], lazy.train[order]):
        assert torch.equal(ours, theirs)


def test_a_data_loader_gets_whole_batches():
    dataset = load_data(arguments(dataset_name="digits", max_train_samples=10)).train
    batches = torch.utils.data.DataLoader(dataset, batch_sampler=[[3, 1], [9, 0, 4]], collate_fn=lambda batch: batch)
    for (images, labels), order in zip(batches, ([3, 1], [9, 0, 4])):
        assert torch.equal(images, dataset.images[order]) and torch.equal(labels, dataset.labels[order])


def test_max_train_samples_takes_pictures_of_all_classes(tmp_path):
    every, some = (load_data(arguments(dataset_name="digits", max_train_samples=count)) for count in (None, 60))
    assert len(set(some.train.indices)) == 60 and set(some.train.indices) <= set(every.train.indices)
    assert np.array_equal(some.validation.indices, every.validation.indices)
    for label in ("a", "b"):  # files come sorted by class
        for index in range(20):
            path = tmp_path / label / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (8, 8)).save(path)
    assert set(load_data(arguments(tmp_path, max_train_samples=10)).train.labels.flatten().tolist()) == {0, 1}


def test_a_stand_in_for_a_lazily_read_bad_picture_has_its_own_label(tmp_path):
    for label, gray in (("a", 0), ("b", 255)):
        (tmp_path / label).mkdir()
        for index in range(10):
            Image.new("L", (8, 8), gray).save(tmp_path / label / f"{index}.png")
    for index in range(5, 10):
        (tmp_path / "a" / f"{index}.png").write_bytes(b"broken")
    options = {"image_memory_gb": 0, "skip_bad_images": True, "image_mode": "L"}
    train = load_data(arguments(tmp_path, resolution=[8], **options)).train
    images, labels = train[range(len(train))]
    assert torch.equal(images.amax(dim=(1, 2, 3)) > 0, labels[:, 0] == 1)


def test_a_class_that_only_held_out_pictures_have_is_told_from_one_without_pictures(tmp_path):
    path, images = tmp_path / "some.npz", np.zeros((20, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=[0] * 19 + [1], class_names=["cat", "dog"])
    said = set()
    for seed in range(40):  # of 20 pictures 2 are held out
        try:
            load_data(arguments(path, seed=seed))
        except InputError as error:
            said.add(str(error))
    assert said == {
        f"class 'dog' of {path} has no pictures to train on, but 1 held out for validation; add more, or give another "
        "--validation_fraction or --seed"
    }
    np.savez(path, images=images, labels=[0] * 20, class_names=["cat", "dog"])
    with pytest.raises(InputError, match="class 'dog' .* has no pictures to train on; remove it or fill it"):
        load_data(arguments(path))
    kind = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(tmp_path / "data", [0, 0], kind)
    write_parquet(tmp_path / "data", [0, 1, 1], kind, split="validation")
    with pytest.raises(InputError, match="class 'dog' .* no pictures to train on, but 2 in the validation split; mo"):
        load_data(arguments(tmp_path / "data"))


def test_labels_without_names_mean_the_same_in_every_split(tmp_path):
    def write(split, labels):
        rows = {"image": [Image.new("L", (8, 8))] * len(labels), "kind": labels}
        features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")

    write("train", list(range(12)))
    write("validation", [2, 11])
    write("test", [-1, -1])  # hidden, and not used
    data = load_data(arguments(tmp_path, label_column="kind"))
    assert data.id2label == {label: str(label) for label in range(12)}
    assert data.validation.labels.flatten().tolist() == [2, 11]


def test_a_column_without_images_is_refused(tmp_path):
    rows = {"image": [Image.new("L", (8, 8))] * 3, "number": [1, 2, 3]}
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="column 'number' .* not images"):
        load_data(arguments(tmp_path, image_column="number"))


def test_bad_pictures_are_skipped_and_counted_and_the_others_keep_their_labels(tmp_path):
    for label in range(3):
        (tmp_path / str(label)).mkdir()
        for place in range(6):
            Image.new("L", (8, 8), 100 * label).save(tmp_path / str(label) / f"{place}.png")
    for name in ("0/5.png", "1/0.png", "1/1.png"):
        (tmp_path / name).write_bytes(b"no picture")
    data = load_data(arguments(tmp_path, skip_bad_images=True, validation_fraction=0.2))
    assert data.skipped == 3
    assert len(data.train) + len(data.validation) == 15
    for dataset in (data.train, data.validation):
        images, labels = dataset[range(len(dataset))]
        assert torch.equal(images[:, 0, 0, 0].long(), 100 * labels[:, 0])
        assert len(dataset.indices) == len(images)


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "lazy"])
def test_a_folder_of_bad_pictures_only_is_refused_although_they_are_skipped(tmp_path, memory):
    for place in range(10):
        (tmp_path / f"{place}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="can('t)? be read"):
        load_data(arguments(tmp_path, skip_bad_images=True, image_memory_gb=memory)).train[[0]]


# ---------------------------------------------------------------------------------------------------------------------
# What can't be used
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "lazy"])
@pytest.mark.parametrize("suffix, format", [("jpg", "jpeg"), ("png", "png"), ("webp", "webp"), ("gif", "gif")])
def test_a_truncated_picture_is_named(tmp_path, suffix, format, memory):
    save_pictures(tmp_path, 9)
    buffer = io.BytesIO()
    picture(0, "RGB", (32, 32)).save(buffer, format)
    for share in (0.05, 0.5, 0.9):
        (tmp_path / f"torn.{suffix}").write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        with pytest.raises(InputError, match=rf"torn\.{suffix}.*skip_bad_images"):
            data = load_data(arguments(tmp_path, image_memory_gb=memory))
            data.train[range(len(data.train))]
            data.validation[range(len(data.validation))]


def empty_class(folder: Path):
    save_pictures(folder / "cat", 5)
    (folder / "dog").mkdir()


def class_and_loose_pictures(folder: Path):
    save_pictures(folder / "cat", 5)
    picture(0).save(folder / "stray.png")


def class_without_training_pictures(folder: Path):
    save_pictures(folder / "train" / "cat", 5)
    save_pictures(folder / "val" / "cat", 5)
    save_pictures(folder / "val" / "lynx", 5)


def unnamed_label(folder: Path):
    kind = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(folder, [0, 1, 0, -1, 1], kind)


def missing_label(folder: Path):
    write_parquet(folder, ["cat", "dog", None], datasets.Value("string"))


def broken_parquet(folder: Path):
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no table")


def text_only(folder: Path):
    table = datasets.Dataset.from_dict({"caption": ["a", "b"], "kind": [0, 1]})
    table.to_parquet(folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize(
    "build, options, said",
    [
        (lambda folder: None, {}, "no images found in .*data"),
        (empty_class, {}, "dog holds no images"),
        (class_and_loose_pictures, {}, r"stray\.png"),
        (class_without_training_pictures, {}, "'lynx'.*'cat'"),
        (lambda folder: save_pictures(folder, 1), {}, "1 pictures, too few"),
        (lambda folder: save_pictures(folder, 5), {"label_column": "kind"}, "folder of pictures.*'kind'"),
        (
            lambda folder: write_parquet(folder, [0, 1], datasets.Value("int64")),
            {"image_column": "scan"},
            "no image column 'scan'; its columns are image, label",
        ),
        (
            lambda folder: write_parquet(folder, [0, 1], datasets.Value("int64")),
            {"label_column": "kind"},
            "no label column 'kind'; its columns are image, label",
        ),
        (
            lambda folder: write_parquet(folder, [0, 1], datasets.Value("int64")),
            {"label_column": "image"},
            "column 'image' .* holds Image.*not one label",
        ),
        (text_only, {}, "no image column; its columns are caption, kind"),
        (unnamed_label, {}, "row 3 .* label -1; allowed are the ids 0 to 1 "),
        (missing_label, {"label_column": "label"}, "row 2 "),
        (broken_parquet, {}, "data can't be loaded"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_a_sentence_that_names_it(tmp_path, build, options, said):
    folder = tmp_path / "data"
    folder.mkdir()
    build(folder)
    with pytest.raises(InputError, match=said):
        load_data(arguments(folder, **options))


@pytest.mark.parametrize("name", ["gone", "picture.png"])
def test_a_folder_that_is_none_is_refused(tmp_path, name):
    picture(0).save(tmp_path / "picture.png")
    with pytest.raises(InputError, match=f"{name} is not a folder"):
        load_data(arguments(tmp_path / name))


def test_a_path_given_as_a_data_set_is_not_looked_for_on_the_hub(tmp_path):
    args = arguments()
    args.dataset_name = str(tmp_path / "gone")
    with pytest.raises(InputError, match="^--dataset_name .*gone can't be loaded: there is no such file or folder$"):
        load_data(args)
