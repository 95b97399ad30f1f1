"""Counter-based randomness: what is drawn depends on (seed, step, sample, name) and on nothing else.

Stateful generators make a run depend on its own history: on where it was interrupted and on how many processes share
a batch. Here every draw is a pure function of its coordinates, so a resumed run draws what an unbroken one would have
drawn, and rank r of n processes draws exactly its slice of what one process draws.

The function is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written in torch so
that it runs on the device, a whole batch at a time. The 128-bit counter is (element block, sample, step, name).
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch


_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[torch.Tensor | int], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10.

    Args:
        counter: four 32-bit words, as int64 tensors (or ints) that broadcast together.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of random 32-bit words, in [0, 2^32).
    """
    device = next((word.device for word in counter if torch.is_tensor(word)), torch.device("cpu"))
    # a number is filled in on its device: copied to a GPU, it would hold the training up
    words = (word if torch.is_tensor(word) else torch.full((), word, device=device) for word in counter)
    x0, x1, x2, x3 = torch.broadcast_tensors(*words)
    # words 0 and 2, and 1 and 3, go through a round together: half as many operations, whose overhead is all that
    # small tensors cost
    even, odd = torch.stack([x0, x2]), torch.stack([x1, x3])
    pairs = (2, *[1] * x0.dim())
    multipliers, round_keys = _constants(key, device)
    for round_key in round_keys.view(_ROUNDS, *pairs):
        # int64 products wrap, which keeps all 64 bits; the shift is arithmetic, hence the mask
        products = (even * multipliers.view(pairs)).flip(0)
        even, odd = ((products >> 32) & _MASK) ^ odd ^ round_key, products & _MASK
    return [even[0], odd[0], even[1], odd[1]]


@functools.lru_cache(maxsize=4)  # a copy to a GPU at every draw would hold the training up
def _constants(key: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The multipliers `(2,)`, and the keys of the rounds `(10, 2)`."""
    keys = [[(k + i * more) & _MASK for k, more in zip(key, _KEY_INCREMENTS)] for i in range(_ROUNDS)]
    return torch.tensor(_ROUND_MULTIPLIERS, device=device), torch.tensor(keys, device=device)


class Draws:
    """The random numbers of some samples of one training step.

    Args:
        seed: the run's seed, in [0, 2^64).
        step: the optimizer step, in [0, 2^32).
        samples: `(B,)` places of the samples in the step's batch over all processes and accumulated micro-batches.
    """

    def __init__(self, seed: int, step: int, samples: torch.Tensor):
        self.seed, self.step = seed, step
        self.key = (seed & _MASK, (seed >> 32) & _MASK)
        self.samples = samples.long()

    def shared(self) -> "Draws":
        """The draws of the step itself, as of one sample: the same on every process."""
        return Draws(self.seed, self.step, self.samples.new_zeros(1))

    def _unit(self, name: str, count: int) -> torch.Tensor:
        """Four times `count` numbers a sample, uniform in the open interval (0, 1): float32 `(4, B, count)`."""
        blocks = torch.arange(count, device=self.samples.device).unsqueeze(0)  # (1, count)
        counter = (blocks, self.samples.unsqueeze(1), self.step, zlib.crc32(name.encode()))
        words = torch.stack(philox(counter, self.key))
        return ((words >> 9).float() + 0.5) * 2.0**-23  # 23 bits and a half: exact in float32, never 0 or 1

    def uniform(self, name: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Uniform in (0, 1), float32 `(B, *shape)`; the same `name` gives the same numbers again."""
        size = math.prod(shape)
        unit = self._unit(name, -(-size // 4))  # (4, B, blocks)
        return unit.permute(1, 2, 0).reshape(len(self.samples), -1)[:, :size].reshape(len(self.samples), *shape)

    def normal(self, name: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Standard normal (Box-Muller), float32 `(B, *shape)`; the same `name` gives the same numbers again."""
        size = math.prod(shape)
        u0, u1, u2, u3 = self._unit(name, -(-size // 4))  # each (B, blocks)
        r0, r1 = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
        a0, a1 = 2 * math.pi * u1, 2 * math.pi * u3
        normal = torch.stack([r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()], dim=-1)
        return normal.reshape(len(self.samples), -1)[:, :size].reshape(len(self.samples), *shape)


def seed_modules(seed: int, device: torch.device):
    """Seed what modules on a device draw from by themselves, dropout.

    On a CPU not by `torch.manual_seed`, which also notes the stack for a GPU that may come: a hundredth of a small
    UNet's step.
    """
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order `(size,)` in which an epoch visits the data set, a function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


class BatchOrder:
    """Endless batches of data set indices for one process, from a given step on.

    Epochs follow each other without a gap, so no batch is short, and a step's batch is the same whatever the number of
    processes and accumulated micro-batches that it is cut into.

    Args:
        seed: the run's seed.
        size: the data set's length.
        first_step: the step to start with.
        batch_size: samples of one micro-batch of one process.
        micro_batches: micro-batches of a step.
        rank, world_size: which process this is, and of how many.
        order: a function (seed, epoch, size) → the indices `(size,)` that an epoch visits.
    """

    def __init__(self, seed, size, first_step, batch_size, micro_batches=1, rank=0, world_size=1, order=epoch_order):
        self.seed, self.size, self.first_step, self.order = seed, size, first_step, order
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.rank, self.world_size = rank, world_size

    @property
    def step_size(self) -> int:
        """Samples of a step over all processes and micro-batches."""
        return self.batch_size * self.micro_batches * self.world_size

    def places(self, micro_batch: int) -> np.ndarray:
        """Where in the step's batch this process's samples stand, `(batch_size,)`."""
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def of_step(self, step: int) -> list[int]:
        """The data set indices of a step's whole batch, over all processes and micro-batches."""
        return self._indices(step * self.step_size + np.arange(self.step_size), {})

    def positions(self) -> Iterator[np.ndarray]:
        """Where the batches of this process stand in the sequence of all epochs, each `(batch_size,)`."""
        step = self.first_step
        while True:
            for micro_batch in range(self.micro_batches):
                yield step * self.step_size + self.places(micro_batch)
            step += 1

    def _indices(self, positions: np.ndarray, orders: dict[int, np.ndarray]) -> list[int]:
        epochs = positions // self.size
        for epoch in set(epochs.tolist()) - orders.keys():
            orders[epoch] = self.order(self.seed, epoch, self.size)
        for past in [epoch for epoch in orders if epoch < epochs.min()]:
            del orders[past]
        return [int(orders[epoch][place]) for epoch, place in zip(epochs, positions % self.size)]

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, np.ndarray] = {}  # of the epochs that are being visited
        for positions in self.positions():
            yield self._indices(positions, orders)
