import numpy as np
import pytest
import torch

from hwdiffusion.labels import balanced_order, drop_labels
from hwdiffusion.randomness import BatchOrder, Draws, epoch_order


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


def test_single_labels_are_dropped_from_their_sets_by_themselves():
    count, given = 20_000, tokens(20_000)
    draws = Draws(0, 0, torch.arange(count))
    kept = (drop_labels(given, 0.1, draws, single=0.2) != 0).any(dim=-1)  # (B, T)
    gone = dropped(drop_labels(given, 0.1, draws))
    assert not kept[gone].any()  # the sets that go as a whole are the same ones
    rest = kept[~gone].double()
    assert rest.mean(dim=0).tolist() == pytest.approx([0.8] * 3, abs=0.015)
    together = (rest[:, 0] * rest[:, 1]).mean().item()
    assert together == pytest.approx(0.8**2, abs=0.015)  # each by itself
    part = drop_labels(given[100:], 0.1, Draws(0, 0, torch.arange(100, count)), single=0.2)
    assert torch.equal((part != 0).any(dim=-1), kept[100:])


def test_what_is_dropped_changes_from_step_to_step():
    first, second = (dropped(drop_labels(tokens(64), 0.5, Draws(0, step, torch.arange(64)))) for step in (0, 1))
    assert not torch.equal(first, second)


# -- class balance ----------------------------------------------------------------------------------------------------

LOPSIDED = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)[:, None]


def visits(labels: torch.Tensor, balance: float, epochs: int = 20) -> np.ndarray:
    order = balanced_order(labels, balance)
    shown = np.concatenate([order(0, epoch, len(labels)) for epoch in range(epochs)])
    return np.bincount(shown, minlength=len(labels)) / epochs


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_a_class_is_shown_in_proportion_to_its_size_to_the_power_of_1_minus_balance(balance):
    seen = visits(LOPSIDED, balance)
    parts = np.array([seen[:900].sum(), seen[900:990].sum(), seen[990:].sum()])
    expected = np.array([900, 90, 10]) ** (1 - balance)
    np.testing.assert_allclose(parts / 1000, expected / expected.sum(), rtol=0.02)


def test_pictures_of_a_class_are_shown_alike_and_no_rare_one_is_left_out_of_an_epoch():
    order = balanced_order(LOPSIDED, 1.0)
    for epoch in range(5):
        counts = np.bincount(order(0, epoch, 1000), minlength=1000)
        for part, mean in (
            (slice(900), 1000 / 3 / 900),
            (slice(900, 990), 1000 / 3 / 90),
            (slice(990, 1000), 100 / 3),
        ):
            assert set(counts[part]) <= {int(mean), int(mean) + 1}


def test_every_picture_of_a_frequent_class_has_its_turn():
    assert (visits(LOPSIDED, 1.0, epochs=60)[:900] > 0).all()


def test_a_balanced_order_is_a_function_of_seed_and_epoch_and_is_mixed():
    order = balanced_order(LOPSIDED, 0.5)
    assert np.array_equal(order(3, 2, 1000), balanced_order(LOPSIDED, 0.5)(3, 2, 1000))
    assert not np.array_equal(order(3, 2, 1000), order(3, 3, 1000))
    assert not np.array_equal(order(3, 2, 1000), order(4, 2, 1000))
    classes = LOPSIDED[:, 0].numpy()[order(0, 0, 1000)]
    halves = [np.bincount(half, minlength=3) for half in np.split(classes, 2)]
    assert np.abs(halves[0] - halves[1]).max() < 60  # no class comes first


def test_sets_of_labels_are_balanced_by_the_mean_of_their_labels_and_pictures_without_count_as_average():
    labels = torch.tensor([[0, -1]] * 60 + [[0, 1]] * 20 + [[-1, -1]] * 20)
    seen = visits(labels, 1.0, epochs=200)
    one, both = seen[:60].mean(), seen[60:80].mean()
    assert both / one == pytest.approx((1 / 80 + 1 / 20) / 2 / (1 / 80), rel=0.02)
    assert seen[80:].mean() == pytest.approx((60 * one + 20 * both) / 80, rel=0.02)


def test_processes_and_micro_batches_slice_a_balanced_order_as_any_other():
    order = balanced_order(LOPSIDED, 0.5)
    alone = BatchOrder(0, 1000, 0, 8, order=order)
    parts = [iter(BatchOrder(0, 1000, 0, 4, rank=rank, world_size=2, order=order)) for rank in (0, 1)]
    for whole, _ in zip(alone, range(300)):  # more than two epochs
        assert whole == next(parts[0]) + next(parts[1])
    later = BatchOrder(0, 1000, 200, 8, order=order)
    assert next(iter(later)) == alone.of_step(200)
    assert alone.of_step(0) != BatchOrder(0, 1000, 0, 8, order=epoch_order).of_step(0)
