"""`torch.compile` of what is trained.

A model is compiled in its place (`torch.nn.Module.compile`), so its class, its weights' names, averages and
checkpoints are those of one that isn't, and a run goes on compiled that began without. Only training steps are: they
are all of one size, while samples are drawn in many, each of which would be compiled anew.
"""

import contextlib
import os
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from hwdiffusion import InputError
from hwdiffusion.pipelines import can_compile


REPEATED = (BasicTransformerBlock, ResnetBlock2D)  # the blocks of which a UNet has many


def check_compilation(how: str):
    """Raise InputError where `accelerate launch` was told to compile by what torch doesn't have here."""
    if how == "no":
        return
    try:
        backend = _options().get("backend", "inductor")
        torch._dynamo.lookup_backend(backend)
    except (ValueError, torch._dynamo.exc.InvalidBackend, ImportError) as error:
        raise InputError(
            f"--dynamo_backend {os.environ['ACCELERATE_DYNAMO_BACKEND'].lower()} is none of torch's backends here "
            f"({', '.join(torch._dynamo.list_backends())}); launch with one of them, or give --torch_compile no"
        ) from error


def compile_in_place(model: torch.nn.Module, how: str, device: torch.device) -> bool:
    """Compile a model's forward and backward pass; a part that can't be compiled runs as it is, with a warning.

    Args:
        how: `full`: the model as a whole; `regional`: each of its repeated blocks by itself, which takes less time to
            compile, but leaves what is between the blocks as it is; `no`. Backend, mode and dynamic shapes are what
            `accelerate launch` was told (`--dynamo_backend`, `--dynamo_mode`, `--dynamo_use_dynamic`).

    Returns:
        Whether it will be compiled: a CPU needs a C++ compiler for it, and without one a warning says that it won't.
    """
    if how == "no":
        return False
    options = _options()
    if not can_compile(device, options.get("backend", "inductor")):
        return False
    parts = [model] if how == "full" else [part for part in model.modules() if isinstance(part, REPEATED)]
    dynamo = torch._dynamo.config
    dynamo.suppress_errors = True  # where a part can't be compiled, warn, and run it as it is
    # Blocks of one class share their code, and of one code no more than so many variants are compiled: a block for
    # each of its shapes, with gradients and without.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(parts))
    for part in parts:
        part.compile(**options)
    return True


def _options() -> dict[str, Any]:
    """Of torch.compile, by what `accelerate launch` leaves in the environment; shapes are fixed, as a step's are."""
    return {"dynamic": False, **TorchDynamoPlugin().to_kwargs()}


def eager(compiled: bool):
    """A context in which nothing is compiled, for drawing in the midst of a compiled training."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
