#!/usr/bin/env python
"""How well and how fast does each sampler draw, in how many steps?

    python benchmarks/samplers.py runs/mnist-ldm --classifier runs/mnist-classifier --output samplers

Label accuracy, by a classifier of train_classifier.py, of samples that have the same labels and seeds in every cell,
and images a second, of every sampler at every number of steps, without guidance. The tables are `OUTPUT.md`, the
figures `OUTPUT.json`; what an interrupted run has measured is kept, and the same command goes on.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import diffusers
import torch

from hwdiffusion.extractors import load_extractor
from hwdiffusion.metrics import wilson_interval
from hwdiffusion.objectives import FLOW_PREDICTION
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.samples import draw, scheduler_digest, weights_digest
from hwdiffusion.schedulers import AnnealedLangevinScheduler


SDE = {"algorithm_type": "sde-dpmsolver++"}
FLOW = {"prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True}
# name: scheduler, settings, η; those in the first table, at all numbers of steps, and those in the second
MAIN = {
    "DDPM": ("DDPMScheduler", {}, 0.0),
    "DDIM": ("DDIMScheduler", {}, 0.0),
    "DDIM, leading": ("DDIMScheduler", {"timestep_spacing": "leading"}, 0.0),
    "DDIM, η = 1": ("DDIMScheduler", {}, 1.0),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, 0.0),
    "UniPC": ("UniPCMultistepScheduler", {}, 0.0),
    "Euler": ("EulerDiscreteScheduler", {}, 0.0),
    "Heun": ("HeunDiscreteScheduler", {}, 0.0),
    "DDIM + Langevin": (AnnealedLangevinScheduler, {}, 0.0),
    "annealed Langevin": (AnnealedLangevinScheduler, {"predictor": None, "snr": 0.4}, 0.0),
}
OTHERS = {
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 0.0),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", SDE, 0.0),
    "DPM-Solver++ single step": ("DPMSolverSinglestepScheduler", {}, 0.0),
    "DEIS": ("DEISMultistepScheduler", {}, 0.0),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, 0.0),
    "LMS": ("LMSDiscreteScheduler", {}, 0.0),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, 0.0),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, 0.0),
    "SA-Solver": ("SASolverScheduler", {}, 0.0),
    "LCM": ("LCMScheduler", {}, 0.0),
    "TCD": ("TCDScheduler", {}, 0.0),
}
FLOWS = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}, 0.0),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, 0.0),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", FLOW, 0.0),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {**FLOW, **SDE}, 0.0),
    "UniPC": ("UniPCMultistepScheduler", FLOW, 0.0),
}


def measure(pipe, classifier, args, steps: int, eta: float) -> dict:
    """Accuracy and speed of one cell."""
    draw(
        pipe,
        0,
        min(args.batch_size, args.num_samples),
        args.seed,
        num_inference_steps=2,
        guidance_scale=args.guidance_scale,
    )  # warm-up
    right, seconds = 0, 0.0
    for start in range(0, args.num_samples, args.batch_size):
        stop = min(start + args.batch_size, args.num_samples)
        began = time.perf_counter()
        images = draw(
            pipe, start, stop, args.seed, num_inference_steps=steps, guidance_scale=args.guidance_scale, eta=eta
        )
        seconds += time.perf_counter() - began
        _, probabilities = classifier(images)
        right += (probabilities.argmax(dim=1).cpu() == torch.arange(start, stop) % pipe.num_classes).sum().item()
    low, high = wilson_interval(right, args.num_samples)
    return {"accuracy": right / args.num_samples, "low": low, "high": high, "ips": args.num_samples / seconds}


def table(rows: dict[str, dict[str, dict]], columns: list[int]) -> str:
    heads = ["sampler", *(f"{steps} steps" for steps in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cells in rows.items():
        said = []
        for steps in columns:
            cell = cells.get(str(steps))
            if cell is None:
                said.append("")
            elif "refused" in cell:
                said.append("–")
            else:
                said.append(f"{cell['accuracy']:.3f} · {cell['ips']:.3g}/s")
        lines.append(f"| {name} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 10, 20, 50, 250, 1000])
    parser.add_argument("--other_steps", type=int, nargs="+", default=[20, 50], help="of the second table")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("samplers"))
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    pipe = ClassConditionalPipeline.from_pretrained(args.run).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_extractor("classifier", args.classifier, args.device)
    own = pipe.scheduler.config
    flow = pipe.config.prediction_type == FLOW_PREDICTION
    tables = {"main": (FLOWS if flow else MAIN, args.num_inference_steps)}
    if not flow:
        tables["others"] = (OTHERS, args.other_steps)
    about = {key: getattr(args, key) for key in ("num_samples", "guidance_scale", "batch_size", "seed")}
    about |= {"cells": [*MAIN, *OTHERS], "scheduler": scheduler_digest(pipe)}
    about |= {"run": args.run.name, "weights": weights_digest(pipe), "classifier": Path(args.classifier).name}
    path = args.output.with_suffix(".json")
    done = json.loads(path.read_text()) if path.is_file() else {}
    if done.get("about") != about:
        done = {"about": about}
    # the cheap cells first, so that a table is there early
    cells = [(steps, key, name) for key, (names, columns) in tables.items() for name in names for steps in columns]
    for steps, key, name in sorted(cells, key=lambda cell: cell[0]):
        rows = done.setdefault(key, {other: {} for other in tables[key][0]})
        if str(steps) in rows[name]:
            continue
        cls, settings, eta = tables[key][0][name]
        cls = getattr(diffusers, cls) if isinstance(cls, str) else cls
        pipe.scheduler = cls.from_config(own, **settings)
        try:
            rows[name][str(steps)] = measure(pipe, classifier, args, steps, eta)
        except ValueError as error:  # which the pipeline says before its first step
            rows[name][str(steps)] = {"refused": str(error)}
        print(f"{name}, {steps} steps: {rows[name][str(steps)]}", flush=True)
        path.write_text(json.dumps(done, indent=2, ensure_ascii=False) + "\n")
    text = "\n\n".join(table(done[key], columns) for key, (_, columns) in tables.items())
    args.output.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
