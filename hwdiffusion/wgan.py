"""The Wasserstein GAN with gradient penalty (Gulrajani et al. 2017): its losses, its critic, and what a generator with
batch norm needs before it is looked at. The generator travels in saved folders: `pipelines/residual_generator.py`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm as normalised_spectrally

from hwdiffusion.randomness import Draws


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def critic_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor) -> torch.Tensor:
    """E[D(x̃)] - E[D(x)], the first two terms of eq. 3; its negative, the gap, estimates the Wasserstein distance of
    real and generated pictures. Scores are `(B,)`, the loss is a scalar."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores: torch.Tensor) -> torch.Tensor:
    """-E[D(x̃)]; scores are `(B,)`, the loss is a scalar."""
    return -fake_scores.mean()


def gradient_penalty(
    critic: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    mix: torch.Tensor,
    *conditions: torch.Tensor | None,
) -> torch.Tensor:
    """E[(‖∇D(x̂)‖₂ - 1)²] at x̂ = ε x + (1 - ε) x̃: the last term of eq. 3 but for its weight λ; a scalar.

    It is taken in float32 whatever the training's precision: a gradient of many small parts would underflow in
    float16, which the scaling of a loss doesn't prevent, since the gradient is inside of the loss.

    Args:
        critic: samples and conditions to scores `(B,)`, a sample's score being a function of that sample alone. It may
            not cast by itself: give a method that `accelerate` hasn't wrapped, as `ProjectionCritic.scores`.
        real, fake: x and x̃, `(B, ...)`, of the same conditions.
        mix: ε, uniform in [0, 1], `(B,)`.
        conditions: what the critic takes besides; label tokens.
    """
    mix = mix.view(-1, *[1] * (real.ndim - 1)).float()
    between = (mix * real.float() + (1 - mix) * fake.float()).detach().requires_grad_()
    with torch.autocast(between.device.type, enabled=False):
        # the gradient of the sum is that of each sample's own score
        (gradient,) = torch.autograd.grad(critic(between, *conditions).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# The critic
# ---------------------------------------------------------------------------------------------------------------------


class ProjectionCritic(nn.Module):
    """A residual critic that is told labels by projection (Miyato and Koyama 2018): D(x, y) = ψ(φ(x)) + ⟨V y, φ(x)⟩.

    φ(x) is the sum of the last feature map over all places. It has no norm: the penalty is on the gradient at each
    picture, which statistics of a batch would mix up.

    Args:
        in_channels: of pictures.
        num_classes: K; 0 makes it unconditional.
        block_out_channels: the width at each resolution, the finest first; each but the last is halved.
        patch_size: how many times smaller than a picture the finest one is, on each side: the first convolution's
            stride. Most of what a critic costs is its finest resolution.
        spectral_norm: divide every weight by its largest singular value (Miyato et al. 2018), besides the penalty.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        block_out_channels: Sequence[int] = (64, 128, 128, 128),
        patch_size: int = 1,
        spectral_norm: bool = False,
    ):
        super().__init__()
        widths = list(block_out_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], patch_size + 2, stride=patch_size, padding=1)
        self.down_blocks = nn.ModuleList(CriticBlock(*pair, halve=True) for pair in zip(widths, widths[1:]))
        self.mid_block = CriticBlock(widths[-1], widths[-1], halve=False)
        self.score = nn.Linear(widths[-1], 1)
        self.label_embedding = nn.Linear(num_classes, widths[-1], bias=False) if num_classes else None
        if spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    normalised_spectrally(module)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Scores `(B,)` of pictures `(B, C, H, W)` in [-1, 1] with label tokens `(B, T, K)`, or `None` if K is 0."""
        return self.scores(images, tokens)

    def scores(self, images: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """As `forward`, but always in the precision of what it is given."""
        hidden = self.conv_in(images)
        for block in self.down_blocks:
            hidden = block(hidden)
        features = F.leaky_relu(self.mid_block(hidden), 0.2).sum(dim=(2, 3))  # (B, C)
        scores = self.score(features).squeeze(1)
        if self.label_embedding is not None:
            labels = self.label_embedding(tokens.to(images.dtype).sum(dim=1))  # (B, C): of a set the sum
            scores = scores + (labels * features).sum(dim=1)
        return scores


class CriticBlock(nn.Module):
    """A pre-activated residual block, `(B, C, h, w)` → `(B, D, h, w)`, or with `halve` → `(B, D, h/2, w/2)`."""

    def __init__(self, in_channels: int, out_channels: int, halve: bool):
        super().__init__()
        self.halve = halve
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = F.leaky_relu(self.conv1(F.leaky_relu(hidden, 0.2)), 0.2)
        if self.halve:
            residual, hidden = F.avg_pool2d(residual, 2), F.avg_pool2d(hidden, 2)
        return self.shortcut(hidden) + self.conv2(residual)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_statistics(generator, tokens: torch.Tensor | None, seed: int, batch_size: int, batches: int = 16):
    """Within it the batch norms of a generator have statistics of the weights that it has now, where it has any: the
    standing statistics of Brock et al. 2019.

    Those that training gathers are of weights of the past, and averaged weights have never been trained with at all.

    Args:
        tokens: of labels to take them over, `(N, T, K)`, in turn; `None` without labels.
        seed: of the noise.
        batch_size, batches: how many pictures, and how often.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        yield
        return
    kept = [({name: buffer.clone() for name, buffer in norm.named_buffers()}, norm.momentum) for norm in norms]
    training = generator.training
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        generator.train()
        with torch.no_grad():
            for noise, labels in _batches(generator, tokens, seed, batch_size, batches):
                generator(noise, labels)
        generator.train(training)
        yield
    finally:
        generator.train(training)
        for norm, (buffers, momentum) in zip(norms, kept):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])


def _batches(generator, tokens, seed: int, batch_size: int, batches: int) -> Iterator[tuple]:
    for number in range(batches):
        places = torch.arange(number * batch_size, (number + 1) * batch_size, device=generator.device)
        noise = Draws(seed, 0, places).normal("statistics", (generator.config.latent_dim,))
        yield noise, None if tokens is None else tokens[(places % len(tokens)).to(tokens.device)].to(noise)
