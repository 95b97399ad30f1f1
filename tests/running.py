"""Runs of the training scripts on tiny settings, in this process or in one that can be killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import PROJECTION, TINY_CRITIC, TINY_GENERATOR, TINY_UNET, TINY_VQVAE

from hwdiffusion.checkpoints import STATE_FILE
from hwdiffusion.figures import read_metrics
from hwdiffusion.train_scripts import train_classifier, train_ddpm, train_ldm, train_vqgan, train_wgan


ROOT = Path(__file__).resolve().parents[1]
MAIN = {
    "train_vqgan": train_vqgan.main,
    "train_ddpm": train_ddpm.main,
    "train_ldm": train_ldm.main,
    "train_wgan": train_wgan.main,
    "train_classifier": train_classifier.main,
}
# the plain `--num_processes 2 --cpu` would silently run one
LAUNCH_TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip

TINY_PRESET = {
    "dataset_name": "digits",
    "resolution": 16,
    "image_mode": "L",
    "max_train_samples": 100,
    "vqvae": TINY_VQVAE,
    "unet": {**TINY_UNET, **PROJECTION},
    "noise_scheduler": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "generator": TINY_GENERATOR,
    "critic": TINY_CRITIC,
    "classifier": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "lr_warmup_steps": 5,
    "max_train_steps": 40,
    "train_batch_size": 16,
    "checkpointing_steps": 4,
    "num_inference_steps": 2,
    "guidance_scale": 1.5,
    "random_flip": True,
    "train_vqgan": {"discriminator_weight": 0.5, "discriminator_start": 0.2, "discriminator_channels": 8,
                    "codebook_restart_steps": 3},
    "train_wgan": {"critic_steps": 2},
}  # fmt: skip


def write_preset(path: Path, preset: dict) -> str:
    path.write_text(yaml.safe_dump(preset))
    return str(path)


def command(script: str, *argv) -> list[str]:
    return [sys.executable, str(ROOT / "train_scripts" / f"{script}.py"), *map(str, argv)]


def final_state(run: Path) -> dict:
    """What the last checkpoint keeps, but for the time that it took."""
    return {key: value for key, value in _final(run).items() if key != "seconds"}


def seconds_taken(run: Path) -> float:
    return _final(run)["seconds"]


def _final(run: Path) -> dict:
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return torch.load(newest / STATE_FILE, weights_only=True)


def assert_identical(ours, theirs, where="state"):
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_identical(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs)):
            assert_identical(one, other, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def signal_once(
    ready, argv: list[str], number: int = signal.SIGKILL, then_wait: float = 0.0, env: dict | None = None
) -> tuple[int, str]:
    """Start a run in a process of its own, and send it a signal as soon as `ready()`, or some seconds later.

    Returns:
        Its exit code and what it said on stderr.
    """
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    try:
        deadline = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(then_wait)
    except BaseException:
        process.kill()
        raise
    process.send_signal(number)
    _, said = process.communicate()
    return process.returncode, said


def kill_once_it_has(path: Path, argv: list[str]):
    """Start a run in a process of its own and kill it with SIGKILL as soon as a path exists."""
    code, said = signal_once(path.exists, argv)
    assert code == -signal.SIGKILL, f"the run was over before it could be killed: {said}"


# What tells of the machine and of interruptions; all else in a metrics.jsonl is a function of the configuration.
OF_THE_MACHINE = ("images_per_second", "peak_memory_gb")


def losses(metrics: Path) -> list[dict]:
    """The lines of a metrics.jsonl without what tells of the machine."""
    lines = read_metrics(metrics)
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


def curves(run: Path) -> np.ndarray:
    """The loss, or the error of reconstructions, of every step of a metrics.jsonl."""
    return np.array([line["mse_loss"] if "mse_loss" in line else line["loss"] for line in read_metrics(run)])
