"""The command line `hwdiffusion`, but for what evaluates and draws variations, which have tests of their own."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from running import TINY_PRESET, write_preset
from tiny import make_pipeline, seeds

from hwdiffusion import cli
from hwdiffusion.config import load_preset, parse, preset_names


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    make_pipeline("latent", default_guidance_scale=1.5).save_pretrained(folder)
    return str(folder)


def said(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line or "error" in line for line in before)
    return error


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_the_help_of_every_command_has_an_example_of_it(command, capsys):
    # that of `train` is no parser's, which would leave
    with pytest.raises(SystemExit, match="0") if command != "train" else contextlib.nullcontext():
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: hwdiffusion {command}" in shown


def test_help_imports_nothing_that_takes_a_second():
    heavy = "torch", "diffusers", "transformers", "datasets"
    code = f"import sys; from hwdiffusion import cli\ntry: cli.main(['--help'])\nexcept SystemExit: print([m for m in {heavy} if m in sys.modules])"  # noqa: E501
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]" and "evaluate: " in out


def test_the_table_of_presets_has_all_of_them_with_their_sizes(capsys):
    rows = {row["name"]: row for row in json.loads(said(capsys, "presets", "--json"))["presets"]}
    assert sorted(rows) == preset_names()
    assert rows["mnist-ldm"]["latents"] == [4, 7, 7] and rows["mnist-ldm"]["pictures"] == [1, 28, 28]
    assert 2.2e6 < rows["mnist-ldm"]["parameters"]["unet"] < 2.5e6
    assert rows["mnist-ddpm"]["latents"] is None and rows["mnist-ddpm"]["trains"] == ["ddpm"]
    assert all(row["about"] for row in rows.values())
    assert rows["mnist-ldm"]["score"]["n"] == 4000 and rows["afhq-ldm"]["score"] is None
    assert rows["mnist-fast"]["score"]["value"] == 0.993  # its own, not that of what it stands on
    for name, row in rows.items():
        score = row["score"] or {}
        assert set(score) <= {"of", "value", "n", "judge", "sampling", "after"}, name
        assert not score or {"of", "value", "n", "judge"} <= set(score), name


def test_the_table_says_what_is_known_of_a_preset_and_where_nothing_is(capsys):
    lines = said(capsys, "presets").splitlines()
    line = {line.split()[0]: line for line in lines if line and not line.startswith(" ")}
    assert line["preset"].endswith("known score")
    assert line["mnist-ldm"].endswith("label accuracy 0.988 (n 4,000)")
    assert line["afhq-ldm"].endswith("no score yet") and line["shapes-ldm-pooled"].endswith("no score yet")
    shown = said(capsys, "presets", "show", "mnist-ldm")
    assert "# Best known: label accuracy 0.988, n = 4,000, by mnist-classifier" in shown
    assert "# Best known: no score yet." in said(capsys, "presets", "show", "shapes-ldm-pooled")


def test_a_preset_that_is_shown_serves_as_one(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(said(capsys, "presets", "show", "shapes-ldm-pooled"))
    assert yaml.safe_load(path.read_text()) == load_preset("shapes-ldm-pooled")
    shown, named = (parse("train_ldm", ["--preset", which]).to_dict() for which in (str(path), "shapes-ldm-pooled"))
    assert shown == named
    assert "did you mean mnist-ldm?" in refused(capsys, "presets", "show", "mnist-lmd")
    assert "needs the name of a preset" in refused(capsys, "presets", "show")


def test_the_doctor_says_what_there_is(capsys):
    import torch

    found = json.loads(said(capsys, "doctor", "--json"))
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        found["packages"]["torch"]
    )
    assert len(found["gpus"]) == torch.cuda.device_count() and found["memory_gib"] > 0
    assert set(found["extras"]) == {"8bit", "completion", "demo", "fid"}
    assert "extra 8bit, for --use_8bit_adam: " in said(capsys, "doctor")


def test_samples_are_a_folder_of_classes_that_can_be_trained_on(run, tmp_path, capsys):
    from hwdiffusion.pipelines import ClassConditionalPipeline

    folder = tmp_path / "drawn"
    argv = [
        "sample",
        run,
        "--labels",
        "cat",
        "1",
        "--num",
        "3",
        "--seed",
        "5",
        "--output",
        str(folder),
        "--steps",
        "2",
    ]
    assert cli.main([*argv, "--batch_size", "4"]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(run)
    names = [pipe.id2label[index] for index in range(2)]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    label = next(index for index, name in pipe.id2label.items() if name == "cat")
    other = names[1]
    assert files == sorted(f"{name}/{n:06d}.png" for n, name in enumerate(["cat", other] * 3))
    images = pipe(labels=[label, 1] * 3, generator=seeds(*range(5, 11)), num_inference_steps=2).images
    for index, image in enumerate(images):
        drawn = np.asarray(Image.open(next(folder.rglob(f"{index:06d}.png")).as_posix())).astype(int)
        assert np.abs(drawn - np.asarray(image).astype(int)).max() <= 1
    assert "is there already; name a new folder" in refused(capsys, *argv)


def test_samples_in_a_grid_have_a_row_a_label(run, tmp_path, capsys):
    grid, folder = tmp_path / "grid.png", tmp_path / "folder"
    options = ["--labels", "0", "1", "--num", "3", "--steps", "2"]
    assert cli.main(["sample", run, *options, "--grid", "--output", str(grid)]) == 0
    assert cli.main(["sample", run, *options, "--output", str(folder)]) == 0
    drawn = np.asarray(Image.open(grid))
    left, top = drawn.shape[1] - 3 * 68, drawn.shape[0] - 2 * 68
    for row in range(2):
        for column in range(3):
            single = np.asarray(Image.open(next(folder.rglob(f"{2 * column + row:06d}.png"))).convert("RGB"))
            scale = 64 // single.shape[0]
            cell = drawn[top + 68 * row :, left + 68 * column :][:64:scale, :64:scale]
            assert np.array_equal(cell, single)
    assert "--output must be a folder, or give --grid" in refused(capsys, "sample", run, "--output", str(grid))
    assert "--num must be in 1 to" in refused(capsys, "sample", run, "--num", "0")


def test_training_is_refused_before_anything_is_launched_and_else_runs(tmp_path, capsys):
    assert "name what to train, one of ldm, ddpm" in refused(capsys, "train", "lmd")
    assert "did you mean --learning_rate?" in refused(capsys, "train", "ldm", "--learning_rat", "1")
    preset = write_preset(tmp_path / "tiny.yaml", {**TINY_PRESET, "max_train_steps": 2})
    words = [sys.executable, "-m", "hwdiffusion.cli", "train", "ddpm", "--preset", preset]
    assert subprocess.run([*words, "--output_dir", str(tmp_path / "run")]).returncode == 0
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_what_cannot_be_pushed_is_refused(run, tmp_path, capsys):
    assert "is no finished run" in refused(capsys, "push", str(tmp_path), "me/digits")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "config.json").write_text("{}")
    assert "name the repository as USER/NAME" in refused(capsys, "push", str(tmp_path), "digits")


def test_debug_shows_where_an_error_comes_from(capsys):
    from hwdiffusion import InputError

    with pytest.raises(InputError, match="unknown preset"):
        cli.main(["--debug", "presets", "show", "nothing"])


def test_a_reader_that_has_enough_of_the_output_ends_the_command_quietly():
    lines = (
        "from hwdiffusion.failures import exit_code; raise SystemExit(exit_code('it', lambda: print('line\\n' * {})))"
    )
    for count in (3, 100_000):  # what is still in the buffer at the end, and more than a pipe holds
        process = subprocess.Popen(
            [sys.executable, "-c", lines.format(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)
        process.stderr.close()
