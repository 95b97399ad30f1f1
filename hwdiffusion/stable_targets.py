"""Targets without chance: of all clean samples that a noisy one may come from the mean, in place of one of them.

Where there is much noise, a noisy sample z = α x + σ ε tells little of its clean one, so that nearly all of the usual
loss is which x was drawn, and so is nearly all of the noise in its gradients. What the loss wants the model to say is
the mean of x given z and the labels, and of the training samples that mean can be computed (Xu, Tong and Jaakkola
2023, "Stable target field for reduced variance score estimation in diffusion models", section 3):

    E[x | z, labels] = Σ_j w_j x_j,    w = softmax_j(-‖z - α x_j‖² / 2σ²),

over the samples x_j that have these labels. The loss has the same minimum as ever. Where there is little noise, the
mean is the sample itself, and the target the usual one. Where labels are dropped, the mean with them is still a right
target, since its own mean over the labels is the mean without.
"""

from collections.abc import Callable, Iterable

import torch

from hwdiffusion import InputError
from hwdiffusion.randomness import Draws


LEAST_SIGMA = 1e-3  # with less noise the mean is the sample itself, but what rounding makes of 1/σ² isn't


def check_targets(args, count: int, shape: tuple[int, ...], make_loss: Callable | None):
    """Raise InputError where the stable targets that are asked for can't be had.

    Args:
        count, shape: of the clean samples, how many and `(C, H, W)`.
        make_loss: the caller's own, if it is not `None`.
    """
    if not args.stable_targets:
        return
    asked = f"--stable_targets {args.stable_targets}"
    if make_loss is not None:
        raise InputError(f"{asked} is for the usual loss, not for one that make_loss makes; give --stable_targets 0")
    size = 4 * count * torch.Size(shape).numel() * (2 if args.random_flip else 1) / 2**30
    if size > args.image_memory_gb:
        raise InputError(
            f"{asked} keeps {count} samples of {shape} at hand, {size:.2g} GiB, more than --image_memory_gb "
            f"{args.image_memory_gb:g}; raise that, or give --stable_targets 0"
        )


class StableTargets:
    """What noisy samples are made of, on average.

    Args:
        views: all clean samples, `(N, F, C, H, W)`, F views of each, of which training takes each as often.
        labels: `(N, T)`, padded with -1.
        count: over how many views with a noisy sample's labels its mean is taken at most: where there are more, over
            so many that are drawn anew in each step, and the view that it is made of.
        device: where all of them are kept, in float32.
    """

    def __init__(self, views: torch.Tensor, labels: torch.Tensor, count: int, device: torch.device | str = "cpu"):
        self.count = count
        samples, each = views.flatten(0, 1).flatten(1), views.shape[1]  # (N F, D)
        places: dict[tuple[int, ...], list[int]] = {}
        for place, key in enumerate(_keys(labels)):
            places.setdefault(key, []).extend(range(place * each, (place + 1) * each))
        self.groups = {
            key: _with_squares(samples[those].float()).to(device) for key, those in places.items()
        }  # (n, D + 1) each
        self.most = max(len(group) for group in self.groups.values())

    @property
    def usual(self) -> int:
        """How many views have the labels of a picture: of half of the pictures fewer, of half more."""
        sizes = torch.tensor([len(group) for group in self.groups.values()])
        return int(sizes.repeat_interleave(sizes).median())

    @torch.no_grad()
    def __call__(
        self, sample: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, labels, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean clean sample of noisy ones α sample + σ noise, and the noise that is left then.

        Args:
            sample, noise: `(B, C, H, W)`; the samples are among those given at first.
            alpha, sigma: `(B, 1, 1, 1)`.
            labels: of the samples, `(B, T)`.
            draws: of the batch; what is drawn is the same on every process.

        Returns:
            Clean samples and noise, `(B, C, H, W)` each, of which the noisy samples are made as well.
        """
        own = sample.flatten(1).float()  # (B, D)
        alpha, sigma = alpha.flatten(1).float(), sigma.flatten(1).float().clamp(min=LEAST_SIGMA)  # (B, 1)
        # -‖z - αx‖² / 2σ² less what doesn't hang on x is one product: of this and of (x, -‖x‖² / 2)
        asked = torch.cat([alpha * (alpha * own + sigma * noise.flatten(1)), alpha**2], dim=1) / sigma**2  # (B, D + 1)
        unit = draws.shared().uniform("references", (self.count,))[0] if self.most > self.count else None
        places: dict[tuple[int, ...], list[int]] = {}
        for place, key in enumerate(_keys(labels)):
            places.setdefault(key, []).append(place)
        mean = torch.empty_like(own)
        with torch.autocast(sample.device.type, enabled=False):  # should a caller have it on: weights need all digits
            for key, those in places.items():
                mean[those] = self._mean(self.groups[key], unit, own[those], asked[those])
        noise = noise + (alpha / sigma * (own - mean)).view_as(noise)
        return mean.view_as(sample), noise

    def _mean(self, group, unit, own, asked) -> torch.Tensor:
        """E[x | z] `(b, D)` over a group."""
        if len(group) <= self.count:  # its own is among them
            # many rows by few is the faster order of the two, and the products are what takes time
            weights = (group @ asked.T).T.softmax(dim=1)
            return (weights @ group)[:, :-1]
        # any of these and its own could have been its own: that makes the mean over them a right target, however few
        group = group[(unit * len(group)).long()]
        of_own = (asked * _with_squares(own)).sum(dim=1, keepdim=True)  # (b, 1)
        weights = torch.cat([asked @ group.T, of_own], dim=1).softmax(dim=1)
        return (weights[:, :-1] @ group)[:, :-1] + weights[:, -1:] * own


def _with_squares(samples: torch.Tensor) -> torch.Tensor:
    """Samples `(n, D)`, and beside each -‖x‖² / 2; `(n, D + 1)`."""
    return torch.cat([samples, -0.5 * samples.square().sum(dim=1, keepdim=True)], dim=1)


def _keys(labels: torch.Tensor) -> Iterable[tuple[int, ...]]:
    """Sets of labels, whatever their order."""
    return (tuple(sorted(row)) for row in labels.tolist())
