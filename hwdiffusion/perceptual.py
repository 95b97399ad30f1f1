"""How alike two pictures look: perceptual losses, of which the default needs no download."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from hwdiffusion import InputError
from hwdiffusion.places import is_here, load_own


PerceptualLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_perceptual_loss(name: str | None, shape: tuple[int, int, int]) -> PerceptualLoss:
    """A function of two batches of pictures `(B, C, H, W)` in [-1, 1] that gives a scalar.

    Args:
        name: `None` for the Laplacian pyramid, `lpips`, `MODULE:NAME`, or an image model of transformers.
        shape: `(C, H, W)` of the pictures.

    Raises:
        InputError: it can't be had, or can't compare pictures of that shape.
    """
    if name is None:
        return laplacian_pyramid_loss
    is_here(name, "--perceptual_model")
    try:
        loss = _load(name)
    except Exception as error:  # whatever a library or the user's module trips over
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--perceptual_model {name} can't be loaded: {reason}") from error
    try:
        one, other = torch.zeros(2, 1, *shape)
        value = loss(one.requires_grad_(), other)
        if not isinstance(value, torch.Tensor) or value.shape != ():
            given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"it must give one number, a tensor of shape (), not {given}")
        if not value.isfinite() or not value.requires_grad:
            raise ValueError("the number that it gives must be finite and have a gradient")
        value.backward()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        shown = "x".join(map(str, shape))
        raise InputError(f"--perceptual_model {name} can't compare pictures of {shown}: {reason}") from error
    return loss


def _load(name: str) -> PerceptualLoss:
    if name == "lpips":
        return LPIPSLoss()
    if ":" in name:
        return _of_users(name)
    from transformers import AutoModel

    return FeatureLoss(AutoModel.from_pretrained(name))


def _of_users(name: str) -> PerceptualLoss:
    made = load_own(name)()
    if not callable(made):
        raise ValueError(f"{name}() gives a {type(made).__name__}, which can't be called with two pictures")
    return made.eval().requires_grad_(False) if isinstance(made, nn.Module) else made


def laplacian_pyramid_loss(reconstruction: torch.Tensor, images: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """Lap1 (Bojanowski et al. 2018, section 3.3): absolute differences of Laplacian pyramids, coarse levels counting
    more, Σ 4^j |L_j(x) - L_j(y)| over the level's share of pixels; sharper edges than the pixels' own error. A scalar.
    """
    loss = images.new_zeros(())
    difference = reconstruction - images  # the pyramid is linear
    for _ in range(levels):
        if min(difference.shape[-2:]) < 2:
            break
        coarse = F.avg_pool2d(difference, 2, ceil_mode=True, count_include_pad=False)
        band = difference - F.interpolate(coarse, size=difference.shape[-2:], mode="bilinear", align_corners=False)
        loss = loss + band.abs().mean()
        difference = coarse
    return loss + difference.abs().mean()


class FeatureLoss(nn.Module):
    """Squared differences of the normalised hidden states of a `transformers` image model (as LPIPS without weights:
    Zhang et al. 2018, eq. 1); a scalar."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        loss = images.new_zeros(())
        states = [self._states(batch) for batch in (reconstruction, images)]
        for ours, theirs in zip(*states):
            channel = 1 if ours.ndim == 4 else -1  # (B, C, h, w) of a network with convolutions, (B, N, C) of a ViT
            difference = F.normalize(ours, dim=channel) - F.normalize(theirs, dim=channel)
            loss = loss + difference.pow(2).sum(dim=channel).mean()
        return loss / len(states[0])

    def _states(self, images):
        channels = self.model.config.num_channels
        images = images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images
        return self.model(pixel_values=images, output_hidden_states=True).hidden_states


class LPIPSLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) by the package `lpips`, which downloads VGG-16's weights; a scalar."""

    def __init__(self):
        super().__init__()
        try:
            from lpips import LPIPS
        except ImportError as error:
            raise ValueError("it needs `pip install lpips`") from error
        self.model = LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        # one channel is seen as three
        return self.model(*(batch.expand(-1, 3, -1, -1) for batch in (reconstruction, images))).mean()
