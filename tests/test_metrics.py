import math

import pytest
import torch

from hwdiffusion.metrics import coverage, nearest_distances, nearest_neighbour_ratio, wilson_interval


# float64: `cdist` multiplies matrices, which in float32 leaves small distances inexact
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


def test_nearest_distances_are_those_of_all_pairs():
    queries, training = features(1300, 0, 3), features(40, 1, 3)  # more than one chunk
    expected = (queries[:, None] - training[None]).square().sum(dim=-1).sqrt().amin(dim=1)
    torch.testing.assert_close(nearest_distances(queries, training), expected)


def test_the_ratio_is_0_for_copies_and_1_for_another_draw_of_the_same_distribution():
    training, held_out, other = features(1000, 0), features(1000, 1), features(1000, 2)
    assert nearest_neighbour_ratio(training[::2], held_out, training) < 1e-6
    assert nearest_neighbour_ratio(other, held_out, training) == pytest.approx(1, abs=0.05)


def test_the_ratio_falls_with_the_share_of_copies():
    training, held_out, other = features(1000, 0), features(1000, 1), features(1000, 2)
    half = torch.cat([training[:500], other[:500]])
    assert nearest_neighbour_ratio(half, held_out, training) == pytest.approx(0.5, abs=0.05)
