"""Health of a stock `VQModel`'s codebook during training.

Data-dependent start, restart of dead codes, an exponential-moving-average codebook, the rotation trick, an entropy
regulariser, usage and perplexity. Everything acts on `vqvae.quantize` from outside; what is saved is a plain
`VQModel`. diffusers starts codes within ±1/n of zero, far below the scale of latents, so that without this most of
them are never chosen.
"""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import VQModel

from hwdiffusion.randomness import Draws


FORGOTTEN = 1e-5  # a moving average of counts below this says nothing of where its code should be
LEAST_VARIANCE = 1e-6  # of the largest: what varies less is noise of rounding
ENTROPY_LATENTS = 1024  # of a batch, at most, whose distances to all codes the entropy is taken of


class Codebook(nn.Module):
    """Watches what a `VQModel` quantises, and, where it is asked to, learns the codes in the optimizer's place.

    A forward hook on `vqvae.quantize` keeps the last latents and counts the chosen codes. What is to be part of a
    checkpoint is a buffer: the counts, of which each process has its own, so that their sum matters; and the moving
    averages, which are the same on all (`alike` names these).

    Args:
        vqvae: the model, not yet wrapped for distributed training.
        commitment_beta: β of the commitment loss (van den Oord et al. 2017, eq. 3).
        update: `gradient`, by the optimizer, or `ema`, as moving averages of the latents that chose them (the same,
            appendix A.1); [`Codebook.update`] is then to be called after every step.
        ema_decay: γ of those averages.
        rotation: let gradients pass the quantiser turned and scaled as it turns and scales latents (Fifty et al. 2024,
            "Restructuring Vector Quantization with the Rotation Trick"), instead of unchanged.
        gather: gathers a tensor over processes along its first dimension.
    """

    def __init__(
        self,
        vqvae: VQModel,
        commitment_beta: float = 0.25,
        update: str = "gradient",
        ema_decay: float = 0.99,
        rotation: bool = False,
        gather=lambda tensor: tensor,
    ):
        super().__init__()
        quantize = vqvae.quantize
        # The stock default gives β to the codebook, not to the commitment: the reverse of the paper. It isn't saved.
        quantize.legacy = False
        quantize.beta = commitment_beta
        self.size = quantize.n_e
        self._embedding = [quantize.embedding]  # in a list: not a sub-module, the VQModel owns it
        self.averages, self.decay, self.rotation, self.gather = update == "ema", ema_decay, rotation, gather
        self.latents: torch.Tensor | None = None  # (B·h·w, C), of the last training batch of this process, with graph
        weight = quantize.embedding.weight
        self.register_buffer("counts", torch.zeros(self.size, device=weight.device))
        if self.averages:
            weight.requires_grad_(False)
            for kind, persistent in (("ema", True), ("batch", False)):  # between steps a batch's are zero
                for what, shape in (("counts", (self.size,)), ("sums", weight.shape)):
                    self.register_buffer(f"{kind}_{what}", torch.zeros(shape, device=weight.device), persistent)
        quantize.register_forward_hook(self._observe)

    @property
    def alike(self) -> tuple[str, ...]:
        """The buffers that are the same on all processes."""
        return ("ema_counts", "ema_sums") if self.averages else ()

    @property
    def vectors(self) -> torch.Tensor:
        return self._embedding[0].weight

    def _observe(self, quantize, inputs, outputs):
        if not quantize.training:
            return None
        latents, (quantized, loss, (*unused, indices)) = inputs[0], outputs
        self.latents, indices = _as_vectors(latents), indices.reshape(-1)
        chosen = torch.bincount(indices, minlength=self.size).to(self.counts)
        self.counts += chosen
        if self.averages:
            self.batch_counts += chosen
            self.batch_sums.index_add_(0, indices, self.latents.detach())
        if self.rotation:
            return rotated(latents, quantized.detach()), loss, (*unused, indices)
        return None

    # -- learning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self):
        """After a step: the codes of a moving-average codebook become the means of the latents that chose them.

        N ← γN + (1 - γ)n, m ← γm + (1 - γ)Σz, e = m/N (van den Oord et al. 2017, eq. 6 to 8). In place of smoothing,
        codes that have not been chosen for so long that nothing is left of N stay where they are. Latents that are not
        finite, for which the optimizer leaves its step out, teach nothing.
        """
        if not self.averages:
            return
        counts, sums = self._total(self.batch_counts), self._total(self.batch_sums)
        finite = sums.isfinite().all()  # not fetched: the device needn't wait
        weight = (1 - self.decay) * finite
        self.ema_counts.lerp_(counts, weight)
        self.ema_sums.lerp_(torch.where(finite, sums, 0.0), weight)
        self.batch_counts.zero_()
        self.batch_sums.zero_()
        known = (self.ema_counts > FORGOTTEN)[:, None]
        means = self.ema_sums / self.ema_counts.clamp(min=FORGOTTEN)[:, None]
        self.vectors.data.copy_(torch.where(known, means.to(self.vectors.dtype), self.vectors.data))

    def entropy_loss(self, draws: Draws, temperature: float = 0.01) -> torch.Tensor:
        """The mean entropy of a latent's choice less the entropy of the mean choice (Yu et al. 2024, "Language Model
        Beats Diffusion", eq. 5); a scalar. It is low where every latent is sure of its code and all codes are chosen
        alike. A choice is a softmax over negative squared distances, in units of their mean.

        It is taken of the last batch of this process alone, or of so many of its latents as there is room for: with
        several processes or micro-batches it rewards even use within the part of each.
        """
        latents = self.latents
        if len(latents) > ENTROPY_LATENTS:
            order = draws.shared().uniform("entropy", (len(latents),))[0].to(latents.device).argsort()
            latents = latents[order[:ENTROPY_LATENTS]]
        distances = torch.cdist(latents, self.vectors.float(), compute_mode="use_mm_for_euclid_dist").square()
        choice = F.log_softmax(
            -distances / (distances.detach().mean() * temperature).clamp(min=1e-12), dim=1
        )  # (N, n)
        mean = choice.exp().mean(dim=0)
        return -(choice.exp() * choice).sum(dim=1).mean() + (mean * torch.log(mean.clamp(min=1e-12))).sum()

    # -- start and restart --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, latents: torch.Tensor, draws: Draws, kmeans: bool = False):
        """Start all codes on latents `(B, C, h, w)` of some pictures, or on the centres of their clusters (Łańcucki
        et al. 2020)."""
        every = torch.ones(self.size, dtype=torch.bool, device=self.vectors.device)
        vectors = _as_vectors(latents)
        self.replace(every, vectors, draws)
        if kmeans and len(vectors) > self.size:
            from sklearn.cluster import KMeans  # not needed otherwise

            begin = self.vectors.detach().float().cpu().numpy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of clusters that are equal, where pictures share a background
                centres = KMeans(self.size, init=begin, n_init=1, max_iter=20).fit(vectors.cpu().numpy())
            centres = torch.from_numpy(centres.cluster_centers_).to(vectors)
            self._set(every, self.gather(centres[None])[0])  # those of the first process

    @torch.no_grad()
    def restart(
        self,
        draws: Draws,
        optimizer: torch.optim.Optimizer | None = None,
        average: torch.Tensor | None = None,
        more_latents=None,
    ) -> int:
        """Restart the codes that were not chosen since the last reset from encoder outputs.

        The optimizer's moments of a restarted code are cleared, and it starts anew in the `average` `(n, C)` of the
        codes too, where its dead place would linger. The number of restarted codes is returned.

        Args:
            more_latents: called for latents `(B, C, h, w)` of other training pictures, where those of the last batch
                are fewer than the dead codes.
        """
        dead = self.chosen() == 0
        count = int(dead.sum())
        if count and self.latents is not None:
            latents = self.gather(self.latents.detach())
            if len(latents) < count and more_latents is not None:
                latents = _as_vectors(more_latents())
            self.replace(dead, latents, draws)
            if average is not None:
                average[dead] = self.vectors.data[dead].to(average)
            if optimizer is not None:
                for moment in optimizer.state.get(self.vectors, {}).values():
                    # those of 8 bits are places in a table, where 0 isn't zero: they fade by themselves
                    if torch.is_tensor(moment) and moment.is_floating_point() and moment.shape == self.vectors.shape:
                        moment[dead] = 0
        return count

    def replace(self, chosen: torch.Tensor, latents: torch.Tensor, draws: Draws):
        """Put encoder outputs `(N, C)`, drawn at random, into the chosen `(n,)` codes, the same on all processes."""
        order = draws.shared().uniform("codebook", (len(latents),))[0].to(latents.device).argsort(stable=True)
        places = torch.arange(int(chosen.sum()), device=order.device) % len(order)  # again from the start if too few
        self._set(chosen, latents[order[places]])

    def _set(self, chosen: torch.Tensor, vectors: torch.Tensor):
        self.vectors.data[chosen] = vectors.to(self.vectors.dtype)
        if self.averages:  # as if one latent had chosen each
            self.ema_counts[chosen] = 1.0
            self.ema_sums[chosen] = vectors.to(self.ema_sums)

    # -- health -------------------------------------------------------------------------------------------------------

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.gather(tensor[None]).sum(dim=0)

    def chosen(self) -> torch.Tensor:
        """How often each code `(n,)` was chosen in training since the last reset, over all processes."""
        return self._total(self.counts)

    def reset(self):
        self.counts.zero_()

    def usage(self) -> float:
        """The share of codes chosen in training since the last reset, in [0, 1]."""
        return (self.chosen() > 0).float().mean().item()

    def perplexity(self) -> float:
        """exp of the entropy of the choices in training since the last reset, in [1, n]."""
        return perplexity_of(self.chosen())


