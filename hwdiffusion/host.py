"""What a process that computes on a CPU does about it: its threads, its memory, its attention."""

import ctypes
import os
import platform

import torch
from diffusers.models.attention_processor import AttnProcessor


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # that glibc takes, bytes
LARGEST_INT = 2**31 - 1
MOST_TOKENS = 64  # at which attention by matrix products is faster


def prepare_host(device: torch.device):
    """Called before a process trains or samples; again, it does no harm."""
    if device.type == "cpu":
        use_all_cores()
        keep_freed_memory()


def use_all_cores():
    """Undo what `accelerate launch` does to a process on a CPU: it gives it one thread unless told otherwise, which
    halves the speed or worse."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, cores // local_processes))


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, for what is asked for next; whether it does.

    By default it gives activations of some megabytes back to the system, step by step, and gets them again as pages
    that the kernel has to clear: an eighth of a step of a small UNet in batches of 128. Settings of the
    environment (`MALLOC_…`, `GLIBC_TUNABLES`), other allocators and other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        return False
    if "LD_PRELOAD" in os.environ:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) == 1
    return mallopt(M_TRIM_THRESHOLD, LARGEST_INT) == 1 and kept


def choose_attention(unet, mixed_precision: str, device: torch.device):
    """Where a UNet trains on a CPU in bf16 on few tokens, let its attention multiply matrices: forward and backward of
    64 sets of 16 tokens take 0.6 ms then, by torch's fused attention 2.0 ms; at 200 tokens it is the other way round,
    and in float32 always."""
    size = unet.config.sample_size
    tokens = size * size if isinstance(size, int) else size[0] * size[1]  # of its finest level
    if device.type == "cpu" and mixed_precision == "bf16" and tokens <= MOST_TOKENS:
        unet.set_attn_processor(AttnProcessor())
