"""The time of a run, over all its starts, and how many steps a time budget still has room for."""

import time
from collections import deque


LOOKS = 400  # how often a run with a time budget looks at the clock
PACE = 40  # the time of a step is that of the steps since so many looks ago


class RunClock:
    """Counts the seconds of a run.

    Args:
        budget: the seconds that the run may last, over all its starts; `None` for a run that counts its steps.
    """

    def __init__(self, budget: float | None):
        self.budget = budget
        self._began, self._spent_before = time.perf_counter(), 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=PACE)  # seconds and steps

    def resume(self, seconds: float):
        """Count those seconds too, which earlier starts of the run took."""
        self._spent_before = seconds

    @property
    def seconds(self) -> float:
        return self._spent_before + time.perf_counter() - self._began

    def steps_within(self, seconds_a_step: float) -> int:
        """The steps that the rest of the budget has room for."""
        return max(0, int((self.budget - self.seconds) / seconds_a_step))

    def is_to_look(self, step: int, max_steps: int) -> bool:
        return self.budget is not None and step % max(1, max_steps // LOOKS) == 0

    def mark(self, step: int):
        """Note when a step was done."""
        self._marks.append((self.seconds, step))

    def steps_left(self, step: int) -> int:
        """The steps that the rest of the budget has room for, at the pace of the last tenth of the run.

        What was saved and drawn in that time counts, and a machine that gets slower or faster doesn't miss the budget.
        """
        began, first = self._marks[0]
        self.mark(step)
        now = self._marks[-1][0]
        return round(max(0.0, self.budget - now) / (max(1e-9, now - began) / (step - first)))
