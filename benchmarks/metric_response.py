#!/usr/bin/env python
"""Does every metric move for what it measures, and only for that?

    python benchmarks/metric_response.py --train_data_dir MNIST --classifier runs/mnist-classifier

One half of the held-out pictures plays the generator, the other half is what it is held against. Then the first half
is spoiled in one way at a time: shifted, blurred, one class dropped, replaced by training pictures, labels shuffled.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hwdiffusion.comparison import Pictures
from hwdiffusion.data import load_data
from hwdiffusion.extractors import load_extractor
from hwdiffusion.judge import Judge
from hwdiffusion.reference import RealSide, data_arguments


def spoiled(images, labels, training) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The pictures `(N, C, H, W)` and their labels `(N,)`, as they are and spoiled."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.nonzero(labels != labels.max())[:, 0]
    blurred = F.avg_pool2d(images.float(), 3, stride=1, padding=1).round().to(torch.uint8)
    copies = torch.randperm(len(training), generator=generator)[: len(images)]
    copied, copied_labels = training[copies.tolist()]
    return {
        "real": (images, labels),
        "shifted by 2 pixels": (images.roll(2, dims=-1), labels),
        "blurred 3×3": (blurred, labels),
        "a class dropped": (images[kept], labels[kept]),
        "copied from training": (copied, copied_labels[:, 0]),
        "labels shuffled": (images, labels[torch.randperm(len(labels), generator=generator)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--resolution", type=int, nargs="+", default=[28])
    parser.add_argument("--image_mode", choices=["L", "RGB"], default="L")
    parser.add_argument("--output", type=Path, help="write the reports as JSON")
    args = parser.parse_args()

    data = load_data(data_arguments(args.train_data_dir, args.resolution, args.image_mode))
    order = np.random.default_rng(0).permutation(len(data.validation))
    generator, held_out = (data.validation.subset(half) for half in np.array_split(order, 2))
    images, labels = generator[range(len(generator))]
    judge = Judge(
        RealSide(held_out, data.train, Path(args.train_data_dir).name, "half of the held-out", trained_on=True),
        load_extractor("classifier", args.classifier, "cuda" if torch.cuda.is_available() else "cpu"),
        {"labels", "distances", "manifold", "memorisation"},
        seed=0,
    )
    reports = {}
    header = ["", "accuracy", "Fréchet", "precision", "recall", "density", "coverage", "nearest ratio", "copies"]
    print(f"{len(generator)} pictures against {len(held_out)}, features of a classifier", end="")
    print(f" with test accuracy {judge.extractor.describe()['test_accuracy']:.4f}\n")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, (pictures, ids) in spoiled(images, labels[:, 0], data.train).items():
        report, _ = judge(Pictures(pictures, ids[:, None], data.train.class_names), of=name)
        reports[name] = report
        manifold, copies = report["manifold"], report["memorisation"]["pixels"]
        row = [report["labels"]["accuracy"], report["distances"]["frechet_distance"]]
        row += [manifold[key] for key in ("precision", "recall", "density", "coverage")]
        row += [copies["ratio"], copies["share_of_copies"]]
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in row)} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
