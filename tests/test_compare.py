"""`hwdiffusion compare` through its command line: what is measured once, what is refused, what it leaves."""

import json
import shutil

import pytest
import torch
from conftest import TINY_UNET, TOKENS
from PIL import Image
from running import TINY_PRESET, write_preset
from test_label_sets import write_pictures

from hwdiffusion import cli
from hwdiffusion.compare import names_apart, training_of
from hwdiffusion.pipelines import ClassConditionalGANPipeline, ClassConditionalPipeline
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_ldm, train_wgan


pytestmark = pytest.mark.xdist_group("compare")  # they share runs and a classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of each kind, hardly trained on the same pictures, and a classifier."""
    folder = tmp_path_factory.mktemp("compared")
    preset = write_preset(folder / "tiny.yaml", {**TINY_PRESET, "max_train_steps": 4, "random_flip": False})
    for script, name in ((train_ddpm, "pixels"), (train_ldm, "latents"), (train_wgan, "gan")):
        assert script.main(["--preset", preset, "--output_dir", str(folder / name)]) == 0
    argv = ["--preset", preset, "--max_train_steps", "30", "--output_dir", str(folder / "judge")]
    assert train_classifier.main(argv) == 0
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """Copies of the runs, without evaluations."""
    for path in made.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
    return tmp_path


def compare(runs, *argv, code=0):
    flags = argv if "--output_dir" in argv else (*argv, "--output_dir", str(runs / "out"))
    assert cli.main(["compare", *map(str, flags)]) == code
    return json.loads((runs / "out" / "compare.json").read_text()) if code == 0 else None


def test_runs_of_every_kind_are_put_side_by_side(runs, monkeypatch, capsys):
    judged = ["--classifier", runs / "judge", "--num_samples", "60"]
    at_once = ["--columns", "3", "--batch_size", "16"]
    rows = compare(runs, runs / "pixels", runs / "latents", runs / "gan", *judged, *at_once)
    assert [row["run"] for row in rows] == ["pixels", "latents", "gan"]
    table = (runs / "out" / "compare.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "|  | pixels | latents | gan | real |" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    for name in ("label accuracy (95 %)", "Fréchet distance", "recall", "share of copies", "parameters",
                 "training seconds", "training pictures seen", "pictures a second (cpu)"):  # fmt: skip
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, name
    assert "one pass of the generator" in table and "DDIMScheduler, 2 steps, guidance 1.5" in table

    pixels, latents = (ClassConditionalPipeline.from_pretrained(runs / name) for name in ("pixels", "latents"))
    gan = ClassConditionalGANPipeline.from_pretrained(runs / "gan")
    networks = [[pixels.unet], [latents.unet, latents.vqvae], [gan.generator]]
    for row, parts in zip(rows, networks):
        assert row["parameters"] == sum(weight.numel() for part in parts for weight in part.parameters())
        assert row["n"] == 60 and row["training"]["seconds"] > 0
        speed = row["speed"]
        assert 0 < speed["slowest"] <= speed["images_per_second"] <= speed["fastest"] and speed["rounds"] >= 3
    assert [row["training"]["images"] for row in rows] == [64, 128, 64]  # of both stages together
    picture = Image.open(runs / "out" / "compare.png")
    assert picture.height > 10 * 64 and picture.width > 9 * 64  # ten labels, three pictures of three runs

    # the evaluations are in the runs, and are not made again, with the same flags or without any
    for row in rows:
        saved = json.loads((runs / row["run"] / "evaluation.json").read_text())
        assert saved["labels"] == row["labels"] and saved["sampling"] == row["sampling"]
    assert "one pass of the generator" in (runs / "gan" / "README.md").read_text().split("## Evaluation")[1]
    monkeypatch.setattr("hwdiffusion.compare.evaluate", lambda *_: pytest.fail("evaluated again"))
    again = compare(runs, runs / "gan", runs / "pixels", *judged)
    assert [row["labels"] for row in again] == [rows[2]["labels"], rows[0]["labels"]]
    monkeypatch.setattr("hwdiffusion.compare.build_judge", lambda *_: pytest.fail("a judge was built"))
    capsys.readouterr()
    again = compare(runs, runs / "gan", runs / "pixels", "--json")
    assert [row["labels"] for row in again] == [rows[2]["labels"], rows[0]["labels"]]
    assert json.loads(capsys.readouterr().out) == {"runs": again}  # and nothing else on stdout


