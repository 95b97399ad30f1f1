#!/usr/bin/env python
"""How does the cost of training grow: with the resolution, the batch, the data, the processes?

    python benchmarks/scaling.py mnist-ddpm --train_data_dir MNIST --output scaling

Every row is a `--dry_run` of a training script, which times a run in small: seconds of a step, and seconds of the
whole command but its steps, which is what reading the pictures costs. `growth` is the slope of log(seconds) over
log(what grows), 1 where the cost is in proportion. The table is `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def dry_run(script: str, processes: int, flags: list[str]) -> tuple[float, float]:
    """Seconds of a step, and of everything else."""
    command = [str(ROOT / "train_scripts" / f"{script}.py"), *flags, "--dry_run"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process",
              str(max(1, (os.cpu_count() or 1) // processes))]  # fmt: skip
    began = time.perf_counter()
    said = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    whole = time.perf_counter() - began
    step = float(re.search(r"([\d.]+) s a step", said)[1])
    return step, max(0.0, whole - 10 * step)  # of its ten steps


def growth(first: dict, last: dict, key: str) -> float:
    return math.log(max(last[key], 1e-3) / max(first[key], 1e-3)) / math.log(last["value"] / first["value"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--script", default="train_ddpm")
    parser.add_argument("--train_data_dir")
    parser.add_argument("--resolution", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--train_batch_size", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--max_train_samples", type=int, nargs="*", default=[600, 6000, 60000])
    parser.add_argument("--num_processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("scaling"))
    args = parser.parse_args()

    data = [] if args.train_data_dir is None else ["--train_data_dir", args.train_data_dir]
    base = ["--preset", args.preset, *data, "--max_train_steps", "100", "--output_dir", "runs/scaling"]
    grown = {
        "resolution": args.resolution,
        "train_batch_size": args.train_batch_size,
        "max_train_samples": args.max_train_samples,
        "num_processes": args.num_processes,
    }
    figures, lines = (
        [],
        ["| what grows | from … to | a step, s | growth | the rest, s | growth |", "|---|---|---|---|---|---|"],
    )
    for name, values in grown.items():
        rows = []
        for value in values:
            flags = [] if name == "num_processes" else [f"--{name}", str(value)]
            if name != "train_batch_size":  # a small one, so that the largest pictures fit
                flags += ["--train_batch_size", "16"]
            step, rest = dry_run(args.script, value if name == "num_processes" else 1, [*base, *flags])
            rows.append({"what": name, "value": value, "step": step, "rest": rest})
            print(rows[-1], flush=True)
        figures += rows
        if len(rows) > 1:
            cells = [name, " → ".join(str(row["value"]) for row in rows)]
            for key in ("step", "rest"):
                cells += [" → ".join(f"{row[key]:.3g}" for row in rows), f"{growth(rows[0], rows[-1], key):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        args.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
        args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
