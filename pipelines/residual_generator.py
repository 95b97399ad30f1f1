"""The generator of a GAN: noise and labels to pictures, by residual up-sampling blocks.

diffusers ships no such model, so every saved pipeline carries a copy of this file beside the weights. It imports torch
and diffusers, and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class ResidualGenerator(ModelMixin, ConfigMixin):
    """A residual generator as that of Gulrajani et al. 2017, conditioned on labels.

    Noise and the embedding of the labels, side by side, become the coarsest feature map; each block then doubles its
    sides. With `conditional_norm`, the labels also scale and shift what every norm gives (conditional batch norm,
    de Vries et al. 2017; by groups where the norm is one of groups).

    Args:
        sample_size: height and width of pictures, or one number for both; divisible by 2^(blocks), the number of
            blocks being one less than that of `block_out_channels`.
        out_channels: of pictures.
        num_classes: K; 0 makes it unconditional.
        latent_dim: Z, the length of noise.
        label_dim: the length of the labels' embedding.
        block_out_channels: the width at each resolution, the finest first, as in diffusers' UNets.
        norm_type: `group`, by which a picture never depends on its batch; or `batch`, which in training takes the
            statistics of one process's batch.
        norm_num_groups: of the group norm; divides every width.
        conditional_norm: whether labels scale and shift, too.

    Raises:
        ValueError: sizes that don't fit each other, or another norm.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        out_channels: int = 3,
        num_classes: int = 0,
        latent_dim: int = 128,
        label_dim: int = 64,
        block_out_channels: Sequence[int] = (64, 128, 128, 128),
        norm_type: str = "group",
        norm_num_groups: int = 8,
        conditional_norm: bool = True,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        factor = 2 ** (len(block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"sample_size {height}x{width} is not divisible by {factor}, by which {len(block_out_channels)} "
                "block_out_channels scale it"
            )
        if norm_type not in ("group", "batch"):
            raise ValueError(f"norm_type must be 'group' or 'batch', not {norm_type!r}")
        if norm_type == "group" and any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(
                f"block_out_channels {list(block_out_channels)} must be divisible by norm_num_groups {norm_num_groups}"
            )
        widths = list(block_out_channels)[::-1]  # the coarsest first, as they are passed
        self.coarsest = (widths[0], height // factor, width // factor)
        self.label_embedding = nn.Linear(num_classes, label_dim) if num_classes else None
        label_dim = label_dim if num_classes else 0
        self.conv_in = nn.Linear(latent_dim + label_dim, self.coarsest[0] * self.coarsest[1] * self.coarsest[2])
        norm = (norm_type, norm_num_groups, label_dim if conditional_norm else 0)
        self.up_blocks = nn.ModuleList(UpBlock(*pair, norm) for pair in zip(widths, widths[1:]))
        self.norm_out = LabelledNorm(widths[-1], *norm)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, noise: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Draw pictures.

        Args:
            noise: standard normal, `(B, Z)`.
            tokens: one-hot labels `(B, T, K)`, of which it takes the sum over T; `None` if K is 0.

        Returns:
            `(B, C, H, W)` in [-1, 1].
        """
        labels = None
        if self.label_embedding is not None:
            labels = self.label_embedding(tokens.to(noise.dtype).sum(dim=1))  # (B, E)
            noise = torch.cat([noise, labels], dim=1)
        hidden = self.conv_in(noise).view(-1, *self.coarsest)
        for block in self.up_blocks:
            hidden = block(hidden, labels)
        return torch.tanh(self.conv_out(F.silu(self.norm_out(hidden, labels))))


class UpBlock(nn.Module):
    """A pre-activated residual block that doubles both sides, `(B, C, h, w)` → `(B, D, 2h, 2w)`."""

    def __init__(self, in_channels: int, out_channels: int, norm: tuple[str, int, int]):
        super().__init__()
        self.norm1, self.norm2 = LabelledNorm(in_channels, *norm), LabelledNorm(out_channels, *norm)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        residual = F.silu(self.norm1(hidden, labels))
        residual = self.conv1(F.interpolate(residual, scale_factor=2.0, mode="nearest"))
        residual = self.conv2(F.silu(self.norm2(residual, labels)))
        return residual + F.interpolate(self.shortcut(hidden), scale_factor=2.0, mode="nearest")


class LabelledNorm(nn.Module):
    """Group or batch norm; with a `label_dim` its scale and shift are linear in the labels' embedding `(B, E)`, and
    start at 1 and 0."""

    def __init__(self, channels: int, norm_type: str, norm_num_groups: int, label_dim: int):
        super().__init__()
        affine = label_dim == 0
        if norm_type == "batch":
            self.norm = nn.BatchNorm2d(channels, affine=affine)
        else:
            self.norm = nn.GroupNorm(norm_num_groups, channels, affine=affine)
        self.modulation = None
        if label_dim:
            self.modulation = nn.Linear(label_dim, 2 * channels)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        hidden = self.norm(hidden)
        if self.modulation is None:
            return hidden
        scale, shift = self.modulation(labels)[:, :, None, None].chunk(2, dim=1)  # each (B, C, 1, 1)
        return hidden * (1 + scale) + shift
