#!/usr/bin/env python
"""Sets of labels: does one vector a set do, or must every object have a token of its own?

    python benchmarks/label_binding.py --classifier runs/shapes-classifier --label_sets test.json \\
        --output label-binding

Trains the same autoencoder's UNets for the same steps, batches, noise and pictures: `pooled`, with a set as one
vector, the sum of its labels' embeddings (`class_embed_type: simple_projection`); `tokens`, with cross-attention to
one token a label, where a set has fewer than the others a null token that is learned; and `masked`, tokens, where
attention leaves those out (`encoder_attention_mask`). Then each draws the sets of labels of a file, by `--num_seeds`
seeds a set, at each guidance scale, and a classifier of train_classifier.py tells how many labels are seen: mean over
the seeds and its 95 % interval, and by the number of labels. Runs that are there already, in the folder OUTPUT, are
continued or taken as they are. Other flags are those of train_ldm.py, for all rows. The table is `OUTPUT.md`, the
figures `OUTPUT.json`.
"""

import argparse
import contextlib
import json
from pathlib import Path
from unittest import mock

from diffusers import UNet2DConditionModel

from hwdiffusion import pipelines
from hwdiffusion.arguments import EvaluationArguments
from hwdiffusion.config import parse
from hwdiffusion.evaluation import evaluate
from hwdiffusion.extractors import load_extractor
from hwdiffusion.label_sets import read_listed_sets
from hwdiffusion.train_scripts import train_classifier, train_ldm, train_vqgan


ROWS = {"pooled": "shapes-ldm-pooled", "tokens": "shapes-ldm", "masked": "shapes-ldm"}


UNMASKED = pipelines.unet_conditioning


def masked_conditioning(unet_config, tokens):
    """`unet_conditioning`, with the null tokens left out of attention; a set of nothing else sees them all alike."""
    conditioning = UNMASKED(unet_config, tokens)
    return {**conditioning, "encoder_attention_mask": (tokens != 0).any(dim=-1)}


@contextlib.contextmanager
def masking():
    with (
        mock.patch.object(pipelines, "unet_conditioning", masked_conditioning),
        mock.patch.object(pipelines.class_conditional, "unet_conditioning", masked_conditioning),
    ):
        yield


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--label_sets", required=True)
    parser.add_argument("--vqvae", type=Path, help="of shapes-ldm; by default it is trained in OUTPUT/vqvae")
    parser.add_argument("--max_train_steps", type=int, help="by default those of the preset")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--num_seeds", type=int, default=10)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path, default=Path("label-binding"))
    args, flags = parser.parse_known_args()

    load_extractor("classifier", args.classifier)  # what is wrong is said before anything is trained
    read_listed_sets(args.label_sets)
    args.output.mkdir(parents=True, exist_ok=True)
    vqvae = args.vqvae
    if vqvae is None:
        vqvae = args.output / "vqvae"
        train_vqgan.train(parse("train_vqgan", ["--preset", "shapes-ldm", "--output_dir", str(vqvae)]))
    results, lines = [], []
    for name in args.rows:
        run = args.output / name
        argv = ["--preset", ROWS[name], "--vqvae", str(vqvae), "--output_dir", str(run), *flags]
        if args.max_train_steps is not None:
            argv += ["--max_train_steps", str(args.max_train_steps)]
        with masking() if name == "masked" else contextlib.nullcontext():
            train_ldm.train(parse("train_ldm", argv))
            unet = UNet2DConditionModel.from_pretrained(run, subfolder="unet")
            parameters = sum(parameter.numel() for parameter in unet.parameters())
            for scale in args.guidance_scale:
                report = evaluate(
                    EvaluationArguments(
                        run=str(run),
                        label_sets=args.label_sets,
                        num_seeds=args.num_seeds,
                        guidance_scale=scale,
                        classifier=args.classifier,
                        output_dir=str(run / f"evaluation-{scale:g}"),
                    ),
                    train_classifier.train,
                )
                results.append({"labels_as": name, "parameters": parameters, "report": report})
                cells = {"labels as": name, "parameters": f"{parameters / 1e6:.2f} M", "guidance": f"{scale:g}"}
                cells |= columns(report["labels"])
                if not lines:
                    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
                    print("\n".join(lines))
                lines.append(f"| {' | '.join(cells.values())} |")
                print(lines[-1], flush=True)
                args.output.with_suffix(".json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
                args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def columns(labels: dict) -> dict[str, str]:
    """The cells of a row that tell of labels, by their names."""
    over = labels["over_seeds"]
    cells = {
        f"labels seen, mean of {over['n']} (95 %)": "{:.3f} ({:.3f}–{:.3f})".format(over["mean"], *over["mean_95"])
    }
    cells |= {f"in sets of {size}": f"{of['mean']:.3f}" for size, of in sorted(over["by_size"].items())}
    return cells | {", ".join(of["values"][:3]): f"{of['accuracy']:.3f}" for of in labels.get("attributes", [])}


if __name__ == "__main__":
    main()
