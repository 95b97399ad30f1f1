"""The figures of every step: kept on the device, fetched some steps at once, watched, and written down.

They go into `metrics.jsonl`, a line a step, and to the run's trackers.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from hwdiffusion.checkpoints import write_file
from hwdiffusion.figures import read_metrics


METRICS_FILE = "metrics.jsonl"
MOST_SKIPPED = 25  # steps in a row whose gradient is not finite; after that the model will not recover
_ALL_SKIPPED = f"{MOST_SKIPPED} steps in a row were skipped; gradient_norm"


class TrainingLog:
    """Collects figures, and writes them when asked to.

    Args:
        accelerator: averages figures over processes, and has the trackers.
        folder: the run folder.
        step_size: pictures of a step over all processes.
        on_not_finite: told the step and the name of a loss or gradient norm that is not finite; it raises.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, step_size: int, on_not_finite: Callable[[int, str, float], None]
    ):
        self.accelerator, self.path, self.step_size = accelerator, folder / METRICS_FILE, step_size
        self.on_not_finite = on_not_finite
        self.latest: dict[str, float] = {}  # the losses of the last step that was fetched
        self._micro_batches: list[dict[str, torch.Tensor | float]] = []
        self._steps: list[dict[str, torch.Tensor | float]] = []
        self._seconds, self._images, self._since = 0.0, 0, time.perf_counter()
        self._skipped_in_a_row = 0

    def add(self, values: dict[str, torch.Tensor | float]):
        """Figures of a micro-batch; tensors stay on the device, and numbers must be the same on every process."""
        self._micro_batches.append(
            {name: value.detach().float() if torch.is_tensor(value) else value for name, value in values.items()}
        )

    def end_step(self):
        """A step's figures are the means over its micro-batches."""
        step = {}
        for name in sorted({name for figures in self._micro_batches for name in figures}):
            values = [figures[name] for figures in self._micro_batches if name in figures]
            step[name] = torch.stack(values).mean() if torch.is_tensor(values[0]) else sum(values) / len(values)
        self._steps.append(step)
        self._micro_batches = []
        now = time.perf_counter()
        self._seconds, self._images, self._since = (
            self._seconds + now - self._since,
            self._images + self.step_size,
            now,
        )

    def resume_clock(self):
        """What was done since the last step, saving and drawing, is not training time."""
        self._since = time.perf_counter()

    def clear(self):
        self._micro_batches, self._steps, self._seconds, self._images = [], [], 0.0, 0
        self.resume_clock()

    def fetch(self, last_step: int) -> list[dict[str, float]]:
        """The lines of the steps since the last fetch, up to `last_step`: means over processes.

        Raises:
            RunError: a loss or the norm of a gradient is not finite.
        """
        steps, first = self._steps, last_step - len(self._steps) + 1
        lines: list[dict[str, float]] = [{"step": first + place} for place in range(len(steps))]
        for name in sorted({name for figures in steps for name in figures}):
            places = [place for place, figures in enumerate(steps) if name in figures]
            values = [steps[place][name] for place in places]
            if torch.is_tensor(values[0]):
                values = self.accelerator.reduce(torch.stack(values), "mean").tolist()
            for place, value in zip(places, values):
                lines[place][name] = value
        # with fp16 the gradient scaler overflows now and then by design, and leaves such steps out
        watched = ("loss", "gradient_norm") if self.accelerator.scaler is None else ("loss",)
        for line in lines:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if "skipped" in line else 0
            if self._skipped_in_a_row == MOST_SKIPPED:
                self.on_not_finite(int(line["step"]), _ALL_SKIPPED, math.nan)
            for name, value in list(line.items()):
                if not math.isfinite(value):
                    if name.endswith(watched) and "skipped" not in line:
                        self.on_not_finite(int(line["step"]), name, value)
                    del line[name]  # no JSON has it
        if lines:
            self.latest = {name: value for name, value in lines[-1].items() if name.endswith("loss")}
            if self._seconds > 0:
                lines[-1]["images_per_second"] = round(self._images / self._seconds, 2)
            lines[-1]["peak_memory_gb"] = round(peak_memory(self.accelerator.device) / 2**30, 3)
        self._steps, self._seconds, self._images = [], 0.0, 0
        return lines

    def write(self, lines: list[dict[str, float]]):
        """Append lines to the file and give them to the trackers."""
        if not self.accelerator.is_main_process:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step"}
            self.accelerator.log(values, step=int(line["step"]))

    def forget_after(self, step: int):
        """Drop the lines of steps that an interrupted run logged, and that are about to be done again."""
        if self.accelerator.is_main_process and self.path.is_file():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.accelerator.wait_for_everyone()

    def skipped_steps(self) -> int:
        """How many steps of the whole run were left out."""
        return sum("skipped" in line for line in read_metrics(self.path))


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has had: of its GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
