"""Labels in training: dropping them for classifier-free guidance. Their encoding belongs to the pipeline."""

import torch

from hwdiffusion.randomness import Draws


def drop_labels(tokens: torch.Tensor, probability: float, draws: Draws) -> torch.Tensor:
    """Replace whole label sets of tokens `(B, T, K)` by the null label (Ho and Salimans 2022, algorithm 1)."""
    keep = draws.uniform("label_dropout").to(tokens.device) >= probability  # (B,)
    return tokens * keep[:, None, None]
