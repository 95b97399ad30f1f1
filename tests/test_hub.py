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
import yaml
from hub_server import LoopbackHub
from huggingface_hub import HfApi, ModelCard, RepoCard, constants
from running import TINY_PRESET, command, write_preset
from tiny import make_gan

from hwdiffusion import InputError, RunError, cli
from hwdiffusion.hub import contents_to_push, push
from hwdiffusion.space import check_space
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_ldm


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
    return {"digits": folder / "digits", "shapes": folder / "shapes", "preset": digits, "folder": folder}


def environment(hub, folder, **more) -> dict[str, str]:
    """Of a user who has logged in to the loopback Hub, and of a cache of his own."""
    home = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_ENDPOINT": hub.endpoint}
    without = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in without}
    alone = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **home, **alone, "HF_TOKEN": TOKEN, **more}


def pushed(hub, folder, run, *argv, **more) -> subprocess.CompletedProcess:
    """`hwdiffusion push` in a process of its own."""
    words = [sys.executable, "-m", "hwdiffusion.cli", "push", str(run), *argv]
    return subprocess.run(words, env=environment(hub, folder, **more), capture_output=True, text=True)


@pytest.fixture
def logged_in(hub, monkeypatch):
    """This process as one of a user of the loopback Hub: what takes seconds to start a process for is done here."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return HfApi(hub.endpoint, token=TOKEN)


WITHOUT_THE_PACKAGE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hwdiffusion":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
"""
SAMPLE = """
from diffusers import DiffusionPipeline

name, call, revision = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, revision=revision)
image = pipe(**json.loads(call)).images[0]
print(image.size, len(pipe.id2label))
"""
CLASSIFY = """
import torch
from transformers import ResNetForImageClassification

model = ResNetForImageClassification.from_pretrained(sys.argv[1]).eval()
print(tuple(model(pixel_values=torch.zeros(2, model.config.num_channels, *model.config.image_size)).logits.shape))
"""


def loaded(hub, folder, script: str, *argv: str) -> str:
    """What a script says in a process where this package can't be imported, with a cache of its own."""
    words = [sys.executable, "-c", WITHOUT_THE_PACKAGE + script, *argv]
    done = subprocess.run(words, env=environment(hub, folder / "other"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "call", "said"),
    [
        ("digits", '{"labels": [3], "num_inference_steps": 2}', "(16, 16) 10"),
        ("shapes", '{"labels": [["red cube", "cyan sphere"]], "num_inference_steps": 2}', "(16, 16) 24"),
    ],
)
def test_a_pushed_run_is_loaded_by_stock_diffusers_where_the_package_is_not(name, call, said, runs, hub, tmp_path):
    done = pushed(hub, tmp_path, runs[name], f"me/{name}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{hub.endpoint}/me/{name}")
    files = hub.files(f"me/{name}")
    assert {"model_index.json", "README.md", "config.yaml", "samples.png"} <= set(files)
    assert not any("checkpoint" in path or "latents" in path for path in files)
    assert files["README.md"].decode().count(f'from_pretrained("me/{name}"') == 2
    assert len([path for path in files if path.startswith("pipeline_")]) == 1
    large = hub.large_files(f"me/{name}")
    assert "unet/diffusion_pytorch_model.safetensors" in large and "unet/config.json" not in large

    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and "class-conditional" in card.data.tags
    assert "More Information Needed" not in card.text and "max_train_steps: 2" in card.text
    assert f"hwdiffusion train {'ldm' if name == 'digits' else 'ddpm'} --preset {name}.yaml --output_dir" in card.text
    texts = [content.decode("latin-1") for content in files.values()]
    assert not any(str(runs["folder"]) in text or TOKEN in text for text in texts)  # no path of this machine

    assert loaded(hub, tmp_path, SAMPLE, f"me/{name}", call, "main") == said
    assert not any("Authorization" in headers or "authorization" in headers for headers in hub.open_headers)
    assert any(request.startswith("GET /lfs/") for request in hub.requests)


def test_a_gan_travels_with_its_generator_and_every_revision_stays(runs, hub, logged_in, tmp_path):
    run = tmp_path / "gan"
    make_gan((1, 16, 16)).save_pretrained(run)
    (run / "README.md").write_text("A generator.\n")
    push(run, "me/gan")
    files = hub.files("me/gan")
    sources = [path for path in files if path.endswith(".py")]
    assert sorted(path.split("/")[0].split("_")[0] for path in sources) == ["generator", "pipeline"]
    logged_in.create_branch("me/gan", branch="v1")
    before = hub.commits("me/gan")[-1]

    make_gan((1, 8, 8)).save_pretrained(run)  # another model in its place
    push(run, "me/gan")
    call = '{"labels": ["wild"]}'
    assert loaded(hub, tmp_path, SAMPLE, "me/gan", call, "v1") == "(16, 16) 3"
    assert hub.commits("me/gan")[-1] != before and hub.at("me/gan", before)
    assert hub.files("me/gan", before) == files and hub.files("me/gan", "v1") == files
    assert loaded(hub, tmp_path / "again", SAMPLE, "me/gan", call, "main") == "(8, 8) 3"


