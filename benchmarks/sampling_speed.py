#!/usr/bin/env python
"""Pictures a second and how many of them are what was asked for: pixels and latents, many steps and few.

    python benchmarks/sampling_speed.py --pixel runs/mnist-ddpm --latent runs/mnist-fast \\
        --student runs/mnist-fast-lcm --classifier runs/mnist-classifier --output sampling-speed

All cells draw in turn, a batch each, `--rounds` times, so that a machine that gets busier slows all of them; the speed
is the median over the rounds, in the same precision, with the same seeds and labels. Label accuracy, by a classifier
of train_classifier.py, is of all samples of a cell, of those that draw fast of `--num_samples`. The table, with ratios
to the pixel model's cells, is `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hwdiffusion.extractors import load_extractor
from hwdiffusion.metrics import wilson_interval
from hwdiffusion.models import load_pipeline, swap_scheduler
from hwdiffusion.samples import draw


@dataclass
class Cell:
    name: str
    run: str  # which of the pipelines
    steps: int
    scheduler: str | None = None
    guidance: float | None = None
    options: dict = field(default_factory=dict)
    batch_size: int = 250
    seconds: list[float] = field(default_factory=list)  # of a picture
    right: int = 0
    drawn: int = 0


def cells(args) -> list[Cell]:
    rows = []
    if args.pixel:
        rows += [
            Cell("pixels, DDPM 1000", "pixel", 1000, "ddpm", 1.0, batch_size=10),
            Cell("pixels, DDIM 50", "pixel", 50, "ddim", 1.0, batch_size=50),
        ]
    scale = args.guidance_scale
    rows += [
        Cell("latents, DDIM 50, guided", "latent", 50, "ddim", scale),
        *(Cell(f"latents, DPM-Solver++ {steps}, guided", "latent", steps, "dpmpp", scale) for steps in args.steps),
        *(
            Cell(
                f"latents, DPM-Solver++ {steps}, guided in ({low}, {high})",
                "latent",
                steps,
                "dpmpp",
                scale,
                {"guidance_interval": (low, high)},
            )
            for steps in args.steps
            for low, high in [args.guidance_interval]
        ),
        *(Cell(f"latents, DPM-Solver++ {steps}", "latent", steps, "dpmpp", 1.0) for steps in args.steps),
    ]
    if args.student:
        rows += [Cell(f"student, LCM {steps}", "student", steps) for steps in (1, 2, 4)]
    return rows


def draw_some(cell: Cell, pipe, classifier, seed: int):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixel", help="a run of a pixel model")
    parser.add_argument("--latent", required=True, help="a run of a latent one")
    parser.add_argument("--student", help="what train_distill.py made of it")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10, 8, 5])
    parser.add_argument("--guidance_scale", type=float, help="default: what the run recommends")
    parser.add_argument("--guidance_interval", type=float, nargs=2, default=[0.2, 0.8])
    parser.add_argument("--num_samples", type=int, default=2000, help="of the cells that draw fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch_dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("sampling-speed"))
    args = parser.parse_args()

    classifier = load_extractor("classifier", args.classifier)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {"pixel": args.pixel, "latent": args.latent, "student": args.student}
    pipes = {name: load_pipeline(run, device, dtype=args.torch_dtype) for name, run in named.items() if run}
    rows = cells(args)
    for pipe in pipes.values():
        draw(pipe, 0, 10, args.seed, num_inference_steps=2)  # warm-up
    for _ in range(args.rounds):
        for cell in rows:
            draw_some(cell, pipes[cell.run], classifier, args.seed)
    timed = {cell.name: statistics.median(cell.seconds) for cell in rows}
    for cell in rows:
        while cell.batch_size == 250 and cell.drawn < args.num_samples:
            draw_some(cell, pipes[cell.run], classifier, args.seed)

    slow = [cell.name for cell in rows if cell.run == "pixel"]
    lines = [
        "| sampler | pictures/s | label accuracy (95 %) | n |" + "".join(f" × {name} |" for name in slow),
        "|---" * (4 + len(slow)) + "|",
    ]
    for cell in rows:
        low, high = wilson_interval(cell.right, cell.drawn)
        ratios = "".join(f" {timed[name] / timed[cell.name]:.1f} |" for name in slow)
        accuracy = f"{cell.right / cell.drawn:.4f} ({low:.4f}–{high:.4f})"
        lines.append(f"| {cell.name} | {1 / timed[cell.name]:.1f} | {accuracy} | {cell.drawn} |{ratios}")
    figures = [
        {"name": cell.name, "pictures_per_second": 1 / timed[cell.name], "right": cell.right, "n": cell.drawn,
         "seconds_of_a_picture": cell.seconds[: args.rounds]} for cell in rows
    ]  # fmt: skip
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
