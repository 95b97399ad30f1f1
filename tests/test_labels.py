import pytest
import torch

from hwdiffusion.labels import drop_labels
from hwdiffusion.randomness import Draws


def tokens(count: int, slots: int = 3, classes: int = 5) -> torch.Tensor:
    ids = torch.arange(count * slots).reshape(count, slots) % classes
    return torch.nn.functional.one_hot(ids, classes).float()


def dropped(kept: torch.Tensor) -> torch.Tensor:
    return (kept == 0).all(dim=(1, 2))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_share_of_dropped_labels_is_the_probability(probability):
    count = 20_000
    share = dropped(drop_labels(tokens(count, 1), probability, Draws(0, 3, torch.arange(count)))).float().mean().item()
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / count) ** 0.5)


def test_whole_sets_are_dropped_and_the_others_left_as_they_are():
    given = tokens(200)
    result = drop_labels(given, 0.5, Draws(0, 0, torch.arange(200)))
    gone = dropped(result)
    assert 0 < gone.sum() < 200
    assert torch.equal(result[~gone], given[~gone])


@pytest.mark.parametrize("probability, kept", [(0.0, True), (1.0, False)])
def test_probabilities_0_and_1_keep_all_and_none(probability, kept):
    given = tokens(1000)
    result = drop_labels(given, probability, Draws(0, 0, torch.arange(1000)))
    assert torch.equal(result, given if kept else torch.zeros_like(given))


def test_a_slice_of_the_batch_drops_what_the_whole_batch_drops_there():
    given = tokens(64)
    whole = drop_labels(given, 0.5, Draws(0, 2, torch.arange(64)))
    assert torch.equal(drop_labels(given[32:], 0.5, Draws(0, 2, torch.arange(32, 64))), whole[32:])


def test_what_is_dropped_changes_from_step_to_step():
    first, second = (dropped(drop_labels(tokens(64), 0.5, Draws(0, step, torch.arange(64)))) for step in (0, 1))
    assert not torch.equal(first, second)