def test_an_evaluation_of_other_weights_or_of_another_number_does_not_count(runs, capsys):
    argv = ["--classifier", str(runs / "judge"), "--num_samples"]
    for name, count in (("pixels", "60"), ("gan", "70")):
        assert cli.main(["evaluate", str(runs / name), *argv, count]) == 0
    compare(runs, runs / "pixels", runs / "gan", code=2)
    assert "the saved evaluations of" in capsys.readouterr().err
    rows = compare(runs, runs / "pixels", runs / "gan", *argv[:2])  # as many as the first has
    assert [row["n"] for row in rows] == [60, 60]
    rows = compare(runs, runs / "pixels", runs / "gan", *argv, "50")
    assert [row["n"] for row in rows] == [50, 50]
    own = [json.loads((runs / name / "evaluation.json").read_text())["n"] for name in ("pixels", "gan")]
    assert own == [60, 70]  # what the runs had themselves stays

    pipe = ClassConditionalGANPipeline.from_pretrained(runs / "gan")
    with torch.no_grad():
        pipe.generator.conv_out.bias += 1
    pipe.save_pretrained(runs / "gan")
    compare(runs, runs / "pixels", runs / "gan", code=2)
    assert "gan has no saved evaluation of its present weights and settings" in capsys.readouterr().err
    changed = compare(runs, runs / "pixels", runs / "gan", *argv[:2])
    assert changed[0]["labels"] == rows[0]["labels"]
    assert changed[1]["distances"]["frechet_distance"] != rows[1]["distances"]["frechet_distance"]


