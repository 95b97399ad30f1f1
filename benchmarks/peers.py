#!/usr/bin/env python
"""What ours is compared with: MNIST generators by diffusers alone, as its tutorials and small scripts train them.

    python benchmarks/peers.py pixel --budget 600 --train_data_dir MNIST --output pixel.npz
    python benchmarks/peers.py latent --budget 600 --train_data_dir MNIST --output latent.npz

`pixel` is the loop of diffusers' own tutorial: a `UNet2DModel` with class embeddings on 28×28 pixels, ε-prediction, a
DataLoader that decodes, default AdamW, the loss fetched at every step. `latent` is a small script of both stages, the
best that was known before: a `VQModel` (f = 4, 512 codes, restarts of dead ones) for 27 % of the budget, then a
`UNet2DConditionModel` with class embeddings on normalised 8×8×4 latents (cosine schedule, v-prediction, stratified
timesteps, fused AdamW, averaged weights). Each uses the whole budget from raw pictures to the end of training, then
draws `--num_samples` digits, with the labels of the test digits, by DPM-Solver++ in 20 steps, and keeps them as an
.npz that `hwdiffusion evaluate --images` judges. All of it is on the CPU, and nothing of hwdiffusion is used.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader


CLASSES = 10


def load_mnist(folder: str, split: str = "train"):
    files = str(Path(folder) / f"{split}-*.parquet")
    return load_dataset("parquet", data_files=files, split="train")


def decode(entry) -> torch.Tensor:
    image = entry if isinstance(entry, Image.Image) else Image.open(io.BytesIO(entry["bytes"]))
    return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None] / 127.5 - 1  # (1, 28, 28)


@torch.no_grad()
def sample(predict, shape, noise_scheduler, labels, seed=0, steps=20) -> torch.Tensor:
    """DPM-Solver++; `predict(noisy, timestep, labels)` is what the model says, guided or not."""
    scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(steps)
    noisy = torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        noisy = scheduler.step(predict(noisy, timestep, labels), timestep, noisy).prev_sample
    return noisy


def linear_decay(optimizer, highest: float, warmup: int, step: int, part: float, lowest: float = 0.02):
    """A learning rate that warms up by steps and decays over the part of the time budget that is over."""
    for group in optimizer.param_groups:
        group["lr"] = highest * min(1.0, (step + 1) / warmup) * max(lowest, 1 - part)


def precision(args):
    return torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)


# -- pixels -----------------------------------------------------------------------------------------------------------


def pixel(args):
    began = time.perf_counter()
    data = load_mnist(args.train_data_dir)
    data.set_transform(lambda batch: {"images": [decode(image) for image in batch["image"]], "labels": batch["label"]})
    loader = DataLoader(data, batch_size=args.train_batch_size, shuffle=True)
    unet = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        num_class_embeds=CLASSES,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    steps = 0
    while time.perf_counter() - began < args.budget:
        for batch in loader:
            images, labels = batch["images"], batch["labels"]
            linear_decay(optimizer, 1e-3, 50, steps, (time.perf_counter() - began) / args.budget)
            noise = torch.randn_like(images)
            timesteps = torch.randint(0, 1000, (len(images),))
            noisy = noise_scheduler.add_noise(images, noise, timesteps)
            with precision(args):
                prediction = unet(noisy, timesteps, labels).sample
            loss = F.mse_loss(prediction.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            steps += 1
            if time.perf_counter() - began > args.budget:
                break
    seconds = time.perf_counter() - began
    unet.eval()
    draw = lambda labels, seed: sample(  # noqa: E731
        lambda noisy, timestep, labels: unet(noisy, timestep, labels).sample,
        (1, 28, 28),
        noise_scheduler,
        labels,
        seed,
    )
    return draw, steps * args.train_batch_size, seconds


# -- latents ----------------------------------------------------------------------------------------------------------


def latent(args):
    began = time.perf_counter()
    data = load_mnist(args.train_data_dir)
    images = torch.stack([decode(image) for image in data["image"]])
    images, labels = F.pad(images, (2, 2, 2, 2), value=-1.0), torch.tensor(data["label"])  # (N, 1, 32, 32)
    vqvae, seen = first_stage(images, began + 0.27 * args.budget, args)
    with torch.no_grad():
        latents = torch.cat([vqvae.encode(part).latents for part in images.split(500)])
    mean, std = latents.mean(dim=(0, 2, 3), keepdim=True), latents.std(dim=(0, 2, 3), keepdim=True)
    latents = (latents - mean) / std

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        norm_num_groups=16,
        num_class_embeds=CLASSES + 1,
    )
    noise_scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, fused=True)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    size, step, start = args.train_batch_size, 0, time.perf_counter()
    while time.perf_counter() - began < args.budget:
        part = (time.perf_counter() - start) / (began + args.budget - start)
        linear_decay(optimizer, 1.5e-3, 50, step, part)
        chosen = torch.randint(len(latents), (size,))
        clean = latents[chosen]
        given = torch.where(torch.rand(size) < 0.1, CLASSES, labels[chosen])
        noise, timesteps = torch.randn_like(clean), ((torch.arange(size) + torch.rand(size)) / size * 1000).long()
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        target = noise_scheduler.get_velocity(clean, noise, timesteps)
        with precision(args):
            prediction = unet(noisy, timesteps, None, class_labels=given).sample
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        step += 1
    seconds = time.perf_counter() - began
    ema.copy_to(unet.parameters())
    unet.eval()

    def guided(noisy, timestep, labels):
        both = torch.cat([labels, torch.full_like(labels, CLASSES)])
        cond, null = unet(torch.cat([noisy] * 2), timestep, None, class_labels=both).sample.chunk(2)
        return null + args.guidance_scale * (cond - null)

    @torch.no_grad()
    def draw(labels, seed):
        drawn = sample(guided, (4, 8, 8), noise_scheduler, labels, seed)
        return vqvae.decode(drawn * std + mean).sample[:, :, 2:-2, 2:-2]

    return draw, seen + step * size, seconds


def first_stage(images, deadline: float, args):
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=512,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    vqvae.quantize.legacy = False
    codes = vqvae.quantize.embedding.weight

    @torch.no_grad()
    def outputs():
        latents = vqvae.encode(images[torch.randint(len(images), (256,))]).latents
        return latents.permute(0, 2, 3, 1).flatten(0, 2)  # (N, 4)

    with torch.no_grad():
        found = outputs()
        codes.copy_(found[torch.randperm(len(found))[: len(codes)]])
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=3e-3, betas=(0.9, 0.99), fused=True)
    start, step = time.perf_counter(), 0
    while time.perf_counter() < deadline:
        part = (time.perf_counter() - start) / (deadline - start)
        linear_decay(optimizer, 3e-3, 30, step, part, lowest=0.0)
        batch = images[torch.randint(len(images), (64,))]
        with precision(args):
            reconstruction, commitment = vqvae(batch, return_dict=False)
        reconstruction = reconstruction.float()
        loss = F.mse_loss(reconstruction, batch) + 0.2 * F.l1_loss(reconstruction, batch) + commitment
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0 and part < 0.6:
            found = outputs()
            with torch.no_grad():
                dead = torch.ones(len(codes), dtype=torch.bool)
                dead[torch.cdist(found, codes).argmin(dim=1)] = False
                codes[dead] = found[torch.randperm(len(found))[: int(dead.sum())]]
    return vqvae.eval(), step * 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["pixel", "latent"])
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    parser.add_argument("--train_data_dir", required=True, help="MNIST's parquet files")
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="of `latent`")
    parser.add_argument("--bf16", action="store_true", help="train in bf16, where a CPU multiplies in it")
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    draw, images_seen, seconds = (pixel if args.which == "pixel" else latent)(args)
    labels = torch.tensor(load_mnist(args.train_data_dir, "test")["label"])
    labels = labels[torch.arange(args.num_samples) % len(labels)]
    drawn = torch.cat([draw(part, seed) for seed, part in enumerate(labels.split(250))])
    images = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[:, 0]
    names = np.array([str(name) for name in range(CLASSES)])
    np.savez_compressed(args.output, images=images.numpy(), labels=labels.numpy(), class_names=names)
    print(json.dumps({"images_seen": images_seen, "seconds": seconds, "num_samples": args.num_samples}))


if __name__ == "__main__":
    main()
