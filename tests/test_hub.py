"""Runs on their way to the Hub and back, by the real client, over a loopback server that speaks its interface."""

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request

import pytest
from hub_server import LoopbackHub
from huggingface_hub import ModelCard, RepoCard
from PIL import Image
from running import TINY_PRESET, command, write_preset
from tiny import make_pipeline

from hwdiffusion import InputError
from hwdiffusion.config import parse
from hwdiffusion.hub import write_model_card
from hwdiffusion.space import check_space
from hwdiffusion.train_scripts import train_ddpm, train_ldm


TOKEN = "hf_" + "s3cr3t" * 5


@pytest.fixture
def hub():
    with LoopbackHub(TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """A run of digits, and one of sets of labels."""
    folder = tmp_path_factory.mktemp("pushed")
    digits = write_preset(folder / "digits.yaml", {**TINY_PRESET, "max_train_steps": 2})
    shapes = {**TINY_PRESET, "max_train_steps": 2, "dataset_name": "shapes", "image_mode": "RGB"}
    shapes = write_preset(folder / "shapes.yaml", shapes)
    assert train_ldm.main(["--preset", digits, "--output_dir", str(folder / "digits")]) == 0
    assert train_ddpm.main(["--preset", shapes, "--output_dir", str(folder / "shapes")]) == 0
    return {"digits": folder / "digits", "shapes": folder / "shapes", "preset": digits}


def environment(hub, folder, **more) -> dict[str, str]:
    """Of a user who has logged in to the loopback Hub, and of a cache of his own."""
    home = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_ENDPOINT": hub.endpoint}
    without = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in without}
    return {**kept, **home, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def push(hub, folder, run, *argv, **more) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "hwdiffusion.cli", "push", str(run), *argv]
    return subprocess.run(words, env=environment(hub, folder, **more), capture_output=True, text=True)


