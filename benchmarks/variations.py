#!/usr/bin/env python
"""What do more noise and more steps do to a picture that is noised and denoised, and how well is one inverted?

    python benchmarks/variations.py runs/mnist-ldm --classifier runs/mnist-classifier --train_data_dir MNIST \\
        --output variations

Held-out pictures are noised to each strength and denoised by their own label, without guidance. The first table has
the root of the mean squared error of what comes back (of values in [0, 1]), and the share of it in which the
classifier still sees that label; strength 0 is the autoencoder alone. The second has the peak signal-to-noise ratio of
pictures that are inverted and drawn again.
"""

import argparse
import json
from pathlib import Path

import torch

from hwdiffusion.data import load_data
from hwdiffusion.extractors import load_extractor
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.reference import data_arguments
from hwdiffusion.samples import image_mode_of


def psnr(ours: torch.Tensor, real: torch.Tensor) -> float:
    """Mean over pictures `(B, C, H, W)` in [0, 1], in decibels."""
    return (-10 * (ours - real).square().flatten(1).mean(dim=1).log10()).mean().item()


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--strength", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--num_refinements", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("variations"))
    args = parser.parse_args()

    pipe = ClassConditionalPipeline.from_pretrained(args.run).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_extractor("classifier", args.classifier, args.device)
    data = load_data(data_arguments(args.train_data_dir, list(pipe.image_size), image_mode_of(pipe)))
    places = torch.linspace(0, len(data.validation) - 1, args.num_samples).long()
    images, labels = data.validation[places]
    real, labels = images.float() / 255, labels[:, 0]
    options = {"labels": labels, "guidance_scale": 1.0, "output_type": "pt"}

    results, rows = {"variation": [], "inversion": []}, []
    for strength in args.strength:
        row = [f"{strength:g}"]
        for steps in args.num_inference_steps:
            generator = [torch.Generator().manual_seed(args.seed + index) for index in range(len(real))]
            ours = pipe(image=real, strength=strength, num_inference_steps=steps, generator=generator, **options)
            ours = ours.images.float().cpu()
            error = (ours - real).square().mean().sqrt().item()
            _, probabilities = classifier((ours * 255).round().to(torch.uint8))
            kept = (probabilities.argmax(dim=1).cpu() == labels).float().mean().item()
            results["variation"].append({"strength": strength, "steps": steps, "rmse": error, "label_kept": kept})
            row.append(f"{error:.3f} · {kept:.2f}")
        rows.append(row)
        print(row, flush=True)
    heads = ["strength", *(f"{steps} steps" for steps in args.num_inference_steps)]
    tables = [markdown(heads, rows)]

    own = pipe(image=real, strength=0.0, **options).images.float().cpu()
    latents = pipe.encode_images(pipe.preprocess_image(real).to(args.device))
    rows = [["the autoencoder alone", *[f"{psnr(own, real):.1f}"] * len(args.num_inference_steps), ""]]
    for refinements in args.num_refinements:
        row = [f"inverted, {refinements} refinements"]
        for steps in args.num_inference_steps:
            noise = pipe.invert(real, labels, num_inference_steps=steps, num_refinements=refinements)
            found = pipe(latents=noise, num_inference_steps=steps, **{**options, "output_type": "latent"}).images
            ours = pipe(latents=noise, num_inference_steps=steps, **options).images.float().cpu()
            error = ((found - latents).square().mean() / latents.square().mean()).sqrt().item()
            results["inversion"].append(
                {"refinements": refinements, "steps": steps, "psnr": psnr(ours, real), "latent_error": error}
            )
            row.append(f"{psnr(ours, real):.1f}")
        rows.append([*row, f"{error:.4f}"])
        print(rows[-1], flush=True)
    heads = ["PSNR in dB", *(f"{steps} steps" for steps in args.num_inference_steps), "relative error of latents"]
    tables.append(markdown(heads, rows))
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
