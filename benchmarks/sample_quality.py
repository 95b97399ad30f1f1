#!/usr/bin/env python
"""Does a trained pipeline obey its labels, does it cover the data, does it copy?

    python benchmarks/sample_quality.py runs/digits
    python benchmarks/sample_quality.py runs/mnist-ldm --train_data_dir MNIST

An outside judge, trained on the run's real training pictures only, names the samples; it shares nothing with the
pipeline. For the embedded digits it is a support-vector machine on 8×8 pictures, else a small convolutional network.
Coverage and the nearest-neighbour ratio are taken on the judge's features (pixels for the first, the last hidden
layer for the second), beside the same figures of real held-out pictures.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from hwdiffusion.data import load_data, to_model_range
from hwdiffusion.metrics import manifold_scores, memorisation, wilson_interval
from hwdiffusion.pipelines import ClassConditionalPipeline


SCHEDULERS = {"ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler}


class SVMJudge:
    """RBF support-vector machine on 8×8 pictures, the size of scikit-learn's digits."""

    def __init__(self, images, labels):
        from sklearn.svm import SVC

        self.svm = SVC(gamma="scale", C=10.0).fit(self.features(images).numpy(), labels.numpy())

    def features(self, images):  # (B, C, H, W) in [-1, 1]
        return F.adaptive_avg_pool2d(images, 8).flatten(1)

    def predict(self, images):
        return torch.from_numpy(self.svm.predict(self.features(images).numpy()))


class ConvJudge:
    """A small convolutional network; its features are the 64 units before the last layer."""

    def __init__(self, images, labels, epochs=2, batch_size=128):
        torch.manual_seed(0)
        channels, classes = images.shape[1], int(labels.max()) + 1
        widths = [channels, 32, 32, 64, 64]
        layers = []
        for index, (width, out) in enumerate(zip(widths, widths[1:])):
            stride = 1 + index % 2
            layers += [nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(64), nn.ReLU())
        self.head = nn.Linear(64, classes)
        self.body(images[:2])
        parameters = [*self.body.parameters(), *self.head.parameters()]
        steps = epochs * len(images) // batch_size
        optimizer = torch.optim.AdamW(parameters, 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)
        for _ in range(steps):
            chosen = torch.randint(0, len(images), (batch_size,))
            loss = F.cross_entropy(self.head(self.body(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.body.eval()

    @torch.no_grad()
    def features(self, images):
        return torch.cat([self.body(batch) for batch in images.split(500)])

    @torch.no_grad()
    def predict(self, images):
        return self.head(self.features(images)).argmax(dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train_data_dir", help="where the run's pictures are now, if not where they were")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[None])
    parser.add_argument("--num_inference_steps", type=int, default=None)
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), default="ddim")
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    settings = yaml.safe_load((args.run / "config.yaml").read_text())
    settings = settings[settings["script"]]
    if args.train_data_dir:
        settings.update(train_data_dir=args.train_data_dir, dataset_name=None)
    data = load_data(SimpleNamespace(**settings))
    images, labels = to_model_range(data.train.images), data.train.labels[:, 0]
    held_out, held_out_labels = to_model_range(data.validation.images), data.validation.labels[:, 0]
    judge = (SVMJudge if settings["dataset_name"] == "digits" else ConvJudge)(images, labels)
    judged = (judge.predict(held_out) == held_out_labels).float().mean().item()
    print(f"{type(judge).__name__} on {len(held_out)} held-out real pictures: {judged:.4f}")

    pipe = ClassConditionalPipeline.from_pretrained(args.run).to(args.device)
    pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    wanted = torch.arange(args.num_samples) % pipe.num_classes
    results = []
    for guidance_scale in args.guidance_scale:
        samples, start = [], time.perf_counter()
        for first in range(0, args.num_samples, args.batch_size):
            seeds = range(first, min(first + args.batch_size, args.num_samples))
            batch = pipe(
                labels=wanted[seeds.start : seeds.stop],
                guidance_scale=guidance_scale,
                num_inference_steps=args.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
            samples.append(batch.cpu() * 2 - 1)
        seconds = time.perf_counter() - start
        samples = torch.cat(samples)
        right = judge.predict(samples) == wanted
        low, high = wilson_interval(int(right.sum()), len(right))
        features, training = judge.features(samples), judge.features(images)
        shuffled = torch.Generator().manual_seed(0)  # folders come sorted by class
        real = judge.features(held_out)[torch.randperm(len(held_out), generator=shuffled)]
        other = training[torch.randperm(len(training), generator=shuffled)]
        n = min(len(real), len(features))
        results.append(
            {
                "run": args.run.name,
                "n": args.num_samples,
                "scheduler": args.scheduler,
                "steps": pipe.num_timesteps,
                "guidance_scale": pipe.guidance_scale,
                "label_accuracy": right.float().mean().item(),
                "label_accuracy_95": [low, high],
                "worst_class": min(right[wanted == k].float().mean().item() for k in range(pipe.num_classes)),
                "coverage": manifold_scores(real[:n], features[:n])["coverage"],
                "coverage_of_real": manifold_scores(real[:n], other[:n])["coverage"],
                "nearest_neighbour_ratio": memorisation(features, real, training)["ratio"],
                "images_per_second": args.num_samples / seconds,
            }
        )
        print(json.dumps(results[-1]))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
