import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from hwdiffusion.metrics import (
    MANIFOLD_PICTURES,
    NEIGHBOURS,
    FeatureStatistics,
    attribute_confusions,
    attributes_of,
    frechet_distance,
    interval_over_repetitions,
    kernel_distance,
    label_scores,
    labels_found,
    manifold_scores,
    memorisation,
    nearest_neighbours,
    wilson_interval,
)


def features(count: int, seed: int, dimensions: int = 8) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "successes, count, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (990, 1000, 0.9817, 0.9946)],
)
def test_wilson_intervals_have_their_known_values(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("successes, count", [(1, 7), (0, 7), (35, 70), (999, 1000)])
def test_wilson_bounds_are_the_shares_that_lie_z_deviations_from_the_observed_one(successes, count):
    for bound in wilson_interval(successes, count, z=1.96):
        deviation = math.sqrt(max(bound * (1 - bound), 0) / count)
        assert abs(successes / count - bound) == pytest.approx(1.96 * deviation, abs=1e-7)


def test_wilson_intervals_of_successes_and_failures_mirror_each_other():
    for successes in range(21):
        low, high = wilson_interval(successes, 20)
        assert wilson_interval(20 - successes, 20) == pytest.approx((1 - high, 1 - low))
        assert low <= successes / 20 <= high or math.isclose(low, successes / 20, abs_tol=1e-12)


def test_label_scores_count_per_class_and_weigh_the_confidence():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]])
    scores = label_scores(probabilities, torch.tensor([[0], [1], [1], [1]]))
    assert scores["accuracy"] == 0.75 and scores["accuracy_95"] == pytest.approx(wilson_interval(3, 4))
    assert scores["per_class"] == [1.0, pytest.approx(2 / 3), None]
    assert scores["worst_class"] == pytest.approx(2 / 3)
    assert scores["confidence"] == pytest.approx((0.7 + 0.3 + 0.8 + 0.5) / 4)
    assert scores["n"] == 4 and "by_size" not in scores


def test_of_a_set_as_many_classes_count_as_it_has_labels():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.3], [0.9, 0.1, 0.8, 0.3], [0.2, 0.1, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]])
    labels = torch.tensor([[2, -1, -1], [3, 0, -1], [1, 3, 2], [-1, -1, -1]])
    found = labels_found(scores, labels)
    assert found.tolist() == [[False] * 3, [False, True, False], [False, True, True], [False] * 3]
    assert torch.equal(labels_found(scores.logit(), labels), found)  # a matter of order alone
    assert torch.equal(labels_found(scores, labels.flip(1)), found.flip(1))  # in which sets have none
    whole = label_scores(scores, labels)
    assert whole["n"] == 6 and whole["accuracy"] == 3 / 6 and whole["whole_sets"] == 0
    assert whole["by_size"] == {
        1: {"n": 1, "accuracy": 0.0},
        2: {"n": 2, "accuracy": 0.5},
        3: {"n": 3, "accuracy": pytest.approx(2 / 3)},
    }
    assert whole["per_class"] == [1.0, 0.0, 0.5, 0.5]


def test_the_interval_over_repetitions_holds_the_mean_as_often_as_it_says():
    """Student's t: of 2,000 draws of 10 normal values, 95 % of the intervals hold the true mean."""
    values = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)) * 3 + 5
    intervals = torch.tensor([interval_over_repetitions(row)["mean_95"] for row in values])
    held = ((intervals[:, 0] < 5) & (intervals[:, 1] > 5)).float().mean().item()
    assert held == pytest.approx(0.95, abs=0.015)  # three deviations; 1.96 for t would hold 0.918


OBJECTS = ["red cube", "blue cube", "red ball", "blue ball"]


@pytest.mark.parametrize("names", [["cat", "dog"], ["red cube", "blue ball"], ["0 - zero", "1 - one"], OBJECTS[:3]])
def test_names_that_are_no_combinations_of_words_have_no_attributes(names):
    assert attributes_of(names) == []
    assert attribute_confusions(torch.eye(len(names)), torch.arange(len(names))[:, None], names) == []


def test_what_is_seen_in_place_of_a_label_is_counted_by_its_words():
    assert attributes_of(OBJECTS) == [["red", "blue"], ["cube", "ball"]]
    scores = torch.tensor([[0.9, 0.0, 0.1, 0.8], [0.0, 0.9, 0.8, 0.1], [0.9, 0.1, 0.2, 0.3]])
    labels = torch.tensor([[3, 0], [3, 2], [2, -1]])  # both right; a cube for the blue ball; a cube for the red one
    colours, shapes = attribute_confusions(scores, labels, OBJECTS)
    assert colours["confusion"] == [[3, 0], [0, 2]] and colours["accuracy"] == 1
    assert shapes["confusion"] == [[1, 0], [2, 2]] and shapes["accuracy"] == pytest.approx(3 / 5)


