"""`hwdiffusion doctor`: what is installed, what the machine has, and what is missing for what."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil

from hwdiffusion import InputError, __version__


CORE = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub")
EXTRAS = {  # the module that an extra is for, and what it does
    "8bit": ("bitsandbytes", "--use_8bit_adam"),
    "demo": ("gradio", "hwdiffusion demo"),
    "fid": ("torch_fidelity", "--extractor inception"),
    "completion": ("shtab", "hwdiffusion completion"),
}


def examine() -> dict:
    """Versions, devices, memory in GiB, extras: whether they are there, and how they are installed."""
    missing = [name for name in CORE if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} is missing, which hwdiffusion needs; install it anew by pip")
    import psutil
    import torch

    from hwdiffusion.precision import multiplies_bf16

    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = multiplies_bf16(torch.device("cpu"))
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "hwdiffusion": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in CORE},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": capability,
            "multiplies_bf16": bf16,
        },
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "free_memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "extras": {
            extra: {"installed": importlib.util.find_spec(module) is not None, "for": what}
            for extra, (module, what) in EXTRAS.items()
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_examination(as_json: bool):
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"hwdiffusion {found['hwdiffusion']}, Python {found['python']}")
    print(", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items()))
    cpu = found["cpu"]
    print(
        f"{cpu['cores']} CPU cores, of which torch uses {cpu['threads']}, with {cpu['instructions']}, "
        f"{'which multiply' if cpu['multiplies_bf16'] else 'without instructions for'} bf16"
    )
    print(f"{found['free_memory_gib']} of {found['memory_gib']} GiB of memory free, {found['free_disk_gib']} of disk")
    for gpu in found["gpus"]:
        print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB")
    if not found["gpus"]:
        print("no GPU: the presets for a CPU say so (`hwdiffusion presets`)")
    for extra, state in found["extras"].items():
        cure = "there" if state["installed"] else f'missing; pip install "hwdiffusion[{extra}]"'
        print(f"extra {extra}, for {state['for']}: {cure}")
