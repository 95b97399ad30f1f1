"""What a process that computes on a CPU does about it: its threads, its memory, its attention."""

import ctypes
import os
import platform

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.overrides import TorchFunctionMode


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # that glibc takes, bytes
LARGEST_INT = 2**31 - 1
MOST_TOKENS = 256  # up to which attention in float32 is not slower


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


def choose_attention(unet: torch.nn.Module, mixed_precision: str, device: torch.device):
    """Let a UNet that trains on a CPU in bf16 compute its attention in float32, where that is faster."""
    if device.type == "cpu" and mixed_precision == "bf16":
        unet.set_attn_processor(Float32Attention())


class Float32Attention(AttnProcessor2_0):
    """diffusers' attention, but the product of few queries, keys and values is in float32 under autocast, too: in bf16
    the backward pass of torch's fused attention takes three times as long on a CPU at 16 tokens, about as long at 256,
    and less at 1,024."""

    def __call__(self, *args, **kwargs):
        with _FewInFloat32():
            return super().__call__(*args, **kwargs)


class _FewInFloat32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[0].shape[-2] > MOST_TOKENS:
            return function(*args, **(kwargs or {}))
        query, key, value = args
        with torch.autocast(query.device.type, enabled=False):
            return function(query.float(), key.float(), value.float(), **(kwargs or {})).to(query.dtype)
