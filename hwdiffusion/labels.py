"""Labels in training: dropping them for classifier-free guidance, evening out lopsided classes. Their encoding belongs
to the pipeline."""

from collections.abc import Callable

import numpy as np
import torch

from hwdiffusion import InputError
from hwdiffusion.randomness import Draws, epoch_order


def check_dropout(args, data):
    """Raise InputError where single labels are to be dropped of pictures that have no sets of them."""
    if args.single_label_dropout > 0 and not data.has_sets:
        raise InputError(
            f"--single_label_dropout {args.single_label_dropout} is for sets of labels, which these pictures haven't; "
            "use --label_dropout"
        )


def drop_labels(tokens: torch.Tensor, probability: float, draws: Draws, single: float = 0.0) -> torch.Tensor:
    """Replace whole label sets of tokens `(B, T, K)` by the null label (Ho and Salimans 2022, algorithm 1), and with
    probability `single` each label of a set by itself."""
    if probability > 0:
        keep = draws.uniform("label_dropout").to(tokens.device) >= probability  # (B,)
        tokens = tokens * keep[:, None, None]
    if single > 0:
        keep = draws.uniform("single_label_dropout", (tokens.shape[1],)).to(tokens.device) >= single  # (B, T)
        tokens = tokens * keep[..., None]
    return tokens


def balanced_order(labels: torch.Tensor, balance: float) -> Callable[[int, int, int], np.ndarray]:
    """A function (seed, epoch, size) → the order `(size,)` in which an epoch visits the data set, pictures of rare
    classes more often, of frequent ones less.

    A picture's part of an epoch is in proportion to the mean over its labels of (pictures with the label)^-balance. It
    is visited as often as that says, rounded up or down at random (systematic resampling).

    Args:
        labels: `(N, T)` ids, padded with -1.
        balance: in [0, 1]; 1 shows all classes alike.
    """
    ids = labels.numpy()
    known = ids >= 0
    counts = np.bincount(ids[known])
    weights = np.where(known, np.maximum(counts, 1)[np.where(known, ids, 0)] ** -balance, 0.0).sum(axis=1)
    weights = weights / np.maximum(known.sum(axis=1), 1)
    labelled = known.any(axis=1)
    weights[~labelled] = weights[labelled].mean()  # a picture without labels counts as an average one

    def order(seed: int, epoch: int, size: int) -> np.ndarray:
        mixed = epoch_order(seed, epoch, size)  # so that neighbours differ from epoch to epoch
        ends = np.cumsum(weights[mixed]) * (size / weights.sum())
        offset = np.random.Generator(np.random.Philox(key=[seed + 2**32, epoch])).random()
        chosen = mixed[np.minimum(np.searchsorted(ends, np.arange(size) + offset, side="right"), size - 1)]
        return chosen[epoch_order(seed + 2**32, epoch, size)]

    return order
