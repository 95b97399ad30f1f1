#!/usr/bin/env python
"""What does each guidance do to an undertrained model?

    python benchmarks/guidances.py runs/undertrained --classifier runs/mnist-classifier --guide runs/guide \\
        --weak runs/undertrained/checkpoint-50 --train_data_dir MNIST --output guidances

Label accuracy and Fréchet distance (by a classifier of train_classifier.py, which is not the one that guides), and
images a second, of samples with the same labels and seeds in every row. The table is `OUTPUT.md`, the figures
`OUTPUT.json`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import ResNetForImageClassification

from hwdiffusion.comparison import Pictures
from hwdiffusion.data import load_data
from hwdiffusion.extractors import load_extractor
from hwdiffusion.judge import Judge
from hwdiffusion.label_sets import every_label, labels_in_turn
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.reference import RealSide, data_arguments
from hwdiffusion.samples import draw, image_mode_of


MIDDLE = (0.2, 0.8)
# what it is called, what it needs, arguments of a call
ROWS = [
    ("none", None, {}),
    ("classifier-free 1.5", None, {"guidance_scale": 1.5}),
    ("classifier-free 2", None, {"guidance_scale": 2.0}),
    ("classifier-free 3", None, {"guidance_scale": 3.0}),
    ("classifier-free 3, rescale 0.7", None, {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    ("classifier-free 3, in the middle 60 % of the steps", None, {"guidance_scale": 3.0, "guidance_interval": MIDDLE}),
    ("classifier 1", "guide", {"classifier_guidance_scale": 1.0}),
    ("classifier 2", "guide", {"classifier_guidance_scale": 2.0}),
    ("classifier 4", "guide", {"classifier_guidance_scale": 4.0}),
    ("classifier-free 1.5 + classifier 1", "guide", {"guidance_scale": 1.5, "classifier_guidance_scale": 1.0}),
    ("autoguidance 1.5", "weak", {"guidance_scale": 1.5}),
    ("autoguidance 2", "weak", {"guidance_scale": 2.0}),
    ("autoguidance 3", "weak", {"guidance_scale": 3.0}),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--classifier", required=True, help="that judges")
    parser.add_argument("--guide", required=True, help="a noise-aware classifier of train_classifier.py")
    parser.add_argument("--weak", required=True, type=Path, help="an earlier checkpoint of the run")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("guidances"))
    args = parser.parse_args()

    pipe = ClassConditionalPipeline.from_pretrained(args.run).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    helpers = {
        "guide": ResNetForImageClassification.from_pretrained(args.guide).eval().to(args.device),
        "weak": UNet2DConditionModel.from_pretrained(args.weak, subfolder="unet").to(args.device),
    }
    data = load_data(data_arguments(args.train_data_dir, list(pipe.image_size), image_mode_of(pipe)))
    judge = Judge(
        RealSide(data.validation, data.train, Path(args.train_data_dir).name, "held-out", trained_on=True),
        load_extractor("classifier", args.classifier, args.device),
        {"labels", "distances"},
        seed=0,
    )
    results = []
    lines = [
        "| guidance | label accuracy (95 %) | worst class | Fréchet distance | images/s |",
        "|---|---|---|---|---|",
    ]
    for name, needs, options in ROWS:
        pipe.classifier = helpers["guide"] if needs == "guide" else None
        pipe.guidance_unet = helpers["weak"] if needs == "weak" else None
        options = {"guidance_scale": 1.0, **options, "num_inference_steps": args.num_inference_steps}
        chunks, seconds = [], 0.0
        draw(
            pipe, 0, min(args.batch_size, args.num_samples), args.seed, **{**options, "num_inference_steps": 2}
        )  # warm-up
        for start in range(0, args.num_samples, args.batch_size):
            began = time.perf_counter()
            stop = min(start + args.batch_size, args.num_samples)
            chunks.append(draw(pipe, start, stop, args.seed, **options))
            seconds += time.perf_counter() - began
        labels = labels_in_turn(every_label(pipe), 0, args.num_samples)
        report, _ = judge(Pictures(torch.cat(chunks), labels, list(pipe.id2label.values())), of=name)
        scores, distance = report["labels"], report["distances"]["frechet_distance"]
        results.append({"guidance": name, "images_per_second": args.num_samples / seconds, "report": report})
        low, high = scores["accuracy_95"]
        lines.append(
            f"| {name} | {scores['accuracy']:.3f} ({low:.3f}–{high:.3f}) | {scores['worst_class']:.2f} "
            f"| {distance:.2f} | {args.num_samples / seconds:.3g} |"
        )
        print(lines[-1], flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
