import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from hwdiffusion import randomness
from hwdiffusion.randomness import BatchOrder, Draws, epoch_order, philox


# The vectors of Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1].item()


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
@pytest.mark.parametrize("ints", [(), (2, 3)], ids=["tensors", "with ints"])
def test_philox_gives_the_published_vectors(counter, key, expected, ints):
    words = [word if place in ints else torch.tensor([word]) for place, word in enumerate(counter)]
    assert tuple(int(word) for word in philox(words, key)) == expected


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5)], ids=str)
def test_a_slice_of_the_samples_draws_a_slice_of_the_numbers(kind, shape):
    every = getattr(Draws(3, 7, torch.arange(40)), kind)("noise", shape)
    chosen = torch.tensor([39, 4, 5, 6, 20])
    assert every.shape == (40, *shape)
    assert torch.equal(getattr(Draws(3, 7, chosen), kind)("noise", shape), every[chosen])


@pytest.mark.parametrize(
    "other",
    [
        (4, 7, "noise"),
        (3 + 2**32, 7, "noise"),
        (3 + 2**62, 7, "noise"),
        (7, 3, "noise"),
        (3, 8, "noise"),
        (3, 7, "noises"),
    ],
    ids=str,
)
def test_another_seed_step_or_name_draws_unrelated_numbers(other):
    samples = torch.arange(64)
    ours = Draws(3, 7, samples).normal("noise", (256,))
    theirs = Draws(other[0], other[1], samples).normal(other[2], (256,))
    assert (ours == theirs).float().mean() < 1e-3
    assert abs(correlation(ours, theirs)) < 4 / ours.numel() ** 0.5


def test_numbers_of_neighbouring_samples_elements_and_steps_are_uncorrelated():
    first, second = (Draws(0, step, torch.arange(257)).normal("noise", (1025,)) for step in (0, 1))
    bound = 4 / first.numel() ** 0.5
    assert abs(correlation(first[1:], first[:-1])) < bound
    assert abs(correlation(first, second)) < bound
    for lag in range(1, 5):  # four numbers come from each block
        assert abs(correlation(first[:, lag:], first[:, :-lag])) < bound
        assert abs(correlation(first[:, lag:].square(), first[:, :-lag].square())) < bound


def test_uniform_numbers_are_uniform():
    numbers = Draws(11, 2, torch.arange(1000)).uniform("timestep", (200,)).double().numpy().reshape(-1)
    assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert numbers.mean() == pytest.approx(1 / 2, abs=4 * (1 / 12 / numbers.size) ** 0.5)
    assert numbers.var() == pytest.approx(1 / 12, abs=4 * (1 / 180 / numbers.size) ** 0.5)


def test_normal_numbers_are_normal():
    numbers = Draws(11, 2, torch.arange(1000)).normal("noise", (200,)).double().numpy().reshape(-1)
    assert scipy.stats.kstest(numbers, "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (numbers**power).mean() == pytest.approx(moment, abs=4 * (variance / numbers.size) ** 0.5)


@pytest.mark.parametrize("word", [0, 2**32 - 1], ids=["smallest", "largest"])
def test_the_extreme_words_give_numbers_inside_the_open_interval(monkeypatch, word):
    shape = torch.Size([2, 3])
    monkeypatch.setattr(randomness, "philox", lambda counter, key: [torch.full(shape, word)] * 4)
    draws = Draws(0, 0, torch.arange(2))
    uniform = draws.uniform("x", (12,))
    assert ((uniform > 0) & (uniform < 1)).all()
    assert draws.normal("x", (12,)).isfinite().all()


def test_shared_draws_are_the_same_for_every_slice_and_the_draws_of_a_step():
    first, second = (Draws(5, 9, samples).shared() for samples in (torch.arange(4), torch.arange(4, 10)))
    assert torch.equal(first.uniform("codebook", (17,)), second.uniform("codebook", (17,)))
    later = Draws(5, 10, torch.arange(4)).shared()
    assert not torch.equal(first.uniform("codebook", (17,)), later.uniform("codebook", (17,)))


def take(count: int, **options) -> list[list[int]]:
    return list(itertools.islice(BatchOrder(**{"seed": 1, "size": 10, "first_step": 0, **options}), count))


@pytest.mark.parametrize("size, batch_size", [(10, 4), (12, 4), (7, 1), (3, 8), (5, 5)])
def test_every_epoch_visits_each_index_once(size, batch_size):
    epochs = 5
    batches = take(-(-size * epochs // batch_size), size=size, batch_size=batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    visited = np.concatenate(batches)[: size * epochs].reshape(epochs, size)
    assert (np.sort(visited) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in visited.tolist()}) > 1


@pytest.mark.parametrize("world_size, micro_batches", [(2, 1), (1, 2), (3, 2)])
def test_processes_and_micro_batches_together_are_one_large_batch(world_size, micro_batches):
    """The place of each sample in the step's batch is the same too, so its random numbers are."""
    parts, steps = world_size * micro_batches, 6
    whole = take(steps, batch_size=4 * parts)
    cut = [[None] * (4 * parts) for _ in range(steps)]
    for rank in range(world_size):
        options = {"batch_size": 4, "micro_batches": micro_batches, "rank": rank, "world_size": world_size}
        order = BatchOrder(1, 10, 0, **options)
        for index, batch in enumerate(take(steps * micro_batches, **options)):
            step, micro_batch = divmod(index, micro_batches)
            for place, sample in zip(order.places(micro_batch), batch):
                cut[step][place] = sample
    assert cut == whole


@pytest.mark.parametrize("first_step", [1, 4, 29])
def test_starting_at_a_step_continues_as_an_unbroken_run(first_step):
    options = {"batch_size": 4, "micro_batches": 2, "rank": 1, "world_size": 2}
    unbroken = take(2 * (first_step + 7), **options)
    assert take(14, first_step=first_step, **options) == unbroken[2 * first_step :]


def test_epoch_orders_are_permutations_that_depend_on_seed_and_epoch():
    orders = [epoch_order(*key, 100) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0))]
    assert all((np.sort(order) == np.arange(100)).all() for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
