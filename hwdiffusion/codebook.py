"""Health of a stock `VQModel`'s codebook during training: data-dependent start, usage, perplexity, restart.

Everything acts on `vqvae.quantize` from outside; what is saved is a plain `VQModel`. diffusers starts codes within
±1/n of zero, far below the scale of latents, so that without this most of them are never chosen.
"""

import torch
import torch.nn as nn
from diffusers import VQModel

from hwdiffusion.randomness import Draws


class Codebook(nn.Module):
    """Watches what a `VQModel` quantises.

    A forward hook on `vqvae.quantize` keeps the last latents and counts the chosen codes; the counts are a buffer, so
    they are part of a checkpoint.

    Args:
        vqvae: the model, not yet wrapped for distributed training.
        commitment_beta: β of the commitment loss (van den Oord et al. 2017, eq. 3).
        gather: gathers a tensor over processes along its first dimension.
    """

    def __init__(self, vqvae: VQModel, commitment_beta: float = 0.25, gather=lambda tensor: tensor):
        super().__init__()
        quantize = vqvae.quantize
        # The stock default gives β to the codebook, not to the commitment: the reverse of the paper. It isn't saved.
        quantize.legacy = False
        quantize.beta = commitment_beta
        self.size = quantize.n_e
        self._embedding = [quantize.embedding]  # in a list: not a sub-module, the VQModel owns it
        self.gather = gather
        self.latents: torch.Tensor | None = None  # (B·h·w, C), of the last training batch of this process
        self.register_buffer("counts", torch.zeros(self.size, device=quantize.embedding.weight.device))
        quantize.register_forward_hook(self._observe)

    @property
    def vectors(self) -> torch.Tensor:
        return self._embedding[0].weight

    def _observe(self, quantize, inputs, outputs):
        if not quantize.training:
            return
        latents, indices = inputs[0].detach(), outputs[2][2]
        self.latents = _as_vectors(latents)
        self.counts += torch.bincount(indices.reshape(-1), minlength=self.size).to(self.counts)

    def chosen(self) -> torch.Tensor:
        """How often each code `(n,)` was chosen since the last reset, over all processes."""
        return self.gather(self.counts[None]).sum(dim=0)

    @torch.no_grad()
    def start(self, latents: torch.Tensor, draws: Draws):
        """Start all codes from latents `(B, C, h, w)` of some pictures (Lancucki et al. 2020)."""
        every = torch.ones(self.size, dtype=torch.bool, device=self.vectors.device)
        self.replace(every, _as_vectors(latents), draws)

    @torch.no_grad()
    def restart(
        self, draws: Draws, optimizer: torch.optim.Optimizer | None = None, average: torch.Tensor | None = None
    ) -> int:
        """Restart the codes that were not chosen since the last reset from the last batch's encoder outputs.

        The optimizer's moments of a restarted code are cleared, and it starts anew in the `average` `(n, C)` of the
        codes too, where its dead place would linger. The number of restarted codes is returned.
        """
        dead = self.chosen() == 0
        count = int(dead.sum())
        if count and self.latents is not None:
            self.replace(dead, self.gather(self.latents), draws)
            if average is not None:
                average[dead] = self.vectors.data[dead].to(average)
            if optimizer is not None:
                for moment in optimizer.state.get(self.vectors, {}).values():
                    if isinstance(moment, torch.Tensor) and moment.shape == self.vectors.shape:
                        moment[dead] = 0
        return count

    def replace(self, chosen: torch.Tensor, latents: torch.Tensor, draws: Draws):
        """Put encoder outputs `(N, C)`, drawn at random, into the chosen `(n,)` codes, the same on all processes."""
        order = draws.shared().uniform("codebook", (len(latents),))[0].to(latents.device).argsort(stable=True)
        places = torch.arange(int(chosen.sum()), device=order.device) % len(order)  # again from the start if too few
        self.vectors.data[chosen] = latents[order[places]].to(self.vectors.dtype)

    def reset(self):
        self.counts.zero_()

    def usage(self) -> float:
        """The share of codes chosen since the last reset, in [0, 1]."""
        return (self.chosen() > 0).float().mean().item()

    def perplexity(self) -> float:
        """exp of the entropy of the choices since the last reset, in [1, n]."""
        counts = self.chosen()
        share = counts / counts.sum().clamp(min=1)
        return torch.exp(-(share * torch.log(share.clamp(min=1e-10))).sum()).item()


def _as_vectors(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()  # (B·h·w, C)
