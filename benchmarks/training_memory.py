#!/usr/bin/env python
"""How much memory does a training step of a preset need, for both stages of a latent diffusion?

    python benchmarks/training_memory.py afhq-ldm afhq-ldm-256 afhq-ldm-512 --output training-memory

Without a GPU it is counted, not measured: two steps of each stage are run on tensors without content, in bfloat16, and
what is alive at the worst moment is added up: parameters, gradients, moments, averages, activations, temporaries.
What a GPU needs besides (its context, the workspaces of its kernels, the gaps of the allocator) is not in it. With a
GPU, six steps of the training scripts are run on random pictures, and what they allocated at most is read from their
log. The table is `OUTPUT.md`, the figures `OUTPUT.json`.
"""

import argparse
import copy
import json
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hwdiffusion import adversarial
from hwdiffusion.config import parse
from hwdiffusion.data import image_channels, image_size
from hwdiffusion.figures import read_metrics
from hwdiffusion.models import build_unet, build_vqvae, latent_shape
from hwdiffusion.perceptual import laplacian_pyramid_loss
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.train_scripts import train_ldm, train_vqgan


CLASSES = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("training-memory"))
    args = parser.parse_args()
    how = measured if torch.cuda.is_available() else counted
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "counted, bfloat16"
    results = []
    lines = [
        f"| preset ({device}) | pictures | autoencoder | batch | memory | UNet | batch | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset in args.presets:
        config = parse("train_ldm", ["--preset", preset, "--train_data_dir", "PICTURES"])
        stages = how(preset, config)
        results.append({"preset": preset, "device": device, **stages})
        cells = [
            f"{stage['parameters'] / 1e6:.1f} M | {stage['batch']} | {stage['bytes'] / 2**30:.1f} GiB"
            for stage in (stages["vqvae"], stages["unet"])
        ]
        height, width = image_size(config.args)
        lines.append(f"| `{preset}` | {height}×{width} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def described(model, args, peak: int) -> dict:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "batch": args.train_batch_size, "bytes": peak}


def counted(preset: str, config) -> dict:
    first = config.first_stage(Path("first-stage")).args
    channels, size = image_channels(config.args), image_size(config.args)
    vqvae = build_vqvae(config.sections["vqvae"], channels, size)
    unet = build_unet(config.sections["unet"], latent_shape(vqvae, size), CLASSES)
    latents = (config.args.train_batch_size, *latent_shape(vqvae, size))

    def make_vqvae():
        model = type(vqvae)(**of_its_class(vqvae))
        discriminator = adversarial.PatchDiscriminator(
            channels, first.discriminator_channels, first.discriminator_layers
        )

        def step():
            images = torch.randn(first.train_batch_size, channels, *size)
            with torch.autocast("cpu", torch.bfloat16):
                reconstruction, codebook_loss = model(images, return_dict=False)
                reconstruction_loss = (reconstruction.float() - images).abs().mean()
                reconstruction_loss = reconstruction_loss + laplacian_pyramid_loss(reconstruction.float(), images)
                discriminator.requires_grad_(False)
                generator_loss = adversarial.generator_loss(discriminator(reconstruction))
                weight = adversarial.adaptive_weight(
                    reconstruction_loss, generator_loss, model.decoder.conv_out.weight
                )
                (reconstruction_loss + codebook_loss + weight * generator_loss).backward()
                discriminator.requires_grad_(True)
                logits = discriminator(torch.cat([images, reconstruction.detach().float()]))
                adversarial.discriminator_loss(*logits.chunk(2)).backward()

        return step, [model, discriminator], [model]

    def make_unet():
        model = type(unet)(**of_its_class(unet))
        if config.args.gradient_checkpointing:
            model.enable_gradient_checkpointing()

        def step():
            sample, labels = torch.randn(latents), torch.zeros(latents[0], CLASSES)
            with torch.autocast("cpu", torch.bfloat16):
                prediction = model(sample, torch.zeros(latents[0]), None, class_labels=labels, return_dict=False)[0]
                (prediction.float() - sample).square().mean().backward()

        return step, [model], [model]

    stages = {}
    for name, make, args in (("vqvae", make_vqvae, first), ("unet", make_unet, config.args)):
        with FakeTensorMode():
            models, peak = peak_of(make)
            stages[name] = described(models[0], args, peak)
    return stages


def of_its_class(model) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


class LiveBytes(TorchDispatchMode):
    """Within it, `now` is how many bytes of the tensors made in it are alive, and `peak` the most that were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, made)
        return made

    def _see(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _free(self, size: int):
        self.now -= size


def peak_of(make) -> tuple[list, int]:
    """The models that `make` gives, with the step and those of them that are averaged, and the most bytes alive in two
    steps of training them by AdamW."""
    with LiveBytes() as live:
        step, models, averaged = make()
        optimizers = [torch.optim.AdamW(model.parameters(), foreach=True) for model in models]
        averages = [copy.deepcopy(list(model.parameters())) for model in averaged]
        for _ in range(2):
            step()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        del averages
        return models, live.peak


def measured(preset: str, config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        height, width = image_size(config.args)
        generator = np.random.default_rng(0)
        for index in range(64):
            path = Path(folder, "pictures", str(index % CLASSES), f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        argv = ["--preset", preset, "--train_data_dir", str(Path(folder, "pictures")), "--max_train_steps", "6"]
        argv += ["--mixed_precision", "bf16", "--output_dir"]
        first = parse("train_vqgan", [*argv, str(Path(folder, "vqvae")), "--discriminator_start", "0"])
        second = parse("train_ldm", [*argv, str(Path(folder, "unet")), "--vqvae", str(Path(folder, "vqvae"))])
        peaks = {}
        for stage, train, own in (("vqvae", train_vqgan.train, first), ("unet", train_ldm.train, second)):
            torch.cuda.reset_peak_memory_stats()
            train(own)
            peaks[stage] = int(read_metrics(Path(folder, stage, "metrics.jsonl"))[-1]["peak_memory_gb"] * 2**30)
        pipe = ClassConditionalPipeline.from_pretrained(Path(folder, "unet"))
        return {
            "vqvae": described(pipe.vqvae, first.args, peaks["vqvae"]),
            "unet": described(pipe.unet, second.args, peaks["unet"]),
        }


if __name__ == "__main__":
    main()