def test_a_classifier_is_pushed_as_a_model_of_transformers(runs, hub, logged_in, tmp_path):
    run = tmp_path / "judge"
    argv = ["--preset", runs["preset"], "--output_dir", str(run), "--push_to_hub", "--hub_model_id", "me/judge"]
    assert train_classifier.main(argv) == 0
    card = ModelCard(hub.files("me/judge")["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy" and result.dataset_name == "digits" and result.metric_args["n"] == 180
    assert 'ResNetForImageClassification.from_pretrained("me/judge")' in card.text
    assert "hwdiffusion train classifier" in card.text and str(tmp_path) not in card.text
    assert hub.large_files("me/judge") == ["loss.png", "model.safetensors"]
    assert loaded(hub, tmp_path, CLASSIFY, "me/judge") == "(2, 10)"


def test_an_autoencoder_is_pushed_by_itself(runs, hub, logged_in):
    push(runs["digits"] / "first-stage", "me/vqvae")
    files = hub.files("me/vqvae")
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers" and "autoencoder" in card.data.tags
    assert {result.metric_type for result in card.data.eval_results} >= {"psnr", "ssim"}
    assert 'VQModel.from_pretrained("me/vqvae")' in card.text
    assert {"config.json", "diffusion_pytorch_model.safetensors", "samples.png"} <= set(files)
    assert not any("checkpoint" in path for path in files)


def test_what_was_pushed_is_pushed_again_only_where_it_changed(runs, hub, logged_in, tmp_path):
    push(runs["digits"], "me/digits")
    commits, objects = hub.commits("me/digits"), dict(hub.objects)
    puts = sum(request.startswith("PUT") for request in hub.requests)
    push(runs["digits"], "me/digits")
    assert hub.commits("me/digits") == commits
    assert sum(request.startswith("PUT") for request in hub.requests) == puts

    stale = {"pipeline_of_before.py": b"raise SystemExit", "mine.txt": b"a note of somebody"}
    hub.commit("me/digits", "main", stale, [])
    push(runs["digits"], "me/digits")
    left = hub.files("me/digits")
    assert "pipeline_of_before.py" not in left and "mine.txt" in left and hub.objects == objects


def test_a_busy_hub_is_asked_again_and_a_refusal_leaves_the_run_as_it_was(runs, hub, logged_in, tmp_path):
    hub.refusals = {"/preupload/": [503], "PUT /lfs/": [500], "/lfs/verify": [503]}
    run = runs["digits"]
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    push(run, "me/digits", private=True)
    assert hub.repositories["me/digits"]["private"] and not any(hub.refusals.values())

    hub.objects.clear(), hub.verified.clear()  # a storage that lost them, and then refuses them
    hub.refusals = {"PUT /lfs/": [403] * 20}
    with pytest.raises(RunError, match="the run is whole, and can be pushed again") as refused:
        push(run, "me/again")
    assert "403" in str(refused.value) and "signature" not in str(refused.value)
    assert len(hub.commits("me/again")) == 1  # nothing but the empty repository
    hub.refusals = {}
    push(run, "me/again")
    assert "model_index.json" in hub.files("me/again")
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


def test_a_wrong_token_is_named_by_nothing(runs, hub, tmp_path):
    wrong = "hf_" + "wrong" * 6
    refused = pushed(hub, tmp_path, runs["digits"], "me/digits", HF_TOKEN=wrong)
    assert refused.returncode == 1
    *before, said = refused.stderr.strip().splitlines()  # where others may say what they miss
    assert "401" in said and said.endswith("the run is whole, and can be pushed again")
    assert not any("Traceback" in line for line in before) and wrong not in refused.stderr + refused.stdout


def test_nobody_who_is_not_logged_in_is_let_to_wait(runs, monkeypatch, capsys):
    monkeypatch.setattr("hwdiffusion.hub.get_token", lambda: None)
    assert cli.main(["push", str(runs["digits"]), "me/digits"]) == 2
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_what_is_told_of_a_run_tells_nothing_of_the_machine(runs, tmp_path):
    """Also where a path stands where no path is expected, and a token where none belongs."""
    run = tmp_path / "run"
    run.mkdir()
    settings = {
        "script": "train_ldm",
        "train_ldm": {"train_data_dir": "/home/me/pictures", "vqvae": "../vqvae", "dataset_name": "me/pictures"},
        "train_vqgan": {"perceptual_model": "/home/me/models/vgg", "sample_steps": [1, 2]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "config.json").write_text("{}")
    (run / "README.md").write_text(f'See {TOKEN}, and VQModel.from_pretrained("run") but from_pretrained("you/x").')
    contents = contents_to_push(run, "me/run")
    told = yaml.safe_load(contents["config.yaml"])
    assert told["train_ldm"] == {"train_data_dir": "pictures", "vqvae": "vqvae", "dataset_name": "me/pictures"}
    assert told["train_vqgan"] == {"perceptual_model": "vgg", "sample_steps": [1, 2]}
    card = contents["README.md"].decode()
    assert TOKEN not in card and 'from_pretrained("me/run") but from_pretrained("you/x")' in card


def test_training_pushes_what_it_made(runs, hub, tmp_path):
    argv = ["--preset", runs["preset"], "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/made"]
    done = subprocess.run(command("train_ddpm", *argv), env=environment(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model_index.json" in hub.files("me/made")
    assert re.search(rf"^{hub.endpoint}/me/made$", done.stdout, re.MULTILINE)
    assert TOKEN not in done.stdout + done.stderr


def test_a_space_of_a_pushed_run_carries_its_demo(runs, hub, tmp_path):
    done = pushed(hub, tmp_path, runs["digits"], "me/digits", "--space", "--private")
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

    again = pushed(hub, tmp_path, runs["digits"], "me/digits", "--space")
    assert again.returncode == 0, again.stderr
    hub.refusals["/api/spaces/"] = [403]
    refused = pushed(hub, tmp_path, runs["digits"], "me/digits", "--space")
    assert refused.returncode == 1 and "the Hub did not take the Space of" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_what_a_space_carries_serves_the_demo(runs, hub, tmp_path):
    pytest.importorskip("gradio")
    assert pushed(hub, tmp_path, runs["digits"], "me/digits", "--space").returncode == 0
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