# -- distances of distributions ---------------------------------------------------------------------------------------


def statistics(pictures: torch.Tensor, batch_size: int = 1000) -> FeatureStatistics:
    gathered = FeatureStatistics(pictures.shape[1])
    for batch in pictures.split(batch_size):
        gathered.update(batch)
    return gathered


@pytest.mark.parametrize("batch_size", [1, 7, 300, 1000])
def test_statistics_are_those_of_the_whole_in_any_batches(batch_size):
    pictures = 1000 + features(300, 0).float() * torch.logspace(-2, 1, 8)
    gathered = statistics(pictures, batch_size)
    torch.testing.assert_close(gathered.mean, pictures.double().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gathered.covariance, torch.cov(pictures.double().T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dimensions, count", [(8, 400), (64, 50)])  # the second's covariances are singular
def test_the_frechet_distance_is_that_of_scipy(dimensions, count):
    real, generated = features(count, 0, dimensions), 0.3 + 1.2 * features(count, 1, dimensions)
    a, b = torch.cov(real.T).numpy(), torch.cov(generated.T).numpy()
    root = scipy.linalg.sqrtm(a @ b)
    mean = (real.mean(dim=0) - generated.mean(dim=0)).square().sum().item()
    expected = mean + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    assert frechet_distance(statistics(real), statistics(generated)) == pytest.approx(expected, rel=1e-4)


def test_the_frechet_distance_is_that_of_torchmetrics():
    real, generated = features(500, 0, 16), 0.3 + 1.2 * features(400, 1, 16)
    theirs = FrechetInceptionDistance(feature=Identity(16)).set_dtype(torch.float64)
    for pictures, are_real in ((real, True), (generated, False)):
        for batch in pictures.split(60):
            theirs.update(batch, real=are_real)
    assert frechet_distance(statistics(real, 37), statistics(generated, 41)) == pytest.approx(
        theirs.compute().item(), rel=1e-4
    )


class Identity(torch.nn.Module):
    """What torchmetrics takes for a network: features are the pictures."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, pictures):
        return pictures


def test_the_frechet_distance_of_shifted_and_scaled_normals_has_its_closed_form():
    real = features(1000, 0, 4)
    shifted = real + torch.tensor([3.0, 0, 4, 0])
    assert frechet_distance(statistics(real), statistics(shifted)) == pytest.approx(25, rel=1e-6)
    variance = torch.cov(real.T).trace().item()
    assert frechet_distance(statistics(real), statistics(3 * real - 2 * real.mean(dim=0))) == pytest.approx(
        4 * variance
    )
    assert frechet_distance(statistics(real), statistics(real)) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(7)
    all_x, all_y = features(12, 0, 3), features(12, 1, 3) + 0.5
    x, y = (side[torch.randperm(12, generator=generator)[:6]] for side in (all_x, all_y))  # half, drawn by the seed

    def kernel(a, b):
        return (torch.dot(a, b).item() / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6)]
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 30
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 36
    assert kernel_distance(all_x, all_y, subsets=1, seed=7)[0] == pytest.approx(expected)
    assert kernel_distance(all_x, all_y, subsets=20)[1] > 0  # subsets differ even of small sides


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
    real, other = features(2000, 0), features(2000, 1)
    mean, deviation = kernel_distance(real, other, subset_size=200)
    assert abs(mean) < deviation
    shifted, deviation = kernel_distance(real, other + 1, subset_size=200)
    assert shifted > 10 * deviation
    assert kernel_distance(real, other) == kernel_distance(real, other)  # its subsets are drawn by a seed


# -- manifolds --------------------------------------------------------------------------------------------------------


def coverage(real, generated, k=5):
    return manifold_scores(real, generated, k)["coverage"]


def test_manifold_scores_are_those_of_all_pairs():
    real, generated, k = features(60, 0, 3), 0.4 + 1.3 * features(50, 1, 3), 4
    across = (generated[:, None] - real[None]).square().sum(dim=-1).sqrt()

    def radii(points):
        return (points[:, None] - points[None]).square().sum(dim=-1).sqrt().sort(dim=1).values[:, k]

    inside = across <= radii(real)
    expected = {
        "precision": inside.any(dim=1).double().mean().item(),
        "recall": (across <= radii(generated)[:, None]).any(dim=0).double().mean().item(),
        "density": inside.double().sum().item() / (k * 50),
        "coverage": (across.amin(dim=0) <= radii(real)).double().mean().item(),
    }
    assert manifold_scores(real, generated, k) == pytest.approx(expected)
    assert len(set(expected.values())) == 4


def test_manifold_scores_of_fewer_than_have_neighbours_are_refused():
    with pytest.raises(ValueError, match="a 5-th neighbour needs more than 5 of either side, not 60 and 5"):
        manifold_scores(features(60, 0, 3), features(5, 1, 3))


def test_the_fewest_pictures_show_that_half_of_the_modes_are_lost_and_few_do_not():
    """What the least number stands on: figures of many, and of as few as have enough neighbours."""
    centres = 3 * features(10, 0, 16)

    def recall(count: int, lost: int, runs: int = 10) -> float:
        values = []
        for run in range(runs):
            modes = [torch.arange(count) % 10, lost + torch.arange(count) % (10 - lost)]
            real, ours = (
                centres[mode] + features(count, 100 * run + place, 16) for place, mode in enumerate(modes, 1)
            )
            values.append(manifold_scores(real, ours)["recall"])
        return sum(values) / runs

    assert recall(NEIGHBOURS + 3, lost=5) > 0.8 and recall(300, lost=5) < 0.6
    assert recall(MANIFOLD_PICTURES, lost=5) < 0.65 and recall(MANIFOLD_PICTURES, lost=0) > 0.9


def test_dropped_modes_cost_recall_and_junk_costs_precision():
    real = torch.cat([features(300, 0), features(300, 1) + 100])
    dropped = manifold_scores(real, torch.cat([features(300, 2), features(300, 3)]))
    assert dropped["precision"] > 0.9 and dropped["recall"] == pytest.approx(0.5, abs=0.05)
    junk = manifold_scores(real, torch.cat([features(300, 2), features(300, 3) + 100, features(600, 4) + 500]))
    assert junk["precision"] == pytest.approx(0.5, abs=0.05) and junk["recall"] > 0.9


def test_coverage_is_1_for_the_real_pictures_and_0_far_away():
    real = features(200, 0)
    assert coverage(real, real) == 1.0
    assert coverage(real, real + 1000) == 0.0


def test_coverage_counts_the_modes_that_are_reached():
    real = torch.cat([features(100, 0), features(100, 1) + 1000, features(200, 2) - 1000])
    assert coverage(real, real[:100]) == 0.25
    assert coverage(real, real[:200]) == 0.5
    assert coverage(real, real[200:]) == 0.5


def test_coverage_of_another_draw_is_that_of_its_expectation():
    """1 - (N - 1)···(N - k) / (2N - 1)···(2N - k) for as many generated as real ones (Naeem et al. 2020, lemma 2)."""
    count, k = 500, 3
    expected = 1 - math.prod((count - i) / (2 * count - i) for i in range(1, k + 1))
    measured = [coverage(features(count, 2 * seed), features(count, 2 * seed + 1), k) for seed in range(10)]
    assert sum(measured) / 10 == pytest.approx(expected, abs=0.015)


def test_coverage_does_not_depend_on_scale_rotation_or_order():
    real, generated = features(150, 0), 0.7 * features(80, 1)
    plain = coverage(real, generated)
    assert 0 < plain < 1
    rotation = torch.linalg.qr(features(8, 2)).Q
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert coverage(real[order] @ rotation * 16, generated.flip(0) @ rotation * 16) == plain


def test_nearest_neighbours_are_those_of_all_pairs():
    queries, training = features(1300, 0, 3), features(40, 1, 3)
    nearest = (queries[:, None] - training[None]).square().sum(dim=-1).sqrt().min(dim=1)
    distances, indices = nearest_neighbours(queries, training)
    torch.testing.assert_close(distances, nearest.values)
    assert torch.equal(indices, nearest.indices)


def test_the_scores_do_not_depend_on_the_rows_that_are_taken_at_once(monkeypatch):
    real, generated = features(100, 0), features(80, 1)
    together = manifold_scores(real, generated)
    nearest = nearest_neighbours(generated, real)
    monkeypatch.setattr("hwdiffusion.metrics.MOST_DISTANCES", 700)
    assert manifold_scores(real, generated) == together
    for ours, theirs in zip(nearest_neighbours(generated, real), nearest):
        torch.testing.assert_close(ours, theirs)


def test_a_copy_far_from_the_origin_is_a_copy():
    training = 1e4 + features(500, 0).float()
    assert nearest_neighbours(training[:50], training)[0].max() < 1e-3
    assert torch.equal(nearest_neighbours(training[:50], training)[1], torch.arange(50))


def test_copies_are_found_and_another_draw_of_the_same_distribution_is_not_accused():
    training, held_out, other = features(1000, 0), features(1000, 1), features(1000, 2)
    copied = memorisation(training[::2], held_out, training)
    assert copied["ratio"] < 1e-6 and copied["share_of_copies"] == 1
    honest = memorisation(other, held_out, training)
    assert honest["ratio"] == pytest.approx(1, abs=0.05) and honest["share_of_copies"] < 0.03
    half = memorisation(torch.cat([training[:500], other[:500]]), held_out, training)
    assert half["ratio"] == pytest.approx(0.5, abs=0.05) and half["share_of_copies"] == pytest.approx(0.5, abs=0.03)
