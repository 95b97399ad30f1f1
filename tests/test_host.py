"""What a process on a CPU does about its threads, its memory and its attention."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_UNET
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from hwdiffusion.host import choose_attention
from hwdiffusion.models import build_unet
from hwdiffusion.train_scripts import train_ddpm


PROGRAM = """
import resource, sys
import torch
from hwdiffusion.host import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    [torch.ones(2**20) for _ in range(10)]  # 4 MiB each
before = faults()
for _ in range(50):
    [torch.ones(2**20) for _ in range(10)]
print(kept, faults() - before)
"""


def run(what: str, **environment) -> tuple[str, int]:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    kept, faults = said.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_asking_the_system_for_it():
    kept, faults = run("kept")
    assert kept == "True"
    mapped_anew = run("left", MALLOC_MMAP_THRESHOLD_="65536")[1]  # as glibc may do by itself, or not
    assert mapped_anew >= 500  # one for each tensor at the least, if pages are huge
    assert faults < mapped_anew / 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_the_environment_says_of_malloc_is_left_alone():
    assert run("kept", MALLOC_ARENA_MAX="2")[0] == "False"


THREADS = """
import torch
from hwdiffusion.host import prepare_host

prepare_host(torch.device("cpu"))
print(torch.get_num_threads())
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    "launched, threads",
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, CORES),
        ({"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2"}, max(1, CORES // 2)),
        ({}, 1),  # one thread was asked for
    ],
)
def test_a_launched_process_has_its_share_of_the_cores(launched, threads):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    environment = {**environment, "OMP_NUM_THREADS": "1", **launched}
    said = subprocess.run([sys.executable, "-c", THREADS], env=environment, check=True, stdout=subprocess.PIPE)
    assert int(said.stdout) == threads


def test_training_sets_its_host_and_its_attention_up(preset, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("hwdiffusion.trainer.prepare_host", lambda device: done.append(("host", device.type)))
    chosen = lambda unet, precision, device: done.append((type(unet).__name__, precision, device.type))  # noqa: E731
    monkeypatch.setattr("hwdiffusion.host.choose_attention", chosen)
    argv = ["--preset", preset, "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert train_ddpm.main(argv) == 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert ("host", device) in done and ("UNet2DConditionModel", "no", device) in done


@pytest.mark.parametrize("tokens, expected", [(16, torch.float32), (400, torch.bfloat16)])
def test_attention_of_few_tokens_is_in_float32_where_a_cpu_trains_in_bf16(tokens, expected):
    dtypes = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                dtypes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    attention = Attention(8, heads=2, dim_head=4)
    hidden = torch.randn(3, tokens, 8)
    plain = attention(hidden)
    unet = SimpleNamespace(set_attn_processor=attention.set_processor)
    choose_attention(unet, "bf16", torch.device("cpu"))
    assert torch.equal(attention(hidden), plain)  # without autocast it is the same
    with torch.autocast("cpu", torch.bfloat16), Noting():
        output = attention(hidden)
    assert dtypes == [expected] and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("precision, device", [("no", "cpu"), ("bf16", "cuda"), ("fp16", "cuda")])
def test_attention_is_left_alone_elsewhere(precision, device):
    unet = build_unet(TINY_UNET, (1, 8, 8), 0)
    choose_attention(unet, precision, torch.device(device))
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
