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
from hwdiffusion.data import load_images
from hwdiffusion.label_sets import every_label, labels_in_turn, names_of, read_label_sets, sets_to_draw
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.reference import data_arguments
from hwdiffusion.train_scripts import train_classifier, train_ddpm


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
    without = load_images(data_arguments("digits", [8, 8], "L"))  # none of whose labels the model knows
    assert sets_to_draw(pipe, without).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    "content, said",
    [
        ("[[", "can't be read as JSON"),
        ("{}", "must hold a list of sets"),
        ("[]", "must hold a list of sets"),
        ('[["dog"], []]', r"set 1 of .* must be a list of at least one name, not \[\]"),
        ('[["dog"], [3]]', r"set 1 of .* must be a list of at least one name, not \[3\]"),
        ('[["dog"], ["wid"]]', "unknown label 'wid'; the nearest known one is 'wild'"),
        ('[["dog", "cat", "wild"]]', r"labels\[0\] holds 3 labels, but this model takes at most 2"),
        ('[["dog", "dog"]]', "'dog' twice"),
    ],
)
def test_a_file_of_sets_that_does_not_fit_is_refused(tmp_path, content, said):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_label_sets(str(tmp_path / "test.json"), make_pipeline("tokens", max_labels=2))


def test_a_file_of_sets_needs_a_run_with_labels(world, tmp_path, capsys):
    with pytest.raises(InputError, match="needs a pipeline with labels"):
        read_label_sets(str(world / "test.json"), make_pipeline("unconditional"))
    with pytest.raises(InputError, match="can't be read as JSON"):
        read_label_sets(str(tmp_path / "none.json"), make_pipeline("tokens"))
    argv = ["evaluate", "--images", "x", "--resolution", "8", "--label_sets", "y"]
    assert cli.main(argv) == 2 and "--label_sets is what a run draws" in capsys.readouterr().err


# -- the classifier ---------------------------------------------------------------------------------------------------


def test_a_classifier_of_sets_is_a_stock_one_of_many_labels(world):
    model = ResNetForImageClassification.from_pretrained(world / "classifier")
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[k] for k in range(4)] == NAMES
    assert model.config.test_accuracy > 0.95
    lines = [json.loads(line) for line in (world / "classifier" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] > 0.95 and lines[-1]["loss"] < lines[0]["loss"] / 2


def test_unseen_pictures_of_sets_are_judged_by_every_label(world):
    """Of a perfect generator nearly all is found; with its labels exchanged, as much as by chance."""
    write_pictures(world / "other", 120, seed=1)
    flags = ["--images", world / "other", "--reference", world / "real", "--resolution", 8, "--image_mode", "L"]
    labels = evaluate(world, *flags, "--metrics", "labels", output="perfect")["labels"]
    assert labels["accuracy"] > 0.95 and labels["n"] == 40 * (1 + 2 + 3)
    assert {size: one["n"] for size, one in labels["by_size"].items()} == {"1": 40, "2": 80, "3": 120}
    assert labels["whole_sets"] > 0.9
    assert [of["values"] for of in labels["attributes"]] == [["upper", "lower"], ["left", "right"]]
    assert min(of["accuracy"] for of in labels["attributes"]) > 0.95
    assert (world / "perfect" / "confusion.png").is_file()
    sets = json.loads((world / "other" / "train.json").read_text())
    opposite = {"upper": "lower", "lower": "upper", "left": "right", "right": "left"}
    turned = {
        file: [" ".join(opposite[word] for word in name.split()) for name in names[:1]] for file, names in sets.items()
    }
    singles = {file: names for file, names in turned.items() if len(sets[file]) == 1}
    for file in set(sets) - set(singles):
        (world / "other" / "images" / file).unlink()
    (world / "other" / "train.json").write_text(json.dumps(singles))
    assert evaluate(world, *flags, "--metrics", "labels", output="turned")["labels"]["accuracy"] < 0.1


# -- the protocol -----------------------------------------------------------------------------------------------------


def test_a_run_is_judged_on_the_sets_of_a_file_over_several_seeds(world, capsys):
    flags = [world / "run", "--label_sets", world / "test.json", "--num_seeds", 5, "--save_images", "png"]
    report = evaluate(world, *flags, output="protocol")
    assert report["n"] == 20 and report["metrics"] == ["labels"] and report["sampling"]["sets"] == 4
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
    assert "mean of 5 seeds (95 %)" in capsys.readouterr().out
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
