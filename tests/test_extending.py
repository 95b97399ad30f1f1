"""What users add without a change to the package: a data source, a loss, a pipeline."""

import importlib
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from test_pipelines import WITHOUT_THE_PACKAGE
from tiny import make_pipeline, seeds

from hwdiffusion import InputError
from hwdiffusion.arguments import DataArguments
from hwdiffusion.config import parse, run_config
from hwdiffusion.data import load_data
from hwdiffusion.figures import read_metrics
from hwdiffusion.train_scripts import train_ddpm


SOURCES = """
import numpy as np
from PIL import Image

from hwdiffusion.sources import Source


def grays(args):
    labels = np.arange(20)[:, None] % 2
    return {"train": Source(20, lambda i: Image.new("L", (4, 4), 10 * i), lambda i: f"gray {i}", labels, ["even", "odd"])}


def nothing(args):
    return {}


def broken(args):
    return 1 / 0


def leaves(args):
    raise SystemExit(3)


def one_of(labels, names):
    return {"train": Source(2, lambda i: Image.new("L", (4, 4)), str, labels, names)}


def flat(args):
    return one_of(np.zeros(2, int), ["a"])


def fractions(args):
    return one_of(np.zeros((2, 1)), ["a"])


def few(args):
    return one_of(np.zeros((1, 1), int), ["a"])


def beyond(args):
    return one_of(np.full((2, 1), 1), ["a"])


def twice(args):
    return one_of(np.zeros((2, 1), int), ["a", "a"])
"""  # noqa: E501


def test_a_module_that_a_repository_names_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setattr("hwdiffusion.config.file_of", lambda run, name: tmp_path / name)
    for section in ("{dataset_name: 'my_sources:grays'}", "\n  dataset_name: my_sources:grays\n"):
        (tmp_path / "config.yaml").write_text(f"script: train_ddpm\ntrain_ddpm: {section}")
        with pytest.raises(InputError, match="the config.yaml of user/gray names a module"):
            run_config("user/gray")
    assert run_config(str(tmp_path)) == tmp_path / "config.yaml"  # the user's own


def test_a_function_of_the_users_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "my_sources.py").write_text(SOURCES)
    monkeypatch.chdir(tmp_path)
    args = DataArguments(dataset_name="my_sources:grays", resolution=[4], image_mode="L")
    args.seed = 0
    data = load_data(args)
    assert len(data.train) == 18 and len(data.validation) == 2 and data.id2label == {0: "even", 1: "odd"}
    for dataset in (data.train, data.validation):
        assert torch.equal(dataset.images[:, 0, 0, 0] // 10 % 2, dataset.labels[:, 0].byte())
    for name, said in (
        ("my_sources:gone", "has no attribute 'gone'"),
        ("no_sources:grays", "No module named 'no_sources'"),
        ("my_sources:broken", "division by zero"),
        ("my_sources:nothing", "must return a dict of `Source`"),
        ("my_sources:leaves", "can't be loaded: 3"),
        ("my_sources:flat", "labels must be an array"),
        ("my_sources:fractions", "labels must be an array"),
        ("my_sources:few", "1 rows of labels for 2 pictures"),
        ("my_sources:beyond", "labels must be in -1 to 0"),
        ("my_sources:twice", "class_names must be words, each once"),
    ):
        args.dataset_name = name
        with pytest.raises(InputError, match=f"--dataset_name {name}\\b.*{said}"):
            load_data(args)


def test_a_loss_of_the_users_is_trained_on(preset, tmp_path):
    def twice(*given):
        loss_of = train_ddpm.denoising_loss(*given)
        return lambda *given: 2 * loss_of(*given)

    for name, make_loss in (("stock", None), ("twice", twice)):
        argv = ["--preset", preset, "--max_train_steps", "1", "--output_dir", str(tmp_path / name)]
        train_ddpm.train(parse("train_ddpm", argv), make_loss)
    (stock,), (double,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stock", "twice"))
    assert double["loss"] == pytest.approx(2 * stock["loss"], rel=1e-6)


PIPELINE = """
import torch

from hwdiffusion.pipelines.class_conditional import (
    ClassConditionalPipeline,
)


class DarkPipeline(ClassConditionalPipeline):
    source_name = "pipeline_dark"

    def __call__(self, *given, **named):
        output = super().__call__(*given, **named)
        output.images = output.images / 2
        return output
"""


def test_a_pipeline_of_the_users_is_saved_whole(tmp_path, monkeypatch):
    (tmp_path / "dark.py").write_text(PIPELINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    bright = make_pipeline()
    dark = importlib.import_module("dark").DarkPipeline(**bright.components, **{
        name: bright.config[name] for name in ("id2label", "has_null_label", "prediction_type")
    }, default_num_inference_steps=4)  # fmt: skip
    dark.save_pretrained(tmp_path / "saved")
    (source,) = (tmp_path / "saved").glob("pipeline_*.py")
    assert source.name.startswith("pipeline_dark_")
    assert not re.search(r"^(from|import) hwdiffusion", source.read_text(), flags=re.MULTILINE)

    script = (
        textwrap.dedent(WITHOUT_THE_PACKAGE)
        .split("labels = json")[0]
        .replace("folder, again, labels", "folder, again")
    )
    script += "torch.save(pipe(labels=['wild', 0], generator=generators, output_type='pt').images, again)"
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "images.pt")]
    done = subprocess.run(command, cwd=tmp_path / "saved", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = bright(labels=["wild", 0], generator=seeds(0, 1), output_type="pt").images / 2
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), expected)
