"""Measures of generated pictures, as pure functions of features and labels."""

import math

import torch


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _distances(queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    # differences first: by a matrix product, copies far from the origin would seem to be apart
    return torch.cdist(queries, others, compute_mode="donot_use_mm_for_euclid_dist")


def coverage(real: torch.Tensor, generated: torch.Tensor, k: int = 5) -> float:
    """The share of real pictures with a generated one within their k-th real neighbour (Naeem et al. 2020, eq. 6).

    Args:
        real, generated: features `(N, D)` and `(M, D)`.
    """
    radii = _distances(real, real).kthvalue(k + 1, dim=1).values  # the nearest of all is the picture itself
    return (_distances(real, generated).min(dim=1).values <= radii).float().mean().item()


def nearest_distances(queries: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """The distance of each query `(N, D)` to its nearest training picture `(M, D)`; `(N,)`."""
    return torch.cat([_distances(chunk, training).min(dim=1).values for chunk in queries.split(1000)])


def nearest_neighbour_ratio(generated: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor) -> float:
    """Mean distance of generated pictures to the nearest training one, over that of held-out real pictures.

    About 1 for a model that generates what it has not seen; towards 0 for one that copies. All are features `(N, D)`.
    """
    ours, theirs = (nearest_distances(queries, training).mean() for queries in (generated, held_out))
    return (ours / theirs).item()
