#!/usr/bin/env python
"""How healthy is the codebook of a `VQModel` with diffusers' defaults, and of the same one trained by train_vqgan.py?

    python benchmarks/codebook_health.py --train_data_dir AFHQ --preset afhq-ldm-cpu --max_train_steps 400
    python benchmarks/codebook_health.py --train_data_dir MNIST --preset mnist-ldm --max_train_steps 400

Every row has the same architecture with `--codes` codes, the same first weights of all else, pictures, order, batches,
losses, optimizer, schedule, averaging of weights and number of steps, in float32 on the CPU. The first row is a plain
loop over a stock `VQModel`, with diffusers' first codes and its weight of the commitment (4 where the paper has 1/4);
the others are runs of train_vqgan.py, and differ in what is written in their first column. Everything is measured on
all validation pictures, with averaged weights, after the training: `possible` is how many codes they would choose if
all were chosen alike. Runs that are there already, in the folder OUTPUT, are continued or taken as they are. The table
is `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers import VQModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from hwdiffusion.config import parse
from hwdiffusion.data import flip, image_channels, image_size, load_data, to_model_range
from hwdiffusion.labels import balanced_order
from hwdiffusion.models import build_vqvae
from hwdiffusion.perceptual import build_perceptual_loss
from hwdiffusion.randomness import BatchOrder, Draws, epoch_order
from hwdiffusion.reconstruction import ReconstructionJudge
from hwdiffusion.train_scripts import train_vqgan


STOCK = "stock VQModel, plain loop"
OURS = {
    "ours": [],
    "ours, no restarts": ["--codebook_restart_steps", "0"],
    "ours, k-means start": ["--codebook_init", "kmeans"],
    "ours, moving averages": ["--codebook_update", "ema"],
    "ours, moving averages, rotation trick": ["--codebook_update", "ema", "--rotation_trick", "true"],
    "ours, entropy 0.1": ["--entropy_weight", "0.1"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--codebook_restart_steps", type=int, default=50)
    parser.add_argument("--rows", nargs="*", choices=[STOCK, *OURS], default=[STOCK, *OURS])
    parser.add_argument("--output", type=Path, default=Path("codebook-health"))
    args = parser.parse_args()

    results = []
    for name in args.rows:
        folder = args.output / name.replace(",", "").replace(" ", "-")
        argv = ["--preset", args.preset, "--train_data_dir", args.train_data_dir, "--output_dir", str(folder)]
        argv += ["--vqvae.num_vq_embeddings", str(args.codes), "--max_train_steps", str(args.max_train_steps)]
        argv += ["--codebook_restart_steps", str(args.codebook_restart_steps), "--discriminator_weight", "0"]
        config = parse("train_vqgan", [*argv, *OURS.get(name, [])])
        data = load_data(config.args)
        if name == STOCK:
            vqvae = plain_loop(config, data)
        else:
            train_vqgan.train(config, data)
            vqvae = VQModel.from_pretrained(folder)
        measured = ReconstructionJudge(data.validation)(vqvae.eval())
        results.append({"row": name, "n": len(data.validation), "steps": args.max_train_steps, **measured})
        print(line(results[-1]), flush=True)
    lines = ["| | codes used | of possible | perplexity | PSNR | SSIM |", "|---|---|---|---|---|---|"]
    lines += [line(result) for result in results]
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def line(measured: dict) -> str:
    used, possible = measured["eval_codebook_used"], measured["eval_codebook_possible"]
    return (
        f"| {measured['row']} | {used} | {used / possible:.1%} | {measured['eval_codebook_perplexity']:.0f} "
        f"| {measured['eval_psnr']:.2f} dB | {measured['eval_ssim']:.3f} |"
    )


def plain_loop(config, data) -> VQModel:
    """A stock `VQModel` trained without any care for its codebook: start, losses and update as diffusers has them."""
    PartialState()
    args = config.args
    set_seed(args.seed)
    vqvae = build_vqvae(config.sections["vqvae"], image_channels(args), image_size(args)).train()
    perceptual = build_perceptual_loss(args.perceptual_model, (image_channels(args), *image_size(args)))
    average = EMAModel(vqvae.parameters(), args.ema_max_decay, use_ema_warmup=True, power=args.ema_power)
    optimizer = torch.optim.AdamW(
        vqvae.parameters(), args.learning_rate, (args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay
    )
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=min(args.lr_warmup_steps, args.max_train_steps // 2),
        num_training_steps=args.max_train_steps,
    )
    in_epoch = balanced_order(data.train.labels, args.class_balance) if args.class_balance > 0 else epoch_order
    order = iter(BatchOrder(args.seed, len(data.train), 0, args.train_batch_size, order=in_epoch))
    for step in tqdm(range(args.max_train_steps), desc=STOCK):
        images = to_model_range(data.train[next(order)][0])
        if args.random_flip:
            images = flip(images, Draws(args.seed, step, torch.arange(len(images))).uniform("flip") < 0.5)
        reconstruction, codebook_loss = vqvae(images, return_dict=False)
        loss = args.mse_weight * F.mse_loss(reconstruction, images) + args.l1_weight * F.l1_loss(
            reconstruction, images
        )
        loss = (
            loss + args.perceptual_weight * perceptual(reconstruction, images) + args.codebook_weight * codebook_loss
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        average.step(vqvae.parameters())
    average.copy_to(vqvae.parameters())
    return vqvae


if __name__ == "__main__":
    main()
