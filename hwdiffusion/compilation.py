"""`torch.compile` of what is trained.

A model is compiled in its place (`torch.nn.Module.compile`), so its class, its weights' names, averages and
checkpoints are those of one that isn't, and a run goes on compiled that began without. Only training steps are: they
are all of one size, while samples are drawn in many, each of which would be compiled anew.
"""

import contextlib
import logging

import torch
from accelerate.utils import TorchDynamoPlugin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from hwdiffusion.pipelines import has_cpp_compiler


REPEATED = (BasicTransformerBlock, ResnetBlock2D)  # what a UNet has many of, and is compiled of it by `regional`

logger = logging.getLogger(__name__)


def compile_in_place(model: torch.nn.Module, how: str, device: torch.device) -> bool:
    """Let `torch.compile` have a model's forward and backward pass; what can't be compiled runs as it would have.

    Args:
        how: `full`, the model as a whole; `regional`, each of its repeated blocks by itself, which takes less time to
            compile and leaves more undone; `no`. Backend, mode and dynamic shapes are what `accelerate launch` was
            told (`--dynamo_backend`, `--dynamo_mode`, `--dynamo_use_dynamic`).

    Returns:
        Whether it will be compiled: a CPU needs a C++ compiler for it, and without one a warning says that it won't.
    """
    options = TorchDynamoPlugin().to_kwargs()  # of the environment, and only what isn't torch.compile's own default
    if how == "no":
        return False
    if device.type == "cpu" and options.get("backend", "inductor") == "inductor" and not has_cpp_compiler():
        logger.warning("Nothing is compiled: that needs a C++ compiler on a CPU, such as g++, and there is none.")
        return False
    torch._dynamo.config.suppress_errors = True  # where a part can't be compiled, warn, and run it as it is
    parts = [model] if how == "full" else [part for part in model.modules() if isinstance(part, REPEATED)]
    for part in parts:
        part.compile(**options)
    return True


def eager(compiled: bool):
    """A context in which nothing is compiled, for drawing in the midst of a compiled training."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
