"""What a process on a CPU does about its threads, its memory and its attention."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import TINY_UNET
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from hwdiffusion.host import choose_attention
from hwdiffusion.models import build_unet


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


@pytest.mark.parametrize(
    "size, precision, device, expected",
    [
        (8, "bf16", "cpu", AttnProcessor),
        (10, "bf16", "cpu", AttnProcessor2_0),
        (8, "no", "cpu", AttnProcessor2_0),
        (8, "bf16", "cuda", AttnProcessor2_0),
    ],
)
def test_attention_is_that_which_trains_faster(size, precision, device, expected):
    unet = build_unet(TINY_UNET, (1, size, size), 0)
    choose_attention(unet, precision, torch.device(device))
    assert {type(processor) for processor in unet.attn_processors.values()} == {expected}
