"""Sets of labels from end to end: which are drawn, a classifier of them, `hwdiffusion evaluate --label_sets`."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, TOKENS
from PIL import Image
from running import TINY_PRESET, write_preset
from tiny import make_pipeline
from transformers import ResNetForImageClassification

from hwdiffusion import InputError, cli
from hwdiffusion.arguments import EvaluationArguments
from hwdiffusion.data import load_images
from hwdiffusion.extractors import load_extractor
from hwdiffusion.label_sets import every_label, labels_in_turn, names_of, read_label_sets, sets_to_draw
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.reference import data_arguments
from hwdiffusion.samples import Samples
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_ldm


pytestmark = pytest.mark.xdist_group("label_sets")  # they share a classifier
NAMES = ["upper left", "upper right", "lower left", "lower right"]  # the quarters of a picture that are bright


def quarters(names, random) -> Image.Image:
    pixels = random.integers(0, 60, (8, 8), dtype=np.uint8)
    for name in names:
        down, right = (4 * (word in ("lower", "right")) for word in name.split())
        pixels[down : down + 4, right : right + 4] += 150
    return Image.fromarray(pixels)


def write_pictures(folder, count: int, seed: int):
    """Pictures of one to three bright quarters, listed as i-CLEVR's are."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    sets = {f"{n:03d}.png": list(random.permutation(NAMES)[: n % 3 + 1]) for n in range(count)}
    for file, names in sets.items():
        quarters(names, random).save(folder / "images" / file)
    (folder / "objects.json").write_text(json.dumps({name: place for place, name in enumerate(NAMES)}))
    (folder / "train.json").write_text(json.dumps(sets))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, a classifier that was trained on them, and a hardly trained generator of them."""
    folder = tmp_path_factory.mktemp("sets")
    write_pictures(folder / "real", 300, seed=0)
    data = ["--train_data_dir", str(folder / "real"), "--resolution", "8", "--image_mode", "L"]
    preset = {**TINY_PRESET, "unet": {**TINY_UNET, **TOKENS}, "resolution": 8}
    preset = {key: value for key, value in preset.items() if key not in ("dataset_name", "max_train_samples")}
    preset |= {"max_train_steps": 3, "random_flip": False}  # which would make "left" of "right"
    path = write_preset(folder / "tiny.yaml", preset)
    argv = ["--preset", path, *data, "--max_train_steps", "150", "--random_shift", "0", "--random_rotation", "0"]
    assert train_classifier.main([*argv, "--output_dir", str(folder / "classifier")]) == 0
    argv = ["--preset", path, *data, "--sample_steps", "3", "--single_label_dropout", "0.2"]
    assert train_ddpm.main([*argv, "--output_dir", str(folder / "run")]) == 0
    (folder / "test.json").write_text(
        json.dumps([["upper left"], "lower left", ["lower right", "upper left"], NAMES[:3]])
    )
    return folder


def evaluate(world, *flags, output="evaluation", code=0) -> dict:
    argv = ["evaluate", *map(str, flags), "--output_dir", str(world / output)]
    assert cli.main([*argv, "--classifier", str(world / "classifier")]) == code
    return json.loads((world / output / "evaluation.json").read_text()) if code == 0 else {}


# -- which sets are drawn ---------------------------------------------------------------------------------------------


def test_a_model_of_single_labels_draws_each_in_turn():
    pipe = make_pipeline("pixel")
    assert labels_in_turn(sets_to_draw(pipe, None), 2, 5).tolist() == [[2], [0], [1]]
    assert labels_in_turn(every_label(make_pipeline("unconditional")), 0, 3) is None


def test_a_model_of_sets_draws_those_of_the_held_out_pictures(tmp_path):
    held_out = load_images(data_arguments(str(write_pictures(tmp_path / "a", 30, seed=3)), [8, 8], "L"))
    pipe = make_pipeline("tokens", max_labels=3, id2label={0: "lower right", 1: "upper left", 2: "lower left"})
    sets = sets_to_draw(pipe, held_out)
    drawn = sorted(sorted(names_of(ids, list(pipe.id2label.values()))) for ids in sets)
    theirs = [names_of(ids, held_out.class_names) for ids in held_out.labels]
    known = sorted(sorted(names) for names in theirs if "upper right" not in names)
    assert drawn == known and 5 < len(known) < 30  # a set with what the model doesn't know is left out
    held_out.labels[0] = torch.tensor([-1, 3, -1])  # in whatever slot
    small = make_pipeline("tokens", max_labels=2, id2label=pipe.id2label)
    theirs = [names_of(ids, held_out.class_names) for ids in held_out.labels]
    fitting = [names for names in theirs if "upper right" not in names and len(names) <= 2]
    sets = sets_to_draw(small, held_out)
    assert sets.shape == (len(fitting), 2) and (sets[:, 0] >= 0).all()  # nor what is larger than it takes
    assert (0, -1) in {tuple(row) for row in sets.tolist()}
    without = load_images(data_arguments("digits", [8, 8], "L"))  # none of whose labels the model knows
    assert sets_to_draw(pipe, without).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    "content, said",
    [
        ("[[", "can't be read as JSON"),
        ('{"a.png": ["dog"]}', r'--label_sets .* must hold a list such as \[\["red cube", .*\]\], not an object'),
        ('"dog"', 'must hold a list such as .*, not "dog"'),
        ("[]", "must list at least one set of names"),
        ('[["dog"], []]', r"set 1 of .* must be a list of at least one name, not \[\]"),
        ('[["dog"], [3]]', r"set 1 of .* must be a list of at least one name, not \[3\]"),
        ('[["dog"], ["wid"]]', "set 1 of .*: unknown label 'wid'; the nearest known one is 'wild'"),
        ('["dog", ["dog", "cat", "wild"]]', "set 1 of .*: it holds 3 labels, but this model takes at most 2"),
        ('[["dog", "dog"]]', "set 0 of .*: it holds 'dog' twice"),
    ],
)
def test_a_file_of_sets_that_does_not_fit_is_refused(tmp_path, content, said):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_label_sets(str(tmp_path / "test.json"), make_pipeline("tokens", max_labels=2))


def test_a_file_of_sets_needs_a_run_with_labels(world, tmp_path, capsys):
    with pytest.raises(InputError, match="needs a pipeline with labels"):
        read_label_sets(str(world / "test.json"), make_pipeline("unconditional"))
    with pytest.raises(InputError, match="--label_sets .*none.json is not there; name a JSON file"):
        read_label_sets(str(tmp_path / "none.json"), make_pipeline("tokens"))
    with pytest.raises(InputError, match="--label_sets .* is a folder; name a JSON file"):
        read_label_sets(str(tmp_path), make_pipeline("tokens"))
    argv = ["evaluate", "--images", "x", "--resolution", "8", "--label_sets", "y"]
    assert cli.main(argv) == 2 and "--label_sets is what a run draws" in capsys.readouterr().err
    with pytest.raises(InputError, match="is a file; name a folder of train_classifier.py"):
        load_extractor("classifier", str(world / "test.json"))
    argv = ["evaluate", "x", "--label_sets", "y", "--num_samples", "8"]
    assert cli.main(argv) == 2 and "leave --num_samples out" in capsys.readouterr().err
    assert cli.main(["sweep", "x", "--num-seeds=8"]) == 2 and "give --num_samples" in capsys.readouterr().err


# -- the classifier ---------------------------------------------------------------------------------------------------


def test_a_classifier_of_sets_is_a_stock_one_of_many_labels(world):
    model = ResNetForImageClassification.from_pretrained(world / "classifier")
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[k] for k in range(4)] == NAMES
    assert model.config.test_accuracy > 0.95
    lines = [json.loads(line) for line in (world / "classifier" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] > 0.95 and lines[-1]["loss"] < lines[0]["loss"] / 2


def test_unseen_pictures_of_sets_are_judged_by_every_label(world, tmp_path):
    """Of a perfect generator nearly all is found; where the opposite quarters are asked for, nearly nothing."""
    write_pictures(tmp_path / "other", 120, seed=1)
    flags = ["--images", tmp_path / "other", "--reference", world / "real", "--resolution", 8, "--image_mode", "L"]
    labels = evaluate(world, *flags, "--metrics", "labels", output="perfect")["labels"]
    assert labels["accuracy"] > 0.95 and labels["n"] == 40 * (1 + 2 + 3)
    assert {size: one["n"] for size, one in labels["by_size"].items()} == {"1": 40, "2": 80, "3": 120}
    assert labels["whole_sets"] > 0.9
    assert [of["values"] for of in labels["attributes"]] == [["upper", "lower"], ["left", "right"]]
    assert min(of["accuracy"] for of in labels["attributes"]) > 0.95
    assert (world / "perfect" / "confusion.png").is_file()
    sets = json.loads((tmp_path / "other" / "train.json").read_text())
    others = {file: [name for name in NAMES if name not in names][: len(names)] for file, names in sets.items()}
    (tmp_path / "other" / "train.json").write_text(json.dumps(others))
    labels = evaluate(world, *flags, "--metrics", "labels", output="others")["labels"]
    # of three quarters that are bright, the one that isn't is asked for alone: only there can the likeliest be right
    assert labels["accuracy"] < 0.05 and labels["by_size"]["2"]["accuracy"] < 0.05


def test_pictures_of_at_most_one_label_are_sets_too_if_some_have_none(tmp_path):
    """Each label by itself: a picture without labels teaches that there is none."""
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (60, 8, 8), dtype=np.uint8)
    vectors = np.eye(3, dtype=np.uint8)[random.integers(0, 3, 60)][:, :2]  # a third is of neither class
    np.savez(tmp_path / "some.npz", images=images, labels=vectors, class_names=np.array(["x", "y"]))
    preset = write_preset(tmp_path / "tiny.yaml", {**TINY_PRESET, "max_train_steps": 2})
    argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "some.npz"), "--resolution", "8"]
    assert train_classifier.main([*argv, "--output_dir", str(tmp_path / "classifier")]) == 0
    model = ResNetForImageClassification.from_pretrained(tmp_path / "classifier")
    assert model.config.problem_type == "multi_label_classification"
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert "all labels of all sets" in card and "a sigmoid, no softmax" in card


def test_validation_pictures_without_labels_cannot_test_a_classifier(tmp_path, capsys):
    for place in ("train/cat", "train/dog", "test"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / "pictures" / place / f"{number}.png")
    preset = write_preset(tmp_path / "tiny.yaml", {**TINY_PRESET, "max_train_steps": 2})
    argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "pictures"), "--resolution", "8"]
    assert train_classifier.main([*argv, "--output_dir", str(tmp_path / "classifier")]) == 2
    assert "none of the 3 validation pictures has a label" in capsys.readouterr().err
    assert not (tmp_path / "classifier").exists()


# -- the protocol -----------------------------------------------------------------------------------------------------


def test_a_run_is_judged_on_the_sets_of_a_file_over_several_seeds(world, capsys):
    flags = [world / "run", "--label_sets", world / "test.json", "--num_seeds", 5, "--save_images", "png"]
    report = evaluate(world, *flags, output="protocol")
    assert report["n"] == 20 and report["metrics"] == ["labels"]
    assert {"file": "test.json", "sets": 4, "seeds": 5}.items() <= report["sampling"]["label_sets"].items()
    labels = report["labels"]
    assert labels["n"] == 5 * 7
    # by hand: the pictures that were kept, judged by the classifier
    kept = [json.loads(line) for line in (world / "protocol" / "samples" / "metadata.jsonl").read_text().splitlines()]
    asked = [["upper left"], ["lower left"], ["upper left", "lower right"], NAMES[:3]] * 5
    assert [sorted(line["labels"]) for line in kept] == [sorted(names) for names in asked]
    model = ResNetForImageClassification.from_pretrained(world / "classifier").eval()
    rates, hits = [], []
    for number, line in enumerate(kept):
        pixels = np.asarray(Image.open(world / "protocol" / "samples" / line["file_name"]))
        tensor = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)[None, None]
        inputs = torch.nn.functional.interpolate(tensor, size=[16, 16], mode="bilinear", antialias=True)
        likeliest = model(pixel_values=inputs).logits[0].topk(len(line["labels"])).indices.tolist()
        hits.append(len({NAMES[index] for index in likeliest} & set(line["labels"])))
        if number % 4 == 3:
            rates.append(sum(hits[-4:]) / 7)
    assert labels["accuracy"] == pytest.approx(sum(hits) / 35)
    over = labels["over_seeds"]
    assert over["n"] == 5 and over["mean"] == pytest.approx(np.mean(rates))
    assert over["sd"] == pytest.approx(np.std(rates, ddof=1))
    half = 2.776445 * over["sd"] / 5**0.5  # Student's t with 4 degrees of freedom, from a table
    assert over["mean_95"] == pytest.approx([over["mean"] - half, over["mean"] + half])
    assert over["by_size"]["3"]["mean"] == pytest.approx(sum(hits[3::4]) / 15)
    said = capsys.readouterr().out
    assert "mean of 5 seeds (95 %)" in said and "of the 4 sets of test.json by 5 seeds each" in said
    width, height = Image.open(world / "protocol" / "sets.png").size
    assert width > 4 * 96 and height > 96
    # what was kept can be read as data again
    again = load_images(data_arguments(str(world / "protocol" / "samples"), [8, 8], "L"))
    assert len(again) == 20 and again.max_labels == 3


def test_without_a_file_the_sets_of_held_out_pictures_are_drawn(world):
    flags = [world / "run", "--num_samples", 40, "--metrics", "labels", "distances", "--save_images", "npz"]
    report = evaluate(world, *flags, output="held-out")
    assert "over_seeds" not in report["labels"] and report["distances"]["frechet_distance"] > 0
    with np.load(world / "held-out" / "samples.npz") as file:
        assert file["labels"].shape == (40, 4) and set(file["labels"].sum(axis=1)) == {1, 2, 3}
    again = load_images(data_arguments(str(world / "held-out" / "samples.npz"), [8, 8], "L"))
    assert again.class_names == NAMES and (again.labels >= 0).sum() == report["labels"]["n"]


def test_a_sweep_draws_the_sets_of_a_file(world):
    argv = ["sweep", str(world / "run"), "--label_sets", str(world / "test.json"), "--num_seeds", "2"]
    argv += ["--guidance_scale", "1", "2", "--classifier", str(world / "classifier")]
    assert cli.main([*argv, "--output_dir", str(world / "sweep")]) == 0
    rows = json.loads((world / "sweep" / "sweep.json").read_text())
    assert [row["sampling"]["guidance_scale"] for row in rows] == [1, 2]
    assert all(row["n"] == 8 and row["labels"]["over_seeds"]["n"] == 2 for row in rows)


def test_a_set_that_the_model_cannot_draw_ends_the_command_before_any_work(world, capsys):
    (world / "wrong.json").write_text('[["upper lift"]]')
    evaluate(world, world / "run", "--label_sets", world / "wrong.json", output="wrong", code=2)
    assert "unknown label 'upper lift'; the nearest known one is 'upper left'" in capsys.readouterr().err
    assert not (world / "wrong").exists()


def test_a_run_knows_how_many_labels_it_takes_and_shows_sets(world):
    pipe = ClassConditionalPipeline.from_pretrained(world / "run")
    assert pipe.config.max_labels == 3 and pipe.config.has_null_label
    (grid,) = (world / "run" / "samples").glob("*.png")
    assert Image.open(grid).width > 8 * 64 + 200  # beside the pictures, names of up to three quarters


def test_samples_of_other_sets_are_drawn_anew(world, tmp_path):
    """What an interrupted evaluation, or another sweep, has drawn of other labels is not taken for these."""
    pipe = make_pipeline("pixel")  # single labels, whose every set is as long
    (tmp_path / "a.json").write_text('["cat", "dog"]')
    (tmp_path / "b.json").write_text('["dog", "wild"]')
    folders = set()
    for file, seeds in (("a", 2), ("b", 2), ("b", 3), (None, 2)):
        path = None if file is None else str(tmp_path / f"{file}.json")
        sets = every_label(pipe) if file is None else read_label_sets(path, pipe)
        args = EvaluationArguments(label_sets=path, num_seeds=seeds, num_samples=4)
        samples = Samples(tmp_path, pipe, args, sets)
        assert len(samples) == (4 if file is None else 2 * seeds)
        folders.add(samples.folder)
    assert len(folders) == 4


@pytest.mark.parametrize("script", [train_ddpm, train_ldm])
def test_single_labels_can_be_dropped_of_sets_alone(tmp_path, script, capsys):
    preset = write_preset(tmp_path / "tiny.yaml", TINY_PRESET)
    argv = ["--preset", preset, "--single_label_dropout", "0.2", "--output_dir", str(tmp_path / "run")]
    assert script.main(argv) == 2 and "is for sets of labels, which these pictures haven't" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_dropout_of_single_labels_reaches_the_training(world, tmp_path):
    losses = []
    for dropout in ("0", "0.9"):
        argv = [
            "--preset",
            str(world / "tiny.yaml"),
            "--train_data_dir",
            str(world / "real"),
            "--max_train_steps",
            "2",
        ]
        argv += ["--single_label_dropout", dropout, "--output_dir", str(tmp_path / dropout)]
        assert train_ddpm.main([*argv, "--resolution", "8", "--image_mode", "L"]) == 0
        lines = (tmp_path / dropout / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert losses[0] != losses[1]
