"""Latents of a whole data set: encoded once, measured, cached, served to the second stage.

Latents are what `VQModel.encode` gives, before quantisation; `VQModel.decode` quantises.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from diffusers import VQModel
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hwdiffusion.data import ImageDataset, to_model_range


class LatentDataset:
    """Cached latents: `dataset[indices]` gives `(latents, labels)`, `(B, F, C, h, w)` and `(B, T)`.

    F is 2 if the mirrored pictures were encoded too, else 1.
    """

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor):
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.as_tensor(indices)
        return self.latents[indices], self.labels[indices]

    __getitems__ = __getitem__  # the name by which a DataLoader asks for a whole batch


@torch.no_grad()
def encode_batches(vqvae: VQModel, batches: Iterable[torch.Tensor], flips: bool) -> torch.Tensor:
    """Latents of batches of uint8 pictures `(B, C, H, W)`, float32 `(N, F, C, h, w)`, on the device."""
    return torch.cat([_encode(vqvae, images, flips) for images in batches])


def _encode(vqvae: VQModel, images: torch.Tensor, flips: bool) -> torch.Tensor:
    images = to_model_range(images.to(vqvae.device))
    views = [images, images.flip(-1)] if flips else [images]
    return torch.stack([vqvae.encode(view).latents for view in views], dim=1).float()  # (B, F, C, h, w)


@torch.no_grad()
def encode(vqvae: VQModel, dataset: ImageDataset, flips: bool, batch_size: int = 256) -> torch.Tensor:
    """Latents of all pictures, float32 `(N, F, C, h, w)`, on the CPU; the processes share the work."""
    processes = PartialState()
    rank, world_size = processes.process_index, processes.num_processes
    batches = []
    for start in tqdm(range(0, len(dataset), batch_size * world_size), desc="encoding", disable=rank > 0, leave=False):
        # every process has a whole batch, so that the gathering lines up; the surplus is cut off at the end
        first = start + rank * batch_size
        places = [min(first + offset, len(dataset) - 1) for offset in range(batch_size)]
        latents = _encode(vqvae, dataset[places][0], flips)
        batches.append((gather(latents) if world_size > 1 else latents).cpu())
    return torch.cat(batches)[: len(dataset)]


def cached_latents(vqvae: VQModel, dataset: ImageDataset, flips: bool, path: Path) -> LatentDataset:
    """Latents of a data set, read from the file if it holds those of this very autoencoder and data, else written."""
    key = _fingerprint(vqvae, dataset, flips)
    latents = None
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                latents = file.get_tensor("latents")
    processes = PartialState()
    if not all(gather_object([latents is not None])):  # all or none: encoding is done together
        latents = encode(vqvae, dataset, flips)
        if processes.is_main_process:
            part = path.with_name(path.name + ".part")
            save_file({"latents": latents.contiguous()}, part, metadata={"key": key})
            part.replace(path)
    return LatentDataset(latents, dataset.labels)


def _fingerprint(vqvae: VQModel, dataset: ImageDataset, flips: bool) -> str:
    digest = hashlib.sha256(f"{len(dataset)} {flips}".encode())
    for name, tensor in sorted(vqvae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    if dataset.images is not None:
        digest.update(dataset.images.numpy().tobytes())
    else:  # to read them all would cost as much as to encode them
        for place in range(0, len(dataset), max(1, len(dataset) // 1000)):
            digest.update(dataset.source.name(int(dataset.indices[place])).encode())
            digest.update(dataset[[place]][0].numpy().tobytes())
    return digest.hexdigest()


def measure_scaling_factor(latents: torch.Tensor) -> float:
    """1 / standard deviation of all latents, so that scaled ones have unit variance (Rombach et al. 2022, app. G)."""
    return 1.0 / latents.cpu().double().std().item()


def centred(vqvae: VQModel, latents: torch.Tensor) -> VQModel:
    """A copy whose latents have mean 0 in each channel and whose `scaling_factor` is measured.

    A stock `VQModel` has a scale but no shift, so the mean is folded into its weights: subtracted from `quant_conv`'s
    bias and from all codes, and given back by `post_quant_conv`. Latents and codes move together, so that every
    picture chooses the codes that it chose before, and reconstructions are the same.

    Args:
        latents: `(N, F, C, h, w)`, of the training pictures.
    """
    # not deep-copied: in training the model carries hooks that hold on to much more
    copied = VQModel.from_config(vqvae.config).to(vqvae.device)
    copied.load_state_dict(vqvae.state_dict())
    latents = latents.cpu().double()
    mean = latents.mean(dim=(0, 1, 3, 4), keepdim=True)
    if copied.config.norm_type == "spatial":  # its decoder also takes the codes themselves, which must not move
        mean = torch.zeros_like(mean)
    copied.register_to_config(scaling_factor=measure_scaling_factor(latents - mean))
    mean = mean.flatten().to(copied.quant_conv.bias)  # (C,)
    with torch.no_grad():
        copied.quant_conv.bias -= mean
        copied.quantize.embedding.weight -= mean
        copied.post_quant_conv.bias += copied.post_quant_conv.weight[:, :, 0, 0] @ mean
    return copied