SAMPLE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hwdiffusion":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = pipe(labels=json.loads(sys.argv[2]), num_inference_steps=2).images[0]
print(image.size, len(pipe.id2label))
"""


@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [("digits", "[3]", "(16, 16) 10"), ("shapes", '[["red cube", "cyan sphere"]]', "(16, 16) 24")],
)
def test_a_pushed_run_is_loaded_by_stock_diffusers_where_the_package_is_not(name, labels, said, runs, hub, tmp_path):
    done = push(hub, tmp_path, runs[name], f"me/{name}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{hub.endpoint}/me/{name}")
    files = hub.files(f"me/{name}")
    assert {"model_index.json", "README.md", "config.yaml", "samples.png"} <= set(files)
    assert not any("checkpoint" in path or "latents" in path for path in files)
    assert files["README.md"].decode().count(f'from_pretrained("me/{name}"') == 2
    assert len([path for path in files if path.startswith("pipeline_")]) == 1

    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and "class-conditional" in card.data.tags
    assert "More Information Needed" not in card.text and "max_train_steps: 2" in card.text
    texts = [content.decode("latin-1") for content in files.values()]
    assert not any(str(runs[name].parent) in text for text in texts)  # no path of this machine

    words = [sys.executable, "-c", SAMPLE, f"me/{name}", labels]
    sampled = subprocess.run(words, env=environment(hub, tmp_path / "other"), capture_output=True, text=True)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.strip() == said


def test_a_busy_hub_is_asked_again_and_a_refusal_leaves_the_run_as_it_was(runs, hub, tmp_path):
    hub.refusals["/preupload/"] = [503]
    done = push(hub, tmp_path, runs["digits"], "me/digits", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["me/digits"]["private"]
    assert sum("/preupload/" in request for request in hub.requests) == 2

    card = (runs["digits"] / "README.md").read_bytes()
    refused = push(hub, tmp_path, runs["digits"], "me/digits", HF_TOKEN="hf_" + "wrong" * 6)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "the run is whole, and can be pushed again" in refused.stderr
    assert (runs["digits"] / "README.md").read_bytes() == card
    written = [content.decode("latin-1") for content in hub.files("me/digits").values()]
    for text in (refused.stderr, refused.stdout, done.stdout, done.stderr, *written):
        assert TOKEN not in text and "wrongwrong" not in text


def test_a_space_of_a_pushed_run_carries_its_demo(runs, hub, tmp_path):
    done = push(hub, tmp_path, runs["digits"], "me/digits", "--space", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == f"{hub.endpoint}/spaces/me/digits" and TOKEN not in done.stdout + done.stderr
    assert hub.repositories["spaces/me/digits"]["sdk"] == "gradio" and hub.repositories["spaces/me/digits"]["private"]
    assert "model_index.json" in hub.files("me/digits")
    files = hub.files("spaces/me/digits")
    assert not any(str(runs["digits"].parent).encode() in content for content in files.values())

    (tmp_path / "README.md").write_bytes(files["README.md"])
    data = RepoCard.load(tmp_path / "README.md").data.to_dict()
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py" and data["models"] == ["me/digits"]
    assert re.fullmatch(r"6\.\d+\.\d+", data["sdk_version"]) and data["title"] == "digits"
    needed = dict(line.split("==") for line in files["requirements.txt"].decode().splitlines())
    assert needed["diffusers"] == importlib.metadata.version("diffusers") and "+" not in needed["torch"]
    assert not {"gradio", "pytest", "bitsandbytes"} & set(needed)  # the first comes with the SDK

    again = push(hub, tmp_path, runs["digits"], "me/digits", "--space")
    assert again.returncode == 0, again.stderr
    hub.refusals["/api/spaces/"] = [403]
    refused = push(hub, tmp_path, runs["digits"], "me/digits", "--space")
    assert refused.returncode == 1 and "the Hub did not take the Space of" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_what_a_space_carries_serves_the_demo(runs, hub, tmp_path):
    pytest.importorskip("gradio")
    assert push(hub, tmp_path, runs["digits"], "me/digits", "--space").returncode == 0
    for path, content in hub.files("spaces/me/digits").items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = {"cwd": tmp_path / "space", "text": True, "stdout": subprocess.PIPE}
    run["env"] = environment(hub, tmp_path / "of-the-space", GRADIO_SERVER_PORT=str(port))
    ours = "import importlib.util as u; print(u.find_spec('hwdiffusion.demo').origin, u.find_spec('hwdiffusion.pipelines').origin)"  # noqa: E501
    found = subprocess.run([sys.executable, "-c", ours], check=True, **run).stdout.split()
    assert found == [str(tmp_path / "space" / "hwdiffusion" / name) for name in ("demo.py", "pipelines/__init__.py")]
    with subprocess.Popen([sys.executable, "app.py"], **run) as served:
        try:
            assert served.stdout.readline().startswith(f"me/digits: http://localhost:{port}/")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                page = json.load(answer)
        finally:
            served.terminate()
    assert "pictures" in [one["props"].get("label") for one in page["components"]]


def test_a_space_is_for_what_draws(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no pipeline, of which a Space could show a demo; leave --space out"):
        check_space(tmp_path)


def test_training_pushes_what_it_made(runs, hub, tmp_path):
    argv = ["--preset", runs["preset"], "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/made"]
    done = subprocess.run(command("train_ddpm", *argv), env=environment(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model_index.json" in hub.files("me/made")
    assert TOKEN not in done.stdout + done.stderr


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
    write_model_card(parse("train_ddpm", ["--preset", preset, "--output_dir", str(tmp_path)]), pipe, "Digits", 3)
    card = (tmp_path / "README.md").read_text()
    call = re.search(r"^image = pipe\((.*)\)\.images\[0\]$", card, re.MULTILINE).group(1)
    assert call == example and row in card
    assert ("in sets of at most 2" in card) == ("max_labels" in options)
    assert isinstance(eval(f"pipe({call})").images[0], Image.Image)
