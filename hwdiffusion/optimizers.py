"""What models are trained by: AdamW, with moments of 8 bits, or with Muon for their matrices."""

import torch
from torch import nn


ADAMW, ADAMW_IN_8_BITS, MUON = "AdamW", "AdamW in 8 bits (--use_8bit_adam)", "Muon (--muon_learning_rate)"


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices, which AdamW doesn't suit best, and AdamW for the rest, as one optimizer.

    Muon makes the momentum of a matrix orthogonal before it steps along it (Jordan et al. 2024), so that all of its
    directions are learned, not just those of large gradients. Kernels of convolutions count as matrices, of a row for
    each output channel. Steps are as long as AdamW's at the same learning rate would be (Liu et al. 2025, eq. 4).

    Args:
        matrices: parameters of at least two dimensions.
        others: the other parameters.
        muon_learning_rate: of the matrices.
        lr, betas: of AdamW.
        weight_decay: of both.
    """

    def __init__(self, matrices, others, muon_learning_rate: float, lr: float, betas, weight_decay: float):
        self.matrices = list(matrices)
        self.flat = [nn.Parameter(matrix.detach().view(len(matrix), -1)) for matrix in self.matrices]  # same memory
        self.adamw = torch.optim.AdamW(list(others), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.muon = torch.optim.Muon(
            self.flat, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        matrices = {"params": self.matrices, "lr": muon_learning_rate, "weight_decay": weight_decay}
        super().__init__([*self.adamw.param_groups, matrices], {})
        self._share()

    def _share(self):
        """Let both have this optimizer's state and settings, which schedules and checkpoints change."""
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[:1]
        self.muon.state.clear()
        for matrix, flat in zip(self.matrices, self.flat):
            if matrix in self.state:
                self.muon.state[flat] = self.state[matrix]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.adamw.step()
        self.muon.param_groups[0].update({key: self.param_groups[1][key] for key in ("lr", "weight_decay")})
        for matrix, flat in zip(self.matrices, self.flat):
            flat.grad = None if matrix.grad is None else matrix.grad.reshape(flat.shape)
        self.muon.step()
        for matrix, flat in zip(self.matrices, self.flat):
            flat.grad = None
            if flat in self.muon.state:
                self.state[matrix] = self.muon.state[flat]
        return loss


def build_optimizer(
    model: nn.Module, in_8_bits: bool = False, muon_learning_rate: float | None = None, **settings
) -> torch.optim.Optimizer:
    """An optimizer of what a model trains: fused AdamW; with moments of 8 bits by bitsandbytes (Dettmers et al. 2022),
    in a quarter of the memory; or, if a `muon_learning_rate` is given, [`MuonWithAdamW`].

    Args:
        settings: of AdamW: `lr`, `betas`, `weight_decay`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if muon_learning_rate is not None:
        inner = inner_matrices(model)
        others = [parameter for parameter in parameters if all(parameter is not matrix for matrix in inner)]
        return MuonWithAdamW(inner, others, muon_learning_rate, **settings)
    if in_8_bits:
        from bitsandbytes.optim import AdamW8bit  # an extra

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices between a model's first and last layer, as diffusers names these, without tables of embeddings."""
    layers = {
        id(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name not in ("conv_in", "conv_out")
    }
    return [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) in layers]


def name_of(optimizer: torch.optim.Optimizer | dict) -> str:
    """What an optimizer, or the saved state of one that has stepped, is called, with the flag that asks for it."""
    if isinstance(optimizer, MuonWithAdamW):
        return MUON
    if isinstance(optimizer, torch.optim.Optimizer):
        return ADAMW if isinstance(optimizer, torch.optim.AdamW) else ADAMW_IN_8_BITS
    moments = {key for values in optimizer["state"].values() for key in values}
    if "momentum_buffer" in moments:
        return MUON
    return ADAMW if "exp_avg" in moments else ADAMW_IN_8_BITS
