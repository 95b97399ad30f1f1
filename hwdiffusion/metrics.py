"""Measures of generated pictures, as pure functions of features, probabilities and labels.

Features are `(N, D)` tensors, a row a picture; which network they are of is the caller's to choose and to state. All
sums run in float64 and in chunks, so a measure doesn't depend on how its pictures were batched.
"""

import math
from collections.abc import Iterator

import torch


MOST_DISTANCES = 2**24  # at once: 128 MiB in float64
NEIGHBOURS = 5  # as Naeem et al. 2020 recommend
# Of fewer pictures a ball to the 5th neighbour holds more than a tenth, and lost modes go unseen: with five
# of ten lost in 16 dimensions, recall is 0.99 of 8 pictures, 0.92 of 11, 0.49 of 50 and 0.45 of 300.
MANIFOLD_PICTURES = 10 * NEIGHBOURS


# ---------------------------------------------------------------------------------------------------------------------
# Do labels hold?
# ---------------------------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def labels_found(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which labels of each set are among the classes with the k highest scores, k being the set's size: the protocol
    of i-CLEVR, for one label a picture plain accuracy.

    Args:
        scores: `(N, K)`, probabilities or logits.
        labels: `(N, T)` ids in [0, K), padded with -1.

    Returns:
        Bools `(N, T)`, false for the padding.
    """
    known = labels >= 0
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (N, K), 0 the highest
    return known & (ranks.gather(1, labels.clamp(min=0)) < known.sum(dim=1, keepdim=True))


def label_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict:
    """How often a classifier sees the labels that were asked for: over all labels of all sets.

    Args:
        probabilities: `(N, K)`; of single labels each row sums to 1, of sets each is by itself.
        labels: `(N, T)` ids in [0, K), padded with -1; at least one is known.

    Returns:
        `n`, the number of labels; `accuracy` (see [`labels_found`]) with its 95 % Wilson interval, which takes labels
        of one set for independent; `per_class` (a list of K, `None` for a class that was not asked for),
        `worst_class` and the mean `confidence`, the probability of a label asked for. Of sets also `whole_sets`, the
        share of pictures with all their labels, and `by_size`, `n` and `accuracy` for every size of a set.
    """
    known, found = labels >= 0, labels_found(probabilities, labels)  # (N, T)
    asked, right = labels[known], found[known]
    shares = [right[asked == label].double().mean().item() for label in range(probabilities.shape[1])]
    per_class = [None if math.isnan(share) else share for share in shares]
    low, high = wilson_interval(int(right.sum()), len(right))
    scores = {
        "n": len(right),
        "accuracy": right.double().mean().item(),
        "accuracy_95": [low, high],
        "per_class": per_class,
        "worst_class": min(share for share in per_class if share is not None),
        "confidence": probabilities.gather(1, labels.clamp(min=0))[known].double().mean().item(),
    }
    if labels.shape[1] > 1:
        sizes, hits = known.sum(dim=1), found.sum(dim=1)
        scores["whole_sets"] = (hits == sizes)[sizes > 0].double().mean().item()
        scores["by_size"] = {
            size: {
                "n": size * int((sizes == size).sum()),
                "accuracy": hits[sizes == size].double().mean().item() / size,
            }
            for size in sizes.unique().tolist()
            if size > 0
        }
    return scores


def interval_over_repetitions(values: torch.Tensor) -> dict:
    """Mean, standard deviation and 95 % interval (Student's t) of a measure taken R times, `(R,)`, R at least 2."""
    from scipy.stats import t  # slow to import

    values = values.double()
    mean, deviation = values.mean().item(), values.std().item()
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {"n": len(values), "mean": mean, "sd": deviation, "mean_95": [mean - half, mean + half]}


def attributes_of(class_names: list[str]) -> list[list[str]]:
    """The words that names are made of, for every place in a name those that stand there: of "red cube", "blue cube",
    "red sphere" and "blue sphere" the colours and the shapes. Empty where the names aren't all combinations."""
    parts = [name.split() for name in class_names]
    if len(set(map(len, parts))) != 1 or len(parts[0]) < 2:
        return []
    values = [list(dict.fromkeys(words)) for words in zip(*parts)]
    combined = math.prod(map(len, values)) == len(class_names) == len(set(class_names))
    return values if combined and all(len(words) > 1 for words in values) else []


def attribute_confusions(probabilities: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> list[dict]:
    """What is seen in place of what was asked for, by the words of the names, for names such as "red cube".

    Of a picture's k labels and the k classes with the highest scores, those that agree are taken for each other, and
    of the rest those that share the most words.

    Args:
        probabilities, labels: as in [`label_scores`].

    Returns:
        For each place in a name `values`, its words, `confusion`, a list for each word asked for with how often each
        word was seen, and `accuracy`; empty where names aren't combinations of words.
    """
    from scipy.optimize import linear_sum_assignment

    values = attributes_of(class_names)
    if not values:
        return []
    words = torch.tensor([[values[a].index(word) for a, word in enumerate(name.split())] for name in class_names])
    confusions = [torch.zeros(len(of), len(of), dtype=torch.long) for of in values]
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    for asked, seen in zip(labels, order):
        asked = asked[asked >= 0]
        seen = seen[: len(asked)]
        alike = (words[asked][:, None] == words[seen][None]).sum(dim=-1).double()  # (k, k)
        alike += len(values) * (asked[:, None] == seen[None])  # what agrees in all is taken first
        rows, columns = linear_sum_assignment(-alike.numpy())
        for a, confusion in enumerate(confusions):
            for row, column in zip(rows, columns):
                confusion[words[asked[row], a], words[seen[column], a]] += 1
    return [
        {
            "values": of,
            "confusion": confusion.tolist(),
            "accuracy": (confusion.diagonal().sum() / confusion.sum()).item(),
        }
        for of, confusion in zip(values, confusions)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Is the distribution right?
# ---------------------------------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in constant memory."""

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # Σ (x - mean)(x - mean)ᵀ

    def update(self, features: torch.Tensor) -> "FeatureStatistics":
        """Take in a batch `(B, D)` (Chan et al. 1979, eq. 2.1)."""
        features = features.detach().cpu().double()
        count, mean = len(features), features.mean(dim=0)
        delta, total = mean - self.mean, self.count + count
        centred = features - mean
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64 `(D, D)`."""
        return self._scatter / (self.count - 1)


def frechet_distance(real: FeatureStatistics, generated: FeatureStatistics) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), of Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""
    means = (real.mean - generated.mean).square().sum()
    # the eigenvalues of Σ₁Σ₂ are those of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: real, and stable where it is singular
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ generated.covariance @ root).clamp(min=0).sqrt()
    return (means + real.covariance.trace() + generated.covariance.trace() - 2 * roots.sum()).item()


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The unbiased squared MMD with kernel (x·y / D + 1)³, mean and standard deviation over random subsets
    (Bińkowski et al. 2018, section 4), which are of no more than half of the smaller side, so that they differ."""
    size = min(subset_size, max(2, min(len(real), len(generated)) // 2))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size]].double()
            for features in (real, generated)
        )
        xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(unbiased=False).item()


def manifold_scores(real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), density and coverage (Naeem et al. 2020, eq. 4
    and 6): do generated pictures lie where real ones do, and the other way round, by balls to the k-th neighbour?

    Args:
        real, generated: features `(N, D)` and `(M, D)`; N = M makes figures comparable.

    Raises:
        ValueError: N or M is not over k.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"a {k}-th neighbour needs more than {k} of either side, not {len(real)} and {len(generated)}"
        )
    real_radii, generated_radii = _neighbour_radii(real, k), _neighbour_radii(generated, k)
    precise = dense = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), math.inf, dtype=torch.float64)
    for start, distances in _distances(generated, real):  # (m, N)
        inside = distances <= real_radii
        precise += inside.any(dim=1).sum().item()
        dense += inside.sum().item()
        recalled |= (distances <= generated_radii[start : start + len(distances), None]).any(dim=0)
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return {
        "precision": precise / len(generated),
        "recall": recalled.double().mean().item(),
        "density": dense / (k * len(generated)),
        "coverage": (nearest <= real_radii).double().mean().item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Is it a copy?
# ---------------------------------------------------------------------------------------------------------------------


def nearest_neighbours(queries: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance of each query `(N, D)` to its nearest training picture `(M, D)`, and which one that is; `(N,)`."""
    distances, indices = zip(*(chunk.min(dim=1) for _, chunk in _distances(queries, training)))
    return torch.cat(distances), torch.cat(indices)


def memorisation(generated: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor) -> dict[str, float]:
    """Are generated pictures nearer to the training pictures than unseen real ones are? All are features `(N, D)`.

    Returns:
        `ratio`: their mean distance to the nearest training picture over that of held-out ones; about 1 for a model
        that generates what it has not seen, towards 0 for one that copies. `share_of_copies`: the share nearer than
        the 1 % quantile of held-out ones; about 0.01 is right.
    """
    ours, theirs = (nearest_neighbours(queries, training)[0] for queries in (generated, held_out))
    return {
        "ratio": (ours.mean() / theirs.mean()).item(),
        "share_of_copies": (ours < theirs.quantile(0.01)).double().mean().item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Distances
# ---------------------------------------------------------------------------------------------------------------------


def _distances(queries: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Euclidean distances of `(N, D)` to `(M, D)`, some rows at a time: the first row's place, and float64 `(n, M)`.

    By a matrix product, which is fast; in float64 and about the mean, so that a copy has a distance of nearly 0.
    """
    others = others.double()
    centre = others.mean(dim=0)
    centred = others - centre
    rows = max(1, MOST_DISTANCES // len(others))
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows].double()
        yield start, torch.cdist(chunk - centre, centred, compute_mode="use_mm_for_euclid_dist")


def _neighbour_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each to its k-th nearest among the others, `(N,)`."""
    radii = [
        chunk.kthvalue(k + 1, dim=1).values  # the nearest of all is the picture itself
        for _, chunk in _distances(features, features)
    ]
    return torch.cat(radii)
