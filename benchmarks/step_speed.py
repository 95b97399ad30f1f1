#!/usr/bin/env python
"""How much of a training step is the UNet, and how much is what surrounds it?

    python benchmarks/step_speed.py mnist-ddpm --train_data_dir MNIST --output step-speed

Two loops train the same UNet on the same pictures in batches of the same size: ours, with the preset's loss, which
`--stable_targets 0` makes the other's, and the loop of diffusers' examples (a DataLoader that decodes every picture
again, for latents an encoder in the loop, default AdamW, `EMAModel` and the loss's value at every step). Each has a
process, since ours also sets up its process (`host.py`); they take turns of `--steps` steps, `--rounds` times, and the
ratio of their speeds is taken of each pair of turns. With `--mixed_precision bf16` both have it.

Besides: the share of the device's measured matrix rate that the UNet's multiplications reach, and where the time of
our step goes, by torch's profiler. The tables are `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from hwdiffusion.config import parse
from hwdiffusion.data import image_channels, image_size, load_data, pixels_to_sample, to_model_range, views_of
from hwdiffusion.failures import exit_code
from hwdiffusion.host import choose_attention
from hwdiffusion.latents import cached_latents, latents_to_sample, what_is_noised
from hwdiffusion.models import build_noise_scheduler, build_unet, build_vqvae, latent_shape
from hwdiffusion.objectives import is_flow
from hwdiffusion.pipelines import label_tokens, num_label_classes, unet_conditioning
from hwdiffusion.run_folder import current_processes
from hwdiffusion.train_scripts.train_ddpm import denoising_loss, with_stable_targets
from hwdiffusion.trainer import Trainer


class Encoded(Dataset):
    """Pictures as files, decoded whenever they are asked for, as an image folder is."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.files, self.labels = [], labels
        for image in images:
            buffer = io.BytesIO()
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        import numpy as np

        array = np.atleast_3d(np.asarray(Image.open(io.BytesIO(self.files[index])), dtype=np.float32))
        return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1, self.labels[index]


def ours(config, data, vqvae, folder: Path):
    """Our loop; a step is done whenever it yields."""
    args = config.args
    trainer = Trainer(config, len(data.train))
    noise_scheduler, unet = models(config, data, vqvae)
    dataset, to_sample = data.train, pixels_to_sample(args.random_flip)
    if vqvae is not None:
        dataset = cached_latents(vqvae, data.train, args.random_flip, folder / "latents.safetensors")
        to_sample = latents_to_sample(vqvae.config, args.random_flip)
    make_loss = denoising_loss
    if args.stable_targets:
        stored, labels = dataset[range(len(dataset))]
        of_pixels = vqvae is None
        views = (
            views_of(to_model_range(stored), args.random_flip) if of_pixels else what_is_noised(vqvae.config, stored)
        )
        make_loss = with_stable_targets(views, labels, unet.config, trainer)
    loss_of = make_loss(noise_scheduler, unet.config, args, trainer.step_size)
    choose_attention(unet, args.mixed_precision, trainer.device)
    unet = trainer.add_model("unet", unet, args.learning_rate, torch_compile=args.torch_compile)
    for batch in trainer.batches(dataset, lambda folder: None):
        stored, labels = batch.data
        loss = loss_of(unet, to_sample(stored, batch.draws), labels, batch.draws)
        trainer.update("unet", loss)
        trainer.log(loss=loss)
        yield


