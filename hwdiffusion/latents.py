"""Latents of a whole data set: encoded once, measured, cached, served to the second stage.

Latents are what an autoencoder's `encode` gives: of a `VQModel` before quantisation, of an `AutoencoderKL` the mean.
What the UNet sees of them, `(latents - shift) * scale`, is defined by the pipeline (`scale_latents`).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from diffusers import VQModel
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hwdiffusion.data import ImageDataset, flip, to_model_range, views_of
from hwdiffusion.pipelines import raw_latents, scale_latents
from hwdiffusion.randomness import Draws


AT_ONCE = 2**20  # pixels of a slice that is encoded at once
OFF_CENTRE = 0.1  # deviations: nearer to zero than this, a mean does no harm


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


def slice_size(size: tuple[int, int]) -> int:
    """How many pictures of a height and width are encoded at once, at most 256."""
    return max(1, min(256, AT_ONCE // (size[0] * size[1])))


def how_many_tell(size: tuple[int, int]) -> int:
    """How many pictures of a height and width tell mean and deviation of the latents: 2,000 small ones to a percent or
    two; the larger they are, the fewer, and the more latents each has."""
    return max(256, min(2000, 2 * AT_ONCE // (size[0] * size[1])))


@torch.no_grad()
def encode_batches(vqvae, batches: Iterable[torch.Tensor], flips: bool) -> torch.Tensor:
    """Latents of batches of uint8 pictures `(B, C, H, W)`, float32 `(N, F, C, h, w)`, on the device."""
    slices = (part for images in batches for part in images.split(slice_size(images.shape[-2:])))
    return torch.cat([_encode(vqvae, images, flips) for images in slices])


def _encode(vqvae, images: torch.Tensor, flips: bool) -> torch.Tensor:
    views = views_of(to_model_range(images.to(vqvae.device)), flips).unbind(dim=1)
    return torch.stack([raw_latents(vqvae, view) for view in views], dim=1).float()  # (B, F, C, h, w)


@torch.no_grad()
def encode(vqvae, dataset: ImageDataset, flips: bool, batch_size: int | None = None) -> torch.Tensor:
    """Latents of all pictures, float32 `(N, F, C, h, w)`, on the CPU; the processes share the work."""
    batch_size = batch_size or slice_size(dataset[[0]][0].shape[-2:])
    count = len(dataset)
    batches = _encode_in_turn(vqvae, lambda places: dataset[places][0], count, flips, batch_size)
    total, hidden = -(-count // (batch_size * PartialState().num_processes)), not PartialState().is_main_process
    shown = tqdm(batches, total=total, desc="encoding", disable=hidden, leave=False)
    return torch.cat([latents.cpu() for latents in shown])[:count]


@torch.no_grad()
def encode_together(vqvae, images: torch.Tensor) -> torch.Tensor:
    """Latents of uint8 pictures `(N, C, H, W)` that every process has, float32 `(N, C, h, w)`, on the device and the
    same on every process; they share the work."""
    read, size = images.__getitem__, slice_size(images.shape[-2:])
    return torch.cat(list(_encode_in_turn(vqvae, read, len(images), False, size)))[: len(images), 0]


def turns(count: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """What this process does of some work on `count` pictures: their places, batch by batch, and how many of a batch
    are its own. With several processes every batch is whole, so that a gathering lines up; the surplus repeats the
    last picture, and comes last of all."""
    processes = PartialState()
    rank, world_size = processes.process_index, processes.num_processes
    for start in range(0, count, batch_size * world_size):
        first = start + rank * batch_size
        own = max(0, min(batch_size, count - first))
        size = batch_size if world_size > 1 else own
        yield [min(place, count - 1) for place in range(first, first + size)], own


def _encode_in_turn(
    vqvae, read: Callable[[list[int]], torch.Tensor], count: int, flips: bool, batch_size: int
) -> Iterator[torch.Tensor]:
    for places, _ in turns(count, batch_size):
        latents = _encode(vqvae, read(places), flips)
        yield gather(latents) if PartialState().num_processes > 1 else latents


def what_is_noised(config, latents: torch.Tensor, shift=0.0) -> torch.Tensor:
    """Latents `(..., C, h, w)`, shifted and scaled as the config of their autoencoder says.

    Args:
        shift: taken off the latents before, `(C, 1, 1)`.
    """
    return scale_latents(config, latents - shift)


def latents_to_sample(config, random_flip: bool, shift=0.0, encoder=None) -> Callable:
    """A function of what a data set gives and of a batch's draws, to what is noised, `(B, C, h, w)`.

    It takes latents `(B, F, C, h, w)`, of which it chooses a view; with an `encoder`, pictures `(B, C, H, W)`.

    Args:
        config: of the autoencoder, which tells the scale.
        shift: as in `what_is_noised`.
    """

    def to_sample(stored: torch.Tensor, draws: Draws) -> torch.Tensor:
        if encoder is None and stored.shape[1] == 1:
            latents = stored[:, 0]
        elif encoder is None:
            view = (draws.uniform("flip") * stored.shape[1]).long()
            latents = stored[torch.arange(len(stored), device=stored.device), view]
        else:
            chosen = draws.uniform("flip") < 0.5 * random_flip
            with torch.no_grad():
                latents = raw_latents(encoder, flip(to_model_range(stored), chosen)).float()
        return what_is_noised(config, latents, shift)

    return to_sample


def cached_latents(vqvae, dataset: ImageDataset, flips: bool, path: Path) -> LatentDataset:
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


def _fingerprint(vqvae, dataset: ImageDataset, flips: bool) -> str:
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


def standardised(vqvae, latents: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """The autoencoder to save with a UNet whose samples are to have mean 0 and variance 1, by measured latents.

    An `AutoencoderKL` or `AutoencoderTiny` gets `scaling_factor` and `shift_factor` into its config, a `VQModel` the
    first, and, where its latents are far off centre, is [`centred`].

    Args:
        latents: `(N, F, C, h, w)` of the training pictures, by this autoencoder.

    Returns:
        The autoencoder, and by how much its latents are less than the given one's, `(C, 1, 1)`.
    """
    if not isinstance(vqvae, VQModel):
        mean = latents.cpu().double().mean().item()
        vqvae.register_to_config(scaling_factor=measure_scaling_factor(latents), shift_factor=mean)
        return vqvae, torch.zeros(latents.shape[2], 1, 1)
    mean = latents.cpu().double().mean(dim=(0, 1, 3, 4))
    if mean.abs().max() * measure_scaling_factor(latents) > OFF_CENTRE and vqvae.config.norm_type != "spatial":
        return centred(vqvae, latents).eval().requires_grad_(False), mean.float()[:, None, None]
    vqvae.register_to_config(scaling_factor=measure_scaling_factor(latents))
    return vqvae, torch.zeros(latents.shape[2], 1, 1)
