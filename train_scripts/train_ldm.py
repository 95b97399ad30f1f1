#!/usr/bin/env python
"""Train a latent diffusion model; without an autoencoder, train that first. Without flags: the embedded digits.

accelerate launch train_scripts/train_ldm.py
accelerate launch train_scripts/train_ldm.py --preset mnist-ldm --train_data_dir PICTURES --output_dir runs/mine
"""

import sys
from collections.abc import Callable
from pathlib import Path

from hwdiffusion import InputError
from hwdiffusion.config import Config, run_script
from hwdiffusion.train_scripts import train_vqgan
from hwdiffusion.train_scripts.train_ddpm import denoising_loss, fit_unet, with_stable_targets


def train(config: Config, make_loss: Callable | None = None) -> Path:
    """Train both stages, or the second on a given autoencoder; the run folder, which is a pipeline, is returned.

    Args:
        make_loss: what makes the loss of the second, in place of `denoising_loss`; called as that is.
    """
    import torch
    from accelerate.utils import set_seed

    from hwdiffusion.data import image_channels, image_size, load_data
    from hwdiffusion.judge import training_judge
    from hwdiffusion.labels import check_dropout
    from hwdiffusion.latents import (
        LatentDataset,
        cached_latents,
        encode_batches,
        how_many_tell,
        latents_to_sample,
        standardised,
        what_is_noised,
    )
    from hwdiffusion.models import (
        build_noise_scheduler,
        build_pipeline,
        build_unet,
        build_vqvae,
        check_inference_steps,
        latent_shape,
        load_autoencoder,
    )
    from hwdiffusion.pipelines import num_label_classes
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.stable_targets import check_targets
    from hwdiffusion.trainer import Trainer

    args = config.args
    output_dir = Path(args.output_dir)
    first_stage = config.first_stage(output_dir / "first-stage") if args.vqvae is None else None

    # Everything that can be wrong is found before the first stage is trained.
    check_run(config)
    if first_stage is not None and not args.overwrite_output_dir:
        check_run(first_stage)
    noise_scheduler = build_noise_scheduler(config.sections["noise_scheduler"], latent=True)
    check_inference_steps(noise_scheduler, args.num_inference_steps)
    channels, size = image_channels(args), image_size(args)
    if first_stage is None:
        vqvae = load_autoencoder(args.vqvae, channels, size)
        if args.latent_scaling == "config" and getattr(vqvae.config, "latents_mean", None) is not None:
            raise InputError(f"{args.vqvae} scales each channel by itself; give --latent_scaling measured")
    else:
        vqvae = build_vqvae(config.sections["vqvae"], channels, size)
    data = load_data(args)
    check_dropout(args, data)
    check_targets(args, len(data.train), latent_shape(vqvae, size), make_loss)
    if first_stage is not None:
        train_vqgan.build_helpers(first_stage, data)
    unet = build_unet(config.sections["unet"], latent_shape(vqvae, size), len(data.id2label))
    judge = training_judge(args, data, labelled=num_label_classes(unet.config) > 0)
    prepare_output_dir(config)

    if first_stage is not None:
        train_vqgan.train(first_stage, data)
        if not args.dry_run:
            vqvae = load_autoencoder(first_stage.args.output_dir, channels, size)
    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    vqvae.to(trainer.device).eval().requires_grad_(False)
    if args.streaming:  # too much to be cached: encoded in passing
        dataset = data.train
        measured = encode_batches(vqvae, data.train.spread_pictures(how_many_tell(size)), args.random_flip)
    elif args.dry_run:
        measured = torch.randn(len(data.train), 1, *latent_shape(vqvae, size))
        dataset = LatentDataset(measured, data.train.labels)
    else:
        dataset = cached_latents(vqvae, data.train, args.random_flip, output_dir / "latents.safetensors")
        measured = dataset.latents
    given, moved = vqvae, torch.zeros(1)
    if args.latent_scaling == "measured":
        vqvae, moved = standardised(given, measured)
    encoder = given if args.streaming else None
    to_sample = latents_to_sample(vqvae.config, args.random_flip, moved.to(trainer.device), encoder)

    set_seed(args.seed)
    unet = build_unet(config.sections["unet"], latent_shape(vqvae, size), len(data.id2label))
    pipeline = build_pipeline(unet, noise_scheduler, vqvae, data, args)
    if args.stable_targets:
        views = what_is_noised(vqvae.config, dataset.latents, moved)
        make_loss = with_stable_targets(views, dataset.labels, unet.config, trainer)
        del views  # many
    loss_of = (make_loss or denoising_loss)(noise_scheduler, unet.config, args, trainer.step_size)
    fit_unet(trainer, dataset, to_sample, pipeline, data, judge, loss_of, args.guidance_unet_at)
    return output_dir


def main(argv: list[str] | None = None) -> int:
    return run_script("train_ldm", train, argv)


if __name__ == "__main__":
    sys.exit(main())
