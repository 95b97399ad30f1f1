"""What is recorded of a training, and what the card of a run says of it."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from running import TINY_PRESET, write_preset
from tiny import make_pipeline

from hwdiffusion.config import parse
from hwdiffusion.model_card import licence_of, pipeline_card, with_evaluations
from hwdiffusion.train_scripts import train_ddpm, train_ldm
from hwdiffusion.training_record import (
    command_in_words,
    hardware_in_words,
    note_progress,
    note_start,
    read_record,
    time_in_words,
    without_path,
)


# -- the record -------------------------------------------------------------------------------------------------------


def test_a_record_gathers_commands_and_keeps_the_last_hardware(tmp_path):
    first, second = ["train_ldm", "--preset", "digits"], ["train_ldm", "--max_train_steps", "9"]
    for command, processes, step in ((first, 1, 3), (first, 1, 5), (second, 2, 9)):
        note_start(tmp_path, command, torch.device("cpu"), processes)
        note_progress(tmp_path, step, 10.0 * step)
    record = read_record(tmp_path)
    assert record["commands"] == [first, second] and record["step"] == 9 and record["seconds"] == 90.0
    assert record["hardware"]["processes"] == 2 and record["versions"]["torch"] == torch.__version__
    (tmp_path / "training.json").write_text("{ cut off")
    assert read_record(tmp_path) == {}


def test_a_run_in_parts_has_the_time_of_all_and_a_finished_one_stays_as_it_is(tmp_path):
    run = tmp_path / "run"
    preset = write_preset(tmp_path / "tiny.yaml", {**TINY_PRESET, "max_train_steps": 2, "lr_scheduler": "constant"})
    argv = ["--preset", preset, "--output_dir", str(run)]
    assert train_ddpm.main(argv) == 0
    one = read_record(run)
    assert one["commands"] == [["train_ddpm", *argv]] and one["step"] == 2 and one["seconds"] > 0

    longer = [*argv, "--max_train_steps", "4"]
    assert train_ddpm.main(longer) == 0
    both = read_record(run)
    assert both["commands"] == [["train_ddpm", *argv], ["train_ddpm", *longer]] and both["step"] == 4
    assert both["seconds"] > one["seconds"]
    newest = torch.load(run / "checkpoint-4" / "training_state.pt", weights_only=True)
    assert both["seconds"] == pytest.approx(newest["seconds"], abs=1e-3)

    files = {name: (run / name).read_bytes() for name in ("training.json", "README.md")}
    assert train_ddpm.main([*longer, "--logging_steps", "7"]) == 0  # it is done
    assert (run / "training.json").read_bytes() == files["training.json"]

    assert train_ddpm.main([*argv, "--overwrite_output_dir"]) == 0
    assert read_record(run)["commands"] == [["train_ddpm", *argv, "--overwrite_output_dir"]]


def test_a_command_is_told_without_the_machine():
    words = ["train_ldm", "--train_data_dir", "/home/me/my pictures/", "--output_dir=/tmp/run", "--unet.x", "[8, 8]"]
    told = command_in_words([*words, "--vqvae", "../vqvae", "--preset", "presets/mine.yaml"])
    assert told == (
        "hwdiffusion train ldm --train_data_dir 'my pictures' --output_dir=run --unet.x '[8, 8]' --vqvae vqvae "
        "--preset presets/mine.yaml"
    )
    assert command_in_words(["train_wgan"], 4).startswith("accelerate launch --multi_gpu --num_processes 4 -m ")
    paths = {"C:\\Users\\me\\a": "a", "~/b": "b", "/data/me/c/": "c", "../../d": "d", "/": ".", "a/b.yaml": "a/b.yaml",
             "ylecun/mnist": "ylecun/mnist", "[8, 8]": "[8, 8]"}  # fmt: skip
    assert {path: without_path(path) for path in paths} == paths


def test_times_and_hardware_in_words():
    told = [time_in_words(seconds) for seconds in (0.4, 59.6, 100, 3599, 11520)]
    assert told == ["0 s", "60 s", "2 min", "1 h 0 min", "3 h 12 min"]
    cpu = {"device": "cpu", "name": "Some CPU", "processes": 1, "threads": 2}
    assert hardware_in_words(cpu) == "2 threads of a CPU (Some CPU)"
    assert hardware_in_words({**cpu, "processes": 3}) == "3 processes, each on 2 threads of a CPU (Some CPU)"
    assert hardware_in_words({"device": "cuda", "name": "NVIDIA H100", "processes": 4}) == "4 x NVIDIA H100"


# -- the card of a training -------------------------------------------------------------------------------------------


def test_the_card_of_a_run_says_how_it_was_made(tmp_path):
    run = tmp_path / "mine"
    preset = {**TINY_PRESET, "max_train_steps": 2, "data_license": "cc0-1.0"}
    argv = ["--preset", write_preset(tmp_path / "p.yaml", preset), "--output_dir", str(run)]
    assert train_ldm.main([*argv, "--seed", "5"]) == 0
    text = (run / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.tags == ["hwdiffusion", "diffusion", "class-conditional"]
    assert card.data.eval_results is None and "It has not been evaluated yet" in card.text
    assert "More Information Needed" not in text and str(tmp_path) not in text
    assert "hwdiffusion train ldm --preset p.yaml --output_dir mine --seed 5" in card.text
    record = read_record(run)
    took = re.search(r"It took (\d+) s, of which (\d+) s for the autoencoder, on (.*), with torch", card.text)
    first = read_record(run / "first-stage")
    assert first["commands"] == record["commands"]
    assert int(took[1]) == round(record["seconds"] + first["seconds"]) and int(took[2]) == round(first["seconds"])
    assert took[3] == hardware_in_words(record["hardware"])
    assert "The embedded digits" in card.text and "Their licence: cc0-1.0." in card.text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert settings["script"] == "train_ldm" and settings["train_ldm"]["seed"] == 5
    sections = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert sections == ["Use", "Evaluation", "Training", "Limits"]
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        assert len(block.splitlines()) == 5
        compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("flags", "licence"),
    [
        (["--dataset_name", "digits"], "cc-by-4.0"),
        (["--dataset_name", "shapes"], "apache-2.0"),
        (["--preset", "afhq-ldm-cpu"], "cc-by-nc-4.0"),
        (["--preset", "afhq-ldm-cpu", "--train_data_dir", "mine"], None),  # whose they are isn't known
        (["--train_data_dir", "mine", "--data_license", "mit"], "mit"),
        (["--dataset_name", "me/pictures"], "from the page"),
    ],
)
def test_the_licence_is_that_of_the_very_pictures(flags, licence, monkeypatch):
    page = ModelCard("---\nlicense: from the page\n---\nPictures.")
    monkeypatch.setattr("hwdiffusion.model_card.DatasetCard.load", lambda name, **_: page)
    assert licence_of(parse("train_ldm", flags).args) == licence


def test_without_a_network_the_licence_of_a_data_set_of_the_hub_is_not_known(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("hwdiffusion.model_card.DatasetCard.load", refuse)
    assert licence_of(parse("train_ldm", ["--dataset_name", "me/pictures"]).args) is None


@pytest.mark.parametrize(
    "kind, options, example, row",
    [
        ("pixel", {}, "labels=['wild']", "one row a label,"),
        ("tokens", {"max_labels": 2}, "labels=[['cat', 'wild']]", "one row a set of labels,"),
        ("unconditional", {}, "", "one row a label,"),
    ],
)
def test_the_example_of_a_card_is_one_of_its_model_and_runs(kind, options, example, row, preset, tmp_path):
    pipe = make_pipeline(kind, **options)
    config = parse("train_ddpm", ["--preset", preset, "--output_dir", str(tmp_path)])
    card = pipeline_card(config, pipe, "Digits", 3)
    first, second = re.findall(r"^image = pipe\((.*)\)\.images\[0\]$", card, re.MULTILINE)
    assert first == second == example and row in card
    assert ("in sets of at most 2" in card) == ("max_labels" in options)
    assert isinstance(eval(f"pipe({first})").images[0], Image.Image)


# -- evaluations ------------------------------------------------------------------------------------------------------


def report(copies: float = 0.004, **sampling) -> dict:
    """Of two classes, as `hwdiffusion evaluate` writes it."""
    labels = {"n": 500, "accuracy": 0.987654321, "accuracy_95": [0.97, 0.99], "worst_class": 0.9, "confidence": 0.98,
              "per_class": {"cat": 0.9, "dog": 1.0}}  # fmt: skip
    distances = {"frechet_distance": 1.5, "kernel_distance": float("nan"), "kernel_distance_sd": 0.1}
    return {
        "n": 500,
        "sampling": {"scheduler": "DDIMScheduler", "num_inference_steps": 50, "guidance_scale": 1.5, "seed": 0,
                     "weights_sha256": "abc", **sampling},
        "extractor": {"extractor": "classifier", "model": "judge", "test_accuracy": 0.995},
        "reference": {"name": "pictures", "split": "held-out", "n": 200},
        "floor": {"n": 200, "of": "training", "labels": {**labels, "accuracy": 0.995}, "distances": distances},
        "labels": labels,
        "distances": distances,
        "manifold": {"n": 200, "precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.7},
        "memorisation": {space: {"ratio": 0.98, "share_of_copies": copies} for space in ("features", "pixels")},
    }  # fmt: skip


CARD = "---\nlibrary_name: diffusers\ntags:\n- mine\n---\n\n# Cats\n\nMy own words.\n\n## Limits\n\nNone.\n"


def test_every_figure_is_in_the_metadata_with_its_n_split_and_extractor():
    card = ModelCard(with_evaluations(CARD, [report()], "cats"))
    results = {result.metric_type: result for result in card.data.eval_results}
    assert card.data.model_name == "cats" and card.data.tags == ["mine"]
    accuracy = results["accuracy"]
    assert accuracy.metric_value == 0.987654 and accuracy.dataset_split == "held-out"
    assert accuracy.metric_args == {
        "n": 500,
        "extractor": "classifier judge",
        "sampling": "DDIMScheduler, 50 steps, guidance 1.5",
        "labels": 500,
        "confidence_interval_95": [0.97, 0.99],
        "real": 0.995,
    }
    assert results["recall"].metric_args["n"] == 200  # of as many of both sides
    assert "kernel_distance" not in results  # which no YAML of the Hub has
    assert {"frechet_distance", "share_of_copies", "nearest_training_ratio"} <= set(results) and "fid" not in results


def test_only_inceptions_distance_is_called_fid():
    of_inception = {**report(), "extractor": {"extractor": "inception", "model": "standard"}}
    results = ModelCard(with_evaluations(CARD, [of_inception], "cats")).data.eval_results
    assert "fid" in {result.metric_type for result in results}


def test_an_evaluation_takes_its_own_place_and_leaves_the_rest():
    once = with_evaluations(CARD, [report()], "cats")
    twice = with_evaluations(once, [report()], "cats")
    assert once == twice and "My own words." in once and once.count("## Evaluation") == 1
    other = report(scheduler="EulerDiscreteScheduler")
    changed = with_evaluations(once, [other], "cats")
    assert "DDIMScheduler" not in changed and "EulerDiscreteScheduler" in changed
    none = ModelCard(with_evaluations(changed, [], "cats"))
    assert none.data.eval_results is None and "EulerDiscreteScheduler" not in str(none)
    assert "My own words." in none.text and "It has not been evaluated yet" in none.text


def test_sets_of_labels_have_a_section_of_their_own():
    sets = report(label_sets={"file": "test.json", "sets": 32, "seeds": 10})
    sets = {key: value for key, value in sets.items() if key not in ("distances", "manifold", "memorisation")}
    sets["labels"] |= {"by_size": {"1": {"n": 5, "accuracy": 0.5}}, "over_seeds": {"n": 10, "mean": 0.7,
                       "mean_95": [0.6, 0.8], "by_size": {"1": {"mean": 0.5, "mean_95": [0.4, 0.6]}}}}  # fmt: skip
    card = ModelCard(with_evaluations(CARD, [report(), sets], "cats"))
    assert "### The sets of test.json" in card.text and "whether samples are copies" in card.text
    (own, of_sets) = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert own.metric_value == 0.987654 and of_sets.metric_value == 0.7
    assert of_sets.metric_args["label_sets"] == "test.json" and of_sets.metric_args["seeds"] == 10
    assert of_sets.metric_args["confidence_interval_95"] == [0.6, 0.8]


def test_copying_is_called_so():
    right, wrong = (with_evaluations(CARD, [report(copies)], "cats") for copies in (0.01, 0.3))
    assert "which doesn't look like copying" in right and "which looks like copying" in wrong
    assert json.dumps(ModelCard(right).data.to_dict())  # plain values alone