def test_a_comparison_that_was_broken_off_goes_on(runs, monkeypatch):
    judged = ["--classifier", str(runs / "judge"), "--num_samples"]
    for name in ("pixels", "gan"):
        assert cli.main(["evaluate", str(runs / name), *judged, "60"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr("hwdiffusion.compare.make_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compare(runs, runs / "pixels", runs / "gan", *judged, "50", code=130)
    assert not (runs / "out" / "compare.json").exists() and any((runs / "out").iterdir())
    monkeypatch.setattr("hwdiffusion.evaluation.Samples.draw", lambda *_: pytest.fail("drawn again"))
    rows = compare(runs, runs / "pixels", runs / "gan", *judged, "50")
    assert [row["n"] for row in rows] == [50, 50]


def test_runs_are_called_by_what_tells_them_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/best", "b/best", "here"):
        (tmp_path / folder).mkdir(parents=True)
    assert names_apart(["a/best", "here"]) == {"a/best": "best", "here": "here"}
    assert names_apart(["a/best", "b/best/"]) == {"a/best": "a/best", "b/best/": "b/best"}
    assert names_apart(["somebody/best", "a/best"]) == {"somebody/best": "somebody/best", "a/best": "a/best"}
    monkeypatch.chdir(tmp_path / "here")
    assert names_apart([".", "../a/best"]) == {".": "here", "../a/best": "best"}


def test_what_training_took_is_that_of_all_stages_or_said_to_be_unknown(runs):
    first, second = training_of(str(runs / "latents" / "first-stage")), training_of(str(runs / "latents"))
    assert second["images"] == 2 * first["images"] and second["seconds"] > first["seconds"]
    assert training_of(str(runs / "gan" / "checkpoint-4"))["images"] == 64
    assert training_of(str(runs / "latents" / "checkpoint-4"))["images"] == second["images"]
    shutil.rmtree(runs / "latents" / "first-stage" / "checkpoint-4")
    assert training_of(str(runs / "latents")) == {}


def test_pictures_of_sets_are_compared_by_the_same_sets(tmp_path):
    data = ["--train_data_dir", str(write_pictures(tmp_path / "real", 300, seed=0)), "--resolution", "8"]
    preset = {key: value for key, value in TINY_PRESET.items() if key not in ("dataset_name", "max_train_samples")}
    preset |= {"unet": {**TINY_UNET, **TOKENS}, "max_train_steps": 3, "random_flip": False}
    argv = ["--preset", write_preset(tmp_path / "tiny.yaml", preset), *data, "--output_dir"]
    for script, name in ((train_ddpm, "diffusion"), (train_wgan, "gan"), (train_classifier, "judge")):
        assert script.main([*argv, str(tmp_path / name)]) == 0
    (tmp_path / "test.json").write_text(json.dumps([["upper left"], ["lower right", "upper left"]]))
    named = [tmp_path / "diffusion", tmp_path / "gan", "--classifier", tmp_path / "judge"]
    rows = compare(tmp_path, *named, "--label_sets", tmp_path / "test.json", "--num_seeds", "2")
    assert [row["n"] for row in rows] == [4, 4] and all(row["metrics"] == ["labels"] for row in rows)
    assert (tmp_path / "gan" / "evaluation-test" / "evaluation.json").is_file()
    assert rows[0]["sampling"]["label_sets"] == rows[1]["sampling"]["label_sets"]
    (tmp_path / "test.json").write_text(json.dumps([["upper left"], ["lower right"]]))
    changed = compare(tmp_path, *named, "--label_sets", tmp_path / "test.json", "--num_seeds", "2")
    assert changed[0]["sampling"]["label_sets"]["sha256"] != rows[0]["sampling"]["label_sets"]["sha256"]
    rows = compare(tmp_path, *named, "--num_samples", "40")  # of the held-out pictures' sets
    assert all("frechet_distance" in row["distances"] for row in rows)
    assert rows[0]["sampling"]["label_sets"] == rows[1]["sampling"]["label_sets"]
    card = (tmp_path / "gan" / "README.md").read_text()  # which tells both, the pictures' sets and those of the file
    assert card.count("## Evaluation") == 1 and "### The sets of test.json" in card
    assert "40 samples" in card and "4 samples" in card


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(runs, capsys, monkeypatch):
    def run(*argv) -> str:
        with monkeypatch.context() as patched:
            for cls in (ClassConditionalPipeline, ClassConditionalGANPipeline):
                patched.setattr(cls, "__call__", lambda *_, **__: pytest.fail("something was drawn"))
            compare(runs, *argv, code=2)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("hwdiffusion compare: error: ") and not (runs / "out").exists()
        return said

    return run


def test_runs_that_do_not_compare_are_refused_before_anything_is_drawn(runs, refused):
    judged = ["--classifier", runs / "judge", "--num_samples", "60"]
    preset = {**TINY_PRESET, "max_train_steps": 2, "resolution": 8}
    small = ["--preset", write_preset(runs / "small.yaml", preset), "--output_dir", str(runs / "small")]
    assert train_wgan.main(small) == 0
    assert "draws pictures of (channels, height, width) (1, 8, 8), but" in refused(
        runs / "gan", runs / "small", *judged
    )

    fewer = ["--preset", write_preset(runs / "tiny.yaml", {**preset, "resolution": 16, "random_flip": False})]
    fewer += ["--max_train_samples", "50", "--output_dir", str(runs / "fewer")]
    assert train_wgan.main(fewer) == 0
    assert "fewer was trained on other pictures than" in refused(runs / "gan", runs / "fewer", *judged)

    index = runs / "gan" / "model_index.json"
    index.write_text(index.read_text().replace('"3": "3"', '"3": "three"'))
    said = refused(runs / "pixels", runs / "gan", *judged)
    assert "knows the labels" in said and "three" in said and "compare runs of the same labels" in said


def test_a_command_that_says_too_little_or_too_much(runs, refused):
    assert "name at least two run folders" in refused(runs / "gan")
    assert "is named twice" in refused(runs / "gan", runs / "gan")
    assert "is named twice" in refused(runs / "gan", f"{runs / 'gan'}/")
    assert "neither a run folder nor a pipeline" in refused(runs / "gan", runs / "judge")
    assert "neither --images nor" in refused(runs / "gan", runs / "pixels", "--save_images", "png")
    assert "--columns must be in 1 to 100" in refused(runs / "gan", runs / "pixels", "--columns", "0")
    assert "unknown metric 'recal'; there are" in refused(runs / "gan", runs / "pixels", "--metrics", "recal")
    assert "is for diffusion models" in refused(runs / "pixels", runs / "gan", "--num_inference_steps", "3")
    assert "--scheduler ddim is for diffusion models" in refused(runs / "pixels", runs / "gan", "--scheduler", "ddim")


def test_an_evaluation_of_truncated_noise_counts_where_that_is_asked_for_alone(runs, capsys):
    shutil.copytree(runs / "gan", runs / "other")
    judged = ["--classifier", str(runs / "judge"), "--num_samples", "60"]
    assert cli.main(["evaluate", str(runs / "pixels"), *judged]) == 0
    assert cli.main(["evaluate", str(runs / "gan"), *judged, "--truncation", "0.5"]) == 0
    report = json.loads((runs / "gan" / "evaluation.json").read_text())
    assert report["sampling"]["truncation"] == 0.5
    assert "one pass of the generator, truncation 0.5" in capsys.readouterr().out
    compare(runs, runs / "pixels", runs / "gan", code=2)
    assert "gan has no saved evaluation of its present weights and settings" in capsys.readouterr().err
    compare(runs, runs / "gan", runs / "other", "--truncation", "0.5", code=2)
    assert "other has no saved evaluation of its present weights and settings" in capsys.readouterr().err


def test_what_needs_steps_refuses_a_gan(runs, capsys):
    for command in (["sweep", runs / "gan"], ["trajectory", runs / "gan", "--output", runs / "x.png"]):
        assert cli.main([*map(str, command)]) == 2
        assert "gan is a ClassConditionalGANPipeline, which draws in one pass" in capsys.readouterr().err
