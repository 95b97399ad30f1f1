"""The adversarial part of a VQ-GAN (Esser et al. 2021): a patch discriminator, hinge losses, the adaptive weight."""

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
