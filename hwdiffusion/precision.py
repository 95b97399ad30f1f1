"""What a run computes in: whether bf16 pays on a device."""

import torch
from accelerate.utils import parse_flag_from_env


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bf16: GPUs since Ampere, CPUs with AVX512-BF16 or AMX. Where it
    has not, bf16 is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # a torch without it is not asked otherwise: float32
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def precision_here() -> str:
    """`bf16` where this process will train on a device that multiplies in it, else `no`."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    return "bf16" if multiplies_bf16(device) else "no"