def perplexity_of(counts: torch.Tensor) -> float:
    """exp of the entropy of choices, given how often each code `(n,)` was chosen; in [1, n]."""
    share = counts.cpu().double()
    share = share / share.sum().clamp(min=1)
    return torch.exp(-(share * torch.log(share.clamp(min=1e-10))).sum()).item()


def rotated(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` `(B, C, h, w)`, as the latents turned and scaled onto it: gradients go back the same way.

    (‖q‖/‖e‖) R e, where the rotation R takes e's direction to q's and counts as constant: R = I - 2rrᵀ + 2q̂êᵀ with
    r the direction of ê + q̂ (Fifty et al. 2024, eq. 3 and section 4.2).
    """
    e_hat, q_hat = (F.normalize(vectors.detach(), dim=1, eps=1e-6) for vectors in (latents, quantized))
    r = F.normalize(e_hat + q_hat, dim=1, eps=1e-6)
    norms = [vectors.detach().norm(dim=1, keepdim=True) for vectors in (latents, quantized)]
    turned = latents - 2 * (latents * r).sum(dim=1, keepdim=True) * r
    turned = turned + 2 * (latents * e_hat).sum(dim=1, keepdim=True) * q_hat
    turned = turned * (norms[1] / norms[0].clamp(min=1e-6))
    return turned + (quantized - turned).detach()  # the very code, also where e and q are opposite or zero


def advice(used: int, possible: int, args) -> str | None:
    """What to do about a codebook of which less than half is used, or `None`.

    Args:
        used: the codes that the validation pictures chose.
        possible: the codes that they would choose if all were chosen alike.
        args: the [`VQGANArguments`].
    """
    if used >= possible / 2:
        return None
    cures = []
    if args.codebook_restart_steps == 0:
        cures.append("let dead codes restart (--codebook_restart_steps 100)")
    elif args.codebook_restart_until < 0.8:
        cures.append("let them restart for longer (--codebook_restart_until 0.9)")
    if args.codebook_update == "gradient":
        cures.append("learn codes as moving averages (--codebook_update ema)")
    if args.entropy_weight == 0:
        cures.append("reward even use (--entropy_weight 0.1)")
    cures.append(f"or take fewer (--vqvae.num_vq_embeddings {max(2, 2 ** (used - 1).bit_length())})")
    return f"the validation pictures use {used} codes where they could use {possible}: {', '.join(cures)}"


@torch.no_grad()
def whiten(vqvae, latents: torch.Tensor):
    """Change the last layer of an encoder so that its outputs, which are now `latents` `(B, C, h, w)`, have no mean,
    unit variance and no correlation between channels.

    A quantiser of few channels takes from an encoder whatever leads away from its codes. Where the outputs begin near
    a line or a plane, and with random weights two channels often do, all codes lie there, and the other directions may
    never be used.
    """
    vectors = _as_vectors(latents).double()
    mean, spread = vectors.mean(dim=0), vectors.T.cov()
    variances, directions = torch.linalg.eigh(torch.atleast_2d(spread))
    scale = variances.clamp(min=max(float(variances.max()) * LEAST_VARIANCE, 1e-12)).rsqrt()
    whitening = directions @ torch.diag(scale) @ directions.T  # of all those that whiten, it turns least
    layer = vqvae.quant_conv  # of kernel size 1
    layer.weight.copy_(torch.einsum("ij,jkhw->ikhw", whitening, layer.weight.double()))
    layer.bias.copy_(whitening @ (layer.bias.double() - mean))


def _as_vectors(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()  # (B·h·w, C)
