"""Targets without chance: of all clean samples that a noisy one may come from the mean, in place of one of them.

Where there is much noise, a noisy sample z = α x + σ ε tells little of its clean one, so that nearly all of the usual
loss is which x was drawn, and so is nearly all of the noise in its gradients. What the loss wants the model to say is
the mean of x given z and the labels, and of the training samples that mean can be computed (Xu, Tong and Jaakkola
2023, "Stable target field for reduced variance score estimation in diffusion models", section 3):

    E[x | z, labels] = Σ_j w_j x_j,    w = softmax_j(-‖z - α x_j‖² / 2σ²),

over the samples x_j that have these labels. The loss has the same minimum as ever. Where there is little noise, the
mean is the sample itself, so that nothing changes there. Where labels are dropped, the mean with them is still a right
target, since its own mean over the labels is the mean without.
"""

import torch
import torch.nn.functional as F

from hwdiffusion.objectives import levels
from hwdiffusion.randomness import Draws


class StableTargets:
    """Clean and noise parts of noisy samples, as they are on average.

    Args:
        views: all clean samples, `(N, F, C, H, W)`, F views of each that training chooses from alike often; kept as
            float32, on their device.
        labels: of the samples, `(N, T)`, padded with -1.
        count: over how many views with a noisy sample's labels the mean is taken at most; where there are more, over
            others in each step, and the sample itself along with them.
    """

    def __init__(self, views: torch.Tensor, labels: torch.Tensor, count: int):
        self.count = count
        sample, labels = views.flatten(0, 1), labels.to(views.device).repeat_interleave(views.shape[1], dim=0)
        self.label_sets, group = _widened(labels).unique(dim=0, return_inverse=True)  # (G, T + 1), (N F,)
        # mixed, so that neighbours are a random choice of their group
        mixed = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0)).to(sample.device)
        order = mixed[group[mixed].argsort(stable=True)]
        sizes = group.bincount(minlength=len(self.label_sets)).tolist()
        self.groups = list(sample[order].flatten(1).float().split(sizes))  # (n_g, D) each
        self.squares = [samples.square().sum(dim=1) for samples in self.groups]  # (n_g,) each

    @torch.no_grad()
    def __call__(self, noise_scheduler, sample, noisy, labels, timesteps, draws: Draws):
        """The mean clean sample and the noise that is left then, of noisy ones.

        Args:
            sample, noisy: `(B, C, H, W)`: noisy = α sample + σ noise at the timesteps `(B,)`.
            labels: of the samples, `(B, T)`; each set is one of those given at first.
            draws: of the batch; what is drawn is the same on every process.

        Returns:
            Clean samples and noise, float32 `(B, C, H, W)` each, with α clean + σ noise = noisy.
        """
        alpha, sigma = (level.flatten(1).float() for level in levels(noise_scheduler, timesteps, sample))  # (B, 1)
        offset = float(draws.shared().uniform("references"))
        group = (_widened(labels)[:, None] == self.label_sets).all(dim=-1).int().argmax(dim=1)  # (B,)
        own, z = sample.flatten(1).float(), noisy.flatten(1).float()  # (B, D)
        mean = torch.empty_like(own)
        with torch.autocast(sample.device.type, enabled=False):  # the weights need all the digits
            for g in group.unique().tolist():
                chosen = (group == g).nonzero()[:, 0]
                mean[chosen] = self._mean(g, offset, own[chosen], z[chosen], alpha[chosen], sigma[chosen])
        noise = (z - alpha * mean) / sigma.clamp(min=1e-8)
        return mean.view_as(sample), noise.view_as(sample)

    def _mean(self, group: int, offset: float, own, z, alpha, sigma) -> torch.Tensor:
        """E[x | z] `(b, D)` over a group, by -‖z - αx‖² / 2σ² less what doesn't hang on x."""

        def logits(product, squares):
            return (alpha * product - 0.5 * alpha**2 * squares) / sigma**2

        references, squares = self._references(group, offset)  # (M, D), (M,)
        of_all = logits(z @ references.T, squares)  # (b, M)
        if len(references) == len(self.groups[group]):  # its own is among them
            return of_all.softmax(dim=1) @ references
        of_own = logits((z * own).sum(dim=1, keepdim=True), own.square().sum(dim=1, keepdim=True))  # (b, 1)
        weights = torch.cat([of_all, of_own], dim=1).softmax(dim=1)
        return weights[:, :-1] @ references + weights[:, -1:] * own

    def _references(self, group: int, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
        samples, squares = self.groups[group], self.squares[group]
        if len(samples) <= self.count:
            return samples, squares
        places = torch.arange(self.count, device=samples.device).add_(int(offset * len(samples))) % len(samples)
        return samples[places], squares[places]


def _widened(labels: torch.Tensor) -> torch.Tensor:
    """By a column, so that pictures without labels have one, too."""
    return F.pad(labels, (0, 1), value=-1)
