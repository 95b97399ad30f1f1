#!/usr/bin/env python
"""Pictures a second and how many of them are what was asked for: pixels and latents, many steps and few.

    python benchmarks/sampling_speed.py --pixel runs/mnist-ddpm --latent runs/mnist-fast \\
        --student runs/mnist-fast-lcm --classifier runs/mnist-classifier --output sampling-speed

All cells draw in turn, a batch each, `--rounds` times, so that a machine that gets busier slows all of them, with the
same seeds and labels, in every precision that is asked for; what takes minutes, pixels in 1,000 steps, draws in the
first round only. The speed is the median over the rounds, with the slowest and the fastest of them. Batches are of
250, those of pixels of 50. Label accuracy, by a classifier of train_classifier.py, is of all samples of a cell, of
latents of `--num_samples`. The table, with ratios of the medians to those of the pixel model's cells in the same
precision, is `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hwdiffusion.arguments import ALL_STEPS
from hwdiffusion.extractors import load_extractor
from hwdiffusion.failures import exit_code
from hwdiffusion.metrics import wilson_interval
from hwdiffusion.models import load_pipeline, swap_scheduler
from hwdiffusion.pipelines import guidance_of
from hwdiffusion.samples import draw


@dataclass
class Cell:
    name: str
    run: str  # which of the pipelines
    dtype: str
    steps: int | None = None  # by default, as all that follows, what the run recommends
    scheduler: str | None = None
    guidance: float | None = None
    options: dict = field(default_factory=dict)
    batch_size: int = 250
    rounds: int | None = None  # at most
    seconds: list[float] = field(default_factory=list)  # of a picture
    right: int = 0
    drawn: int = 0


def cells(args, guidance, dtype: str) -> list[Cell]:
    rows = []
    if args.pixel:
        rows += [
            Cell("pixels, DDPM 1000", "pixel", dtype, 1000, "ddpm", 1.0, batch_size=50, rounds=1),
            Cell("pixels, DDIM 50", "pixel", dtype, 50, "ddim", 1.0, batch_size=50),
        ]
    scale, (low, high) = guidance
    rows.append(Cell("latents, as saved", "latent", dtype))
    rows.append(Cell(f"latents, DDIM 50, guidance {scale:g}", "latent", dtype, 50, "ddim", scale))
    for which, by, options in (
        (f", guidance {scale:g}", scale, {}),
        (f", guidance {scale:g} in ({low:g}, {high:g})", scale, {"guidance_interval": (low, high)}),
        ("", 1.0, {}),
    ):
        for steps in args.steps:
            name = f"latents, DPM-Solver++ {steps}{which}"
            rows.append(Cell(name, "latent", dtype, steps, "dpmpp", by, options))
    if args.student:
        rows += [Cell(f"student, LCM {steps}", "student", dtype, steps) for steps in (1, 2, 4)]
    return rows


def draw_some(cell: Cell, pipe, recommended, classifier, seed: int):
    """A batch of a cell, by a pipeline whose scheduler was `recommended` when it was loaded."""
    pipe.scheduler = recommended
    if cell.scheduler is not None:
        swap_scheduler(pipe, cell.scheduler)
    began = time.perf_counter()
    stop = cell.drawn + cell.batch_size
    options = {"num_inference_steps": cell.steps, "guidance_scale": cell.guidance, **cell.options}
    images = draw(pipe, cell.drawn, stop, seed, **options)
    cell.seconds.append((time.perf_counter() - began) / cell.batch_size)
    asked = torch.arange(cell.drawn, stop) % pipe.num_classes
    cell.right += (classifier(images)[1].argmax(dim=1).cpu() == asked).sum().item()
    cell.drawn = stop


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {word}")
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixel", help="a run of a pixel model")
    parser.add_argument("--latent", required=True, help="a run of a latent one")
    parser.add_argument("--student", help="what train_distill.py made of it")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10, 8, 5])
    parser.add_argument("--guidance_scale", type=float, help="default: what the run recommends")
    parser.add_argument("--guidance_interval", type=float, nargs=2, help="default: as the run does, or 0.2 0.8")
    parser.add_argument("--num_samples", type=int, default=2000, help="of the cells that draw fast")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch_dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--output", type=Path, default=Path("sampling-speed"))
    args = parser.parse_args()

    classifier = load_extractor("classifier", args.classifier)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {"pixel": args.pixel, "latent": args.latent, "student": args.student}
    pipes = {
        (name, dtype): load_pipeline(run, device, dtype=dtype)
        for dtype in args.torch_dtype
        for name, run in named.items()
        if run
    }
    scale, interval = guidance_of(pipes["latent", args.torch_dtype[0]].config)
    scale = scale if args.guidance_scale is None else args.guidance_scale
    interval = args.guidance_interval or (interval if list(interval) != ALL_STEPS else (0.2, 0.8))
    rows = [cell for dtype in args.torch_dtype for cell in cells(args, (scale, interval), dtype)]
    recommended = {which: pipe.scheduler for which, pipe in pipes.items()}
    for pipe in pipes.values():
        draw(pipe, 0, 10, args.seed, num_inference_steps=2)  # warm-up

    def draw_a_batch(cell: Cell):
        which = cell.run, cell.dtype
        draw_some(cell, pipes[which], recommended[which], classifier, args.seed)

    for done in range(args.rounds):
        for cell in rows:
            if cell.rounds is None or done < cell.rounds:
                draw_a_batch(cell)
    timed = {(cell.name, cell.dtype): list(cell.seconds) for cell in rows}
    for cell in rows:
        while cell.run != "pixel" and cell.drawn < args.num_samples:
            draw_a_batch(cell)

    slow = ["pixels, DDPM 1000", "pixels, DDIM 50"] if args.pixel else []
    lines = [
        "| sampler | precision | pictures/s (least–most) | label accuracy (95 %) | n |"
        + "".join(f" × {name} |" for name in slow),
        "|---" * (5 + len(slow)) + "|",
    ]
    for cell in rows:
        low, high = wilson_interval(cell.right, cell.drawn)
        seconds = timed[cell.name, cell.dtype]
        median = statistics.median(seconds)
        speed = f"{1 / median:.1f} ({1 / max(seconds):.1f}–{1 / min(seconds):.1f})"
        ratios = "".join(f" {statistics.median(timed[name, cell.dtype]) / median:.1f} |" for name in slow)
        accuracy = f"{cell.right / cell.drawn:.4f} ({low:.4f}–{high:.4f})"
        lines.append(f"| {cell.name} | {cell.dtype} | {speed} | {accuracy} | {cell.drawn} |{ratios}")
    figures = {"runs": named, "classifier": args.classifier, "seed": args.seed, "device": str(device)}
    figures["cells"] = [
        {"name": cell.name, "torch_dtype": cell.dtype, "right": cell.right, "n": cell.drawn,
         "batch_size": cell.batch_size, "seconds_of_a_picture": timed[cell.name, cell.dtype]} for cell in rows
    ]  # fmt: skip
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code("sampling_speed.py", main))
