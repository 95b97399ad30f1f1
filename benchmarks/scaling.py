#!/usr/bin/env python
"""How does the cost of training grow: with the resolution, the batch, the data, the processes?

    python benchmarks/scaling.py mnist-ddpm --train_data_dir MNIST --output scaling

Every point is a `--dry_run` of a training script, which times a run in small; all points take their turns, `--rounds`
times, on a CPU. Of each the medians: milliseconds of a step and of one of its pictures, and seconds of the rest of the
command, which is some seconds of imports, and then what reading the pictures costs; of a step in brackets the least
and the most of all rounds. `exponent` is the slope of
log(a step) over log(what grows): 1 where a step costs in proportion, 0 where it costs the same. Of processes a step
has as many times the pictures, so 0 is what n processes could give at best, and 1 means that nothing was gained. The
table is `OUTPUT.md`, the figures, of every round, `OUTPUT.json`.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TRIAL_STEPS = 10  # of a dry run


def dry_run(script: str, processes: int, batch_size: int, flags: list[str]) -> dict[str, float]:
    """Seconds of a step, of a picture and of everything else."""
    command = [
        str(ROOT / "train_scripts" / f"{script}.py"),
        *flags,
        "--dry_run",
        "--train_batch_size",
        str(batch_size),
    ]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines",
              "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process",
              str(max(1, (os.cpu_count() or 1) // processes))]  # fmt: skip
    began = time.perf_counter()
    said = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},  # also for `--multi_gpu`, which else looks for GPUs
    ).stdout
    whole = time.perf_counter() - began
    pictures = int(re.search(r"steps of (\d+) pictures", said)[1])
    assert pictures == batch_size * processes, f"{processes} processes don't know of each other: {said}"
    step = float(re.search(r"([\d.]+) s a step", said)[1])
    return {"step": step, "picture": step / pictures, "rest": max(0.0, whole - TRIAL_STEPS * step)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--script", default="train_ddpm", choices=["train_ddpm", "train_vqgan"])
    parser.add_argument("--train_data_dir")
    parser.add_argument("--resolution", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--train_batch_size", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--max_train_samples", type=int, nargs="*", default=[600, 6000, 60000])
    parser.add_argument("--num_processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("scaling"))
    args = parser.parse_args()

    data = [] if args.train_data_dir is None else ["--train_data_dir", args.train_data_dir]
    base = ["--preset", args.preset, *data, "--max_train_steps", "100", "--output_dir", "runs/scaling"]
    grown = {name: getattr(args, name) for name in ("resolution", "train_batch_size", "max_train_samples",
                                                    "num_processes")}  # fmt: skip
    points = {(name, value): [] for name, values in grown.items() for value in values}
    for _ in range(args.rounds):
        for (name, value), rounds in points.items():
            processes = value if name == "num_processes" else 1
            batch_size = value if name == "train_batch_size" else 16  # small, so that the largest pictures fit
            flags = [f"--{name}", str(value)] if name in ("resolution", "max_train_samples") else []
            rounds.append(dry_run(args.script, processes, batch_size, [*base, *flags]))
            print(name, value, rounds[-1], flush=True)

    figures = [{"what": name, "value": value, "rounds": rounds} for (name, value), rounds in points.items()]
    lines = ["| what grows | from … to | a step, ms | exponent | a picture, ms | the rest, s |", "|---" * 6 + "|"]
    for name, values in grown.items():
        medians = {
            key: [statistics.median(of[key] for of in points[name, value]) for value in values]
            for key in ("step", "picture", "rest")
        }
        steps_of = {value: [1000 * of["step"] for of in points[name, value]] for value in values}
        spread = [f"{digits(statistics.median(of))} ({digits(min(of))}–{digits(max(of))})" for of in steps_of.values()]
        cells = [name, " → ".join(map(str, values)), " → ".join(spread), arrows(medians["picture"], 1000)]
        exponent = ""
        if len(values) > 1:
            steps = medians["step"]
            exponent = f"{math.log(steps[-1] / steps[0]) / math.log(values[-1] / values[0]):.2f}"
        cells.insert(3, exponent)
        lines.append(f"| {' | '.join(cells)} | {arrows(medians['rest'], 1)} |")
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def arrows(values: list[float], unit: float) -> str:
    return " → ".join(digits(value * unit) for value in values)


def digits(value: float) -> str:
    """Three of them, and of what is larger all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