def plain(config, data, vqvae, device: torch.device):
    """The loop of diffusers' examples."""
    args = config.args
    noise_scheduler, unet = models(config, data, vqvae)
    unet.to(device)
    if vqvae is not None:
        vqvae.to(device)
    num_classes = num_label_classes(unet.config)
    count = min(len(data.train), 20_000)
    loader = DataLoader(Encoded(*data.train[range(count)]), batch_size=args.train_batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=50, num_training_steps=10_000)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with precision:
                if vqvae is not None:
                    with torch.no_grad():
                        images = vqvae.encode(images).latents * vqvae.config.scaling_factor
                noise = torch.randn_like(images)
                timesteps = torch.randint(0, 1000, (len(images),), device=device)
                noisy = noise_scheduler.add_noise(images, noise, timesteps)
                conditioning = unet_conditioning(unet.config, label_tokens(labels, num_classes))
                output = unet(noisy, timesteps, **conditioning, return_dict=False)[0]
            loss = F.mse_loss(output.float(), noise_scheduler.get_velocity(images, noise, timesteps).float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.item()
            yield


def models(config, data, vqvae):
    args = config.args
    shape = (image_channels(args), *image_size(args)) if vqvae is None else latent_shape(vqvae, image_size(args))
    noise_scheduler = build_noise_scheduler(config.sections["noise_scheduler"], latent=vqvae is not None)
    torch.manual_seed(0)
    return noise_scheduler, build_unet(config.sections["unet"], shape, len(data.id2label))


def turn(loop, steps: int) -> float:
    """The seconds of a step."""
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    synchronize()
    return (time.perf_counter() - began) / steps


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions a second of a large matrix product or convolution, which may be of different
    libraries: the best of some of both. On a GPU convolutions of float32 may be in TF32, as they are in training."""
    size = 1024 if device.type == "cpu" else 8192
    channels, pictures = (256, 8) if device.type == "cpu" else (512, 64)
    given = {
        "a": torch.randn(size, size, dtype=dtype, device=device),
        "b": torch.randn(size, size, dtype=dtype, device=device),
        "kernel": torch.randn(channels, channels, 3, 3, dtype=dtype, device=device),
        "pictures": torch.randn(pictures, channels, 32, 32, dtype=dtype, device=device),
        "conv2d": F.conv2d,
    }
    rates = []
    for of, flops in (
        ("a @ b", 2 * size**3),
        ("conv2d(pictures, kernel, padding=1)", 2 * 9 * channels**2 * 32 * 32 * pictures),
    ):
        timer = Timer(of, globals=given, num_threads=torch.get_num_threads())
        rates.append(flops / min(timer.blocked_autorange(min_run_time=2).times))
    return max(rates)


def flops_of_a_step(config, data, vqvae) -> int:
    """Of forward and backward of the UNet."""
    unet = models(config, data, vqvae)[1]
    unet.set_attn_processor(AttnProcessor())  # by matrix products, which the counter knows
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.randn(config.args.train_batch_size, unet.config.in_channels, height, width)
    labels = torch.zeros(len(sample), data.max_labels).long()
    conditioning = unet_conditioning(unet.config, label_tokens(labels, num_label_classes(unet.config)))
    with FlopCounterMode(display=False) as counter:
        output = unet(sample, torch.zeros(len(sample)).long(), **conditioning, return_dict=False)[0]
        output.square().mean().backward()
    return counter.get_total_flops()


def work(which: str, argv: list[str], folder: str, pipe):
    """A process with one of the loops: it is sent numbers of steps, and answers with the seconds of a step; sent
    `None`, with a profile of some steps, and ends."""
    config, data, vqvae = prepare(argv)
    if which == "ours":
        loop = ours(config, data, vqvae, Path(folder))
    else:
        loop = plain(config, data, vqvae, current_processes().device)
    turn(loop, 3)  # warm-up
    pipe.send("ready")
    while (steps := pipe.recv()) is not None:
        pipe.send(turn(loop, steps))
    with profile() as profiler:  # of the CPU, and of a GPU that is there
        turn(loop, 3)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    pipe.send(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=48))
    loop.close()


def prepare(argv: list[str]):
    """The configuration of a script, its data, and for latents an autoencoder."""
    config = parse(argv[0], argv[1:])
    data, vqvae = load_data(config.args), None
    if config.script == "train_ldm":  # its speed doesn't depend on what it has learned
        vqvae = build_vqvae(config.sections["vqvae"], image_channels(config.args), image_size(config.args)).eval()
        vqvae.requires_grad_(False)
    return config, data, vqvae


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--script", default="train_ddpm", choices=["train_ddpm", "train_ldm"])
    parser.add_argument("--train_data_dir")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--torch_compile", default="no", choices=["no", "regional", "full"], help="of ours")
    parser.add_argument(
        "--stable_targets", type=int, help="of ours, the preset's by default; 0: the plain loop's loss"
    )
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("step-speed"))
    args = parser.parse_args()

    argv = [args.script, "--preset", args.preset, "--train_batch_size", str(args.train_batch_size)]
    argv += ["--mixed_precision", args.mixed_precision, "--torch_compile", args.torch_compile]
    argv += ["--max_train_steps", "1000000"]
    argv += ["--checkpointing_steps", "1000000"]
    for flag in ("train_data_dir", "stable_targets"):
        argv += [] if getattr(args, flag) is None else [f"--{flag}", str(getattr(args, flag))]
    context, pipes, seconds = multiprocessing.get_context("spawn"), {}, {"ours": [], "plain": []}
    processes = {}
    with tempfile.TemporaryDirectory() as folder:
        argv += ["--output_dir", folder]
        config, data, vqvae = prepare(argv)
        if is_flow(build_noise_scheduler(config.sections["noise_scheduler"], latent=vqvae is not None)):
            parser.error(f"{args.preset} is a flow, and the plain loop adds noise and asks for v; give another preset")
        device = current_processes().device  # alone on it, before the loops begin
        rate = matrix_rate(torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32, device)
        for which in seconds:
            pipes[which], theirs = context.Pipe()
            processes[which] = context.Process(target=work, args=(which, argv, folder, theirs), daemon=True)
            processes[which].start()
            theirs.close()  # so that a process that fails ends the wait for it
            pipes[which].recv()
        for _ in range(args.rounds):
            for which, pipe in pipes.items():
                pipe.send(args.steps)
                seconds[which].append(pipe.recv())
        pipes["ours"].send(None)
        profiled = pipes["ours"].recv()
        processes["plain"].terminate()  # which still waits for more
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["ours"])]
    done = flops_of_a_step(config, data, vqvae) / statistics.median(seconds["ours"])
    figures = {
        "preset": args.preset,
        "mixed_precision": args.mixed_precision,
        "torch_compile": args.torch_compile,
        "stable_targets": config.args.stable_targets,
        "train_batch_size": args.train_batch_size,
        "images_per_second": {name: args.train_batch_size / statistics.median(of) for name, of in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "device": str(device),
        "matrix_rate_gflops": rate / 1e9,
        "share_of_matrix_rate": done / rate,
        "seconds": seconds,
    }
    ours_ips, plain_ips = figures["images_per_second"]["ours"], figures["images_per_second"]["plain"]
    loss = "of stable targets" if config.args.stable_targets else "the same"
    lines = [
        "| preset | loss | batch | precision | ours, img/s | plain, img/s | ratio (least–most) | of the matrix rate |",
        "|---|---|---|---|---|---|---|---|",
        f"| {args.preset} | {loss} | {args.train_batch_size} | {args.mixed_precision} | {ours_ips:.0f} | "
        f"{plain_ips:.0f} | "
        "{median:.2f} ({least:.2f}–{most:.2f})".format(**figures["ratio"])
        + f" | {figures['share_of_matrix_rate']:.0%} of {figures['matrix_rate_gflops']:.0f} Gflop/s |",
    ]
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + f"\n\n```\n{profiled}```\n")
    print("\n".join(lines), profiled, sep="\n\n")


if __name__ == "__main__":
    sys.exit(exit_code("step_speed.py", main))
