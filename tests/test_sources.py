"""Sources of pictures with sets of labels."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hwdiffusion import InputError
from hwdiffusion.arguments import DataArguments
from hwdiffusion.data import load_data, load_images


SETS = {
    "a.png": ["red cube"],
    "b.png": ["red cube", "blue sphere"],
    "c.png": ["blue sphere", "gray cylinder", "red cube"],
}
IDS = {"gray cylinder": 0, "red cube": 1, "blue sphere": 2}


def picture(path, value: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(path)
    return path.name


def arguments(folder, **options) -> DataArguments:
    args = DataArguments(train_data_dir=str(folder), resolution=[4], image_mode="L", **options)
    args.seed = 0
    return args


def sets_of(dataset) -> list[set[str]]:
    """The names of each picture, which is known by its brightness."""
    order = dataset.images[:, 0, 0, 0].argsort()
    return [{dataset.class_names[label] for label in row if label >= 0} for row in dataset.labels[order].tolist()]


def iclevr(folder, sets=SETS, ids=IDS, pictures="images", files=None):
    folder.mkdir(exist_ok=True)
    (folder / "objects.json").write_text(json.dumps(ids))
    (folder / "train.json").write_text(json.dumps(sets))
    for value, name in enumerate(sorted(files or sets)):
        picture(folder / pictures / name, value)
    return folder


def metadata(folder, sets=SETS, column="objects"):
    for value, name in enumerate(sorted(sets)):
        picture(folder / name, value)
    lines = [json.dumps({"file_name": name, "note": 3, column: names}) for name, names in sets.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("pictures", ["images", "."])
def test_a_folder_as_i_clevr_is_distributed(tmp_path, pictures):
    dataset = load_images(arguments(iclevr(tmp_path / "iclevr", pictures=pictures)))
    assert dataset.class_names == ["gray cylinder", "red cube", "blue sphere"]  # by their ids
    assert sets_of(dataset) == [set(names) for names in SETS.values()] and dataset.max_labels == 3


def test_a_folder_with_a_list_of_its_pictures(tmp_path):
    dataset = load_images(arguments(metadata(tmp_path / "pictures")))
    assert dataset.class_names == sorted(IDS)
    assert sets_of(dataset) == [set(names) for names in SETS.values()]
    single = metadata(tmp_path / "single", {"a.png": "cat", "b.png": "dog", "c.png": "cat"})
    assert sets_of(load_images(arguments(single, label_column="objects"))) == [{"cat"}, {"dog"}, {"cat"}]


def test_splits_with_lists_have_the_same_names_and_room(tmp_path):
    metadata(tmp_path / "train")
    metadata(tmp_path / "validation", {"x.png": ["gray cylinder"], "y.png": []})
    data = load_data(arguments(tmp_path))
    assert data.train.labels.shape == (3, 3) and data.validation.labels.shape == (2, 3)
    assert sets_of(data.validation) == [{"gray cylinder"}, set()]
    metadata(tmp_path / "validation", {"x.png": ["gray cilinder"], "y.png": []})
    with pytest.raises(
        InputError, match="gives x.png the unknown name 'gray cilinder'; the nearest .* 'gray cylinder'"
    ):
        load_data(arguments(tmp_path))


@pytest.mark.parametrize("kind", ["class labels", "names", "vectors"])
def test_a_column_of_lists(tmp_path, kind):
    names = sorted(IDS)
    column = {
        "class labels": (
            List(ClassLabel(names=names)),
            [[names.index(name) for name in row] for row in SETS.values()],
        ),
        "names": (List(Value("string")), list(SETS.values())),
        "vectors": (List(Value("int8")), [[int(name in row) for name in names] for row in SETS.values()]),
    }[kind]
    images = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in range(3)]
    features = Features({"image": ImageFeature(), "objects": column[0]})
    rows = {"image": images, "objects": column[1]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    chosen = {} if kind == "class labels" else {"label_column": "objects"}
    dataset = load_images(arguments(tmp_path / "data", **chosen))
    found = sets_of(dataset)
    if kind == "vectors":
        found = [{names[int(place)] for place in row} for row in found]
    assert found == [set(row) for row in SETS.values()]


def test_arrays_with_vectors_of_zeros_and_ones(tmp_path):
    images = np.stack([np.full((4, 4), value, dtype=np.uint8) for value in range(3)])
    vectors = np.array([[1, 0], [0, 0], [1, 1]], dtype=bool)
    np.savez(tmp_path / "a.npz", images=images, labels=vectors, class_names=np.array(["x", "y"]))
    assert sets_of(load_images(arguments(tmp_path / "a.npz"))) == [{"x"}, set(), {"x", "y"}]
    np.savez(tmp_path / "b.npz", images=images, labels=vectors.astype(int) * 2)
    with pytest.raises(InputError, match="must be 3 ids or rows of zeros and ones, not int64 .3, 2."):
        load_images(arguments(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    "build, said",
    [
        (
            lambda f: iclevr(f, {**SETS, "c.png": ["red cub"]}),
            "train.json gives c.png the unknown name 'red cub'; .* 'red",
        ),
        (lambda f: iclevr(f, {**SETS, "c.png": ["red cube"] * 2}), "gives c.png a name twice: red cube, red cube"),
        (lambda f: iclevr(f, files=["a.png"]), "names 2 pictures that aren't in .*images: b.png, c.png"),
        (
            lambda f: iclevr(f, files=[*SETS, "d.png", "e.png"]),
            "holds 2 pictures that .*train.json doesn't name: d.png, e",
        ),
        (
            lambda f: iclevr(f, ids={"red cube": 0, "blue sphere": 0}),
            "must give every name an id of its own, from 0 on",
        ),
        (lambda f: iclevr(f, sets={"a.png": "red cube"}), "must give every picture a list of names"),
        (lambda f: (iclevr(f) / "train.json").write_text("{"), "train.json can't be read as JSON"),
        (
            lambda f: (iclevr(f) / "objects.json").write_text("[]"),
            'objects.json must hold an object such as {"red cube": 0}, not a list',
        ),
        (lambda f: iclevr(f, ids={"red cube": "0", "blue sphere": 1}), "must give every name an id of its own"),
        (lambda f: iclevr(f, sets={"a.png": [["red cube"]]}), "must give every picture a list of names"),
        (
            lambda f: (iclevr(f) / "objects.json").unlink(),
            'holds train.json, as i-CLEVR does, but no objects.json, .* such as {"red cube": 0}; put it beside',
        ),
        (
            lambda f: (iclevr(f) / "train.json").unlink(),
            r'holds objects.json, as i-CLEVR does, but no train.json, .* such as {"a.png": \["red cube"\]}; put',
        ),
        (lambda f: metadata(iclevr(f)), "holds both a metadata.jsonl and i-CLEVR's objects.json or train.json; move"),
        (
            lambda f: (metadata(iclevr(f)) / "objects.json").unlink(),
            "holds both a metadata.jsonl and i-CLEVR's objects.json or train.json; move",
        ),
        (
            lambda f: iclevr(f, {"../x.png": ["red cube"]}),
            "train.json names ../x.png; it must be a path inside of .*pictures",
        ),
        (
            lambda f: metadata(f, {**SETS, "../x.png": ["red cube"]}),
            "metadata.jsonl names ../x.png; it must be a path inside of .*pictures, without '..'",
        ),
        (
            lambda f: metadata(f, {**SETS, str(f.parent / "x.png"): ["red cube"]}),
            "metadata.jsonl names /.*x.png; it must be a path inside of .*pictures",
        ),
        (
            lambda f: metadata(f, {**SETS, "c.png": "red cube, blue sphere"}),
            "line 3 of .*metadata.jsonl gives 'objects' one name, \"red cube, blue sphere\", but line 1 a list; give",
        ),
        (
            lambda f: metadata(f, {"a.png": "red cube", "b.png": ["red cube"]}),
            r"line 2 of .*metadata.jsonl gives 'objects' a list, .*, but line 1 one name; give every picture a list,",
        ),
        (
            lambda f: (metadata(f) / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.png"}'),
            "metadata.jsonl can't be read as UTF-8",
        ),
        (
            lambda f: metadata(f, {"a.png": 3}),
            "line 1 of .* has no column of names; its columns are file_name, note, obj",
        ),
        (lambda f: (metadata(f) / "metadata.jsonl").write_text("x\n"), "line 1 of .* is no JSON"),
        (
            lambda f: (metadata(f) / "metadata.jsonl").write_text('{"x": 1}'),
            "line 1 of .* must be an object with a `file",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_a_sentence(tmp_path, build, said):
    build(tmp_path / "pictures")
    with pytest.raises(InputError, match=said):
        load_images(arguments(tmp_path / "pictures"))


def test_a_picture_may_be_a_link_and_lie_in_a_sub_folder(tmp_path):
    picture(tmp_path / "elsewhere" / "x.png", 7)
    folder = metadata(tmp_path / "pictures", {"deep/a.png": ["red cube"]})
    (folder / "deep" / "a.png").unlink()
    (folder / "deep" / "a.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    assert load_images(arguments(folder)).images.unique().tolist() == [7]


@pytest.mark.parametrize("content", ['{"images": [{"id": 0}], "categories": []}', "[]", "{}", "no JSON"])
def test_another_train_json_beside_class_folders_is_none_of_ours(tmp_path, content):
    for name in ("cat", "dog"):
        picture(tmp_path / "pictures" / name / "a.png")
    (tmp_path / "pictures" / "train.json").write_text(content)
    assert load_images(arguments(tmp_path / "pictures")).class_names == ["cat", "dog"]


def test_a_picture_named_twice_or_a_column_that_is_not_there_is_refused(tmp_path):
    folder = metadata(tmp_path / "pictures")
    with pytest.raises(InputError, match="line 1 of .* has no names in 'kinds'"):
        load_images(arguments(folder, label_column="kinds"))
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "a.png", "objects": []}))
    with pytest.raises(InputError, match="line 4 of .* names a.png again"):
        load_images(arguments(folder))
