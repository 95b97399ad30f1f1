#!/usr/bin/env python
"""Does memory stay flat over a long run on pictures that are not kept in memory?

python benchmarks/memory_growth.py --train_data_dir PICTURES [--streaming] [--steps 2000]

Trains a tiny pixel model in a process of its own, reading pictures lazily from files, or as a stream, and measures the
memory of that process (all that is resident) and of its workers (what they have for themselves) as it goes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


SCRIPT = Path(__file__).resolve().parents[1] / "train_scripts" / "train_ddpm.py"
UNET = {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}  # fmt: skip


def memory_of(process: psutil.Process) -> float:
    """Bytes of a process, and what its children don't share."""
    return process.memory_info().rss + sum(child.memory_full_info().uss for child in process.children(recursive=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        argv = [sys.executable, str(SCRIPT), "--preset", "mnist-unconditional", "--output_dir", str(run)]
        argv += [
            "--train_data_dir",
            options.train_data_dir,
            "--image_memory_gb",
            "0",
            "--max_train_steps",
            str(options.steps),
        ]
        argv += ["--resolution", str(options.resolution), "--train_batch_size", str(options.batch_size)]
        argv += ["--logging_steps", "1", "--checkpointing_steps", str(options.steps), "--num_inference_steps", "2"]
        argv += ["--streaming"] if options.streaming else []
        for key, value in UNET.items():
            argv += [f"--unet.{key}", json.dumps(value)]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        metrics, measured = run / "metrics.jsonl", []
        while process.poll() is None:
            time.sleep(1)
            if metrics.is_file():
                step = metrics.read_bytes().count(b"\n")
                try:
                    measured.append((step, memory_of(psutil.Process(process.pid))))
                except psutil.NoSuchProcess:
                    break
        if process.wait() != 0:
            sys.exit(process.returncode)
    during = [(step, bytes_) for step, bytes_ in measured if 0 < step < options.steps]
    for part in (0.1, 0.25, 0.5, 0.75, 1.0):
        step, bytes_ = min(during, key=lambda pair: abs(pair[0] - part * options.steps))
        print(f"step {step:5d}: {bytes_ / 2**20:7.1f} MiB")
    tenth = min(during, key=lambda pair: abs(pair[0] - 0.1 * options.steps))
    last = during[-1]
    print(
        json.dumps({"from_step": tenth[0], "to_step": last[0], "growth_mib": round((last[1] - tenth[1]) / 2**20, 1)})
    )


if __name__ == "__main__":
    main()
