"""The adversarial part of a VQ-GAN (Esser et al. 2021): a patch discriminator, its hinge losses, the adaptive weight.

And the perceptual loss, which needs no download unless a model is named.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each patch, `(B, C, H, W)` → `(B, 1, h, w)`.

    Group norm in place of batch norm, so that a picture's logits don't depend on its batch, nor on how a batch is cut
    over processes.
    """

    def __init__(self, in_channels: int, channels: int = 64, num_layers: int = 2, norm_num_groups: int = 8):
        super().__init__()
        layers = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, num_layers + 1):
            stride = 2 if index < num_layers else 1
            width = channels * min(2 ** (index - 1), 8), channels * min(2**index, 8)
            layers += [
                nn.Conv2d(*width, 4 if stride == 2 else 3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_num_groups, width[1]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width[1], 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the generator."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_loss, adversarial_loss, last_weight, reduce=lambda grad: grad, largest=1e4):
    """λ = |∇ reconstruction| / |∇ adversarial| at the decoder's last layer (Esser et al. 2021, eq. 7); a scalar.

    Args:
        last_weight: the weight of the decoder's last layer.
        reduce: averages a gradient over processes, so that all of them weigh alike.
        largest: λ's upper bound.
    """
    reconstruction = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)[0]
    adversarial = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)[0]
    weight = reduce(reconstruction).norm() / (reduce(adversarial).norm() + 1e-4)
    return weight.clamp(max=largest).detach()


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
