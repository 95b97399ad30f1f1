#!/usr/bin/env python
"""Train the first stage: a stock `VQModel`, with a codebook that stays alive and optionally a discriminator.

accelerate launch train_scripts/train_vqgan.py --preset mnist-ldm --train_data_dir PICTURES --output_dir runs/vqgan
"""

import sys
from pathlib import Path

from hwdiffusion import InputError
from hwdiffusion.config import Config, run_script


def train(config: Config, data=None) -> Path:
    """Train a `VQModel`; its run folder, which is the model's folder too, is returned.

    Args:
        config: of this script.
        data: the pictures, if they were loaded before.
    """
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed

    from hwdiffusion import adversarial, figures
    from hwdiffusion.codebook import Codebook
    from hwdiffusion.data import flip, image_channels, image_size, load_data, to_model_range
    from hwdiffusion.latents import centred, encode_batches
    from hwdiffusion.models import build_vqvae
    from hwdiffusion.randomness import Draws
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.trainer import Trainer

    args = config.args
    check_run(config)
    data = load_data(args) if data is None else data
    channels = image_channels(args)
    set_seed(args.seed)
    vqvae = build_vqvae(config.sections["vqvae"], channels, image_size(args))
    perceptual_loss = build_perceptual_loss(args)

    prepare_output_dir(config)
    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    if isinstance(perceptual_loss, torch.nn.Module):
        perceptual_loss.to(trainer.device)
    vqvae.to(trainer.device)
    codebook = Codebook(vqvae, args.commitment_beta, trainer.accelerator.gather)
    trainer.add_state("codebook", codebook)
    first = data.train.starting_pictures(256, args.seed)
    with torch.no_grad():
        latents = vqvae.encode(to_model_range(first.to(trainer.device))).latents
    codebook.start(latents, Draws(args.seed, 0, torch.zeros(1, device=trainer.device)))

    vqvae = trainer.add_model("vqvae", vqvae, args.learning_rate)
    stock = trainer.unwrap("vqvae")
    if args.discriminator_weight > 0:
        discriminator = trainer.add_model(
            "discriminator",
            adversarial.PatchDiscriminator(channels, args.discriminator_channels, args.discriminator_layers),
            args.discriminator_learning_rate,
            ema=False,
            starts_at=args.discriminator_start,
        )
        frozen = trainer.unwrap("discriminator")  # the generator's turn: no gradients to gather from it

    def save(folder: Path):
        # some 2,000 pictures tell mean and deviation of the latents to a percent
        pictures = data.train.spread_pictures(2000)
        centred(stock, encode_batches(stock, pictures, args.random_flip)).save_pretrained(folder)

    def preview():
        images, _ = data.validation[range(min(16, len(data.validation)))]
        images = to_model_range(images.to(trainer.device))
        pairs = torch.stack([images, stock(images).sample], dim=1).flatten(0, 1)  # a picture beside its reconstruction
        return figures.image_grid(figures.to_pil(pairs), columns=8)

    for batch in trainer.batches(data.train, save, preview):
        images = to_model_range(batch.data[0])
        if args.random_flip:
            images = flip(images, batch.draws.uniform("flip") < 0.5)

        reconstruction, codebook_loss = vqvae(images, return_dict=False)
        mse, l1 = F.mse_loss(reconstruction.float(), images), F.l1_loss(reconstruction.float(), images)
        reconstruction_loss = args.mse_weight * mse + args.l1_weight * l1
        if perceptual_loss is not None:
            perceptual = perceptual_loss(reconstruction.float(), images)
            reconstruction_loss = reconstruction_loss + args.perceptual_weight * perceptual
            trainer.log(perceptual_loss=perceptual)
        loss = reconstruction_loss + args.codebook_weight * codebook_loss.float()

        if args.discriminator_weight > 0 and batch.step >= trainer.step_at(args.discriminator_start):
            frozen.requires_grad_(False)
            generator_loss = adversarial.generator_loss(frozen(reconstruction))
            weight = args.discriminator_weight * adversarial.adaptive_weight(
                reconstruction_loss, generator_loss, stock.decoder.conv_out.weight, trainer.mean_over_processes
            )
            loss = loss + weight * generator_loss
            trainer.update("vqvae", loss)

            frozen.requires_grad_(True)
            real, fake = discriminator(torch.cat([images, reconstruction.detach().float()])).chunk(2)
            discriminator_loss = adversarial.discriminator_loss(real, fake)
            trainer.update("discriminator", discriminator_loss)
            trainer.log(generator_loss=generator_loss, discriminator_loss=discriminator_loss, adaptive_weight=weight)
        else:
            trainer.update("vqvae", loss)

        trainer.log(mse_loss=mse, codebook_loss=codebook_loss)
        if trainer.ends_interval(args.codebook_restart_steps):
            trainer.log(codebook_usage=codebook.usage(), codebook_perplexity=codebook.perplexity())
            if batch.step < trainer.step_at(args.codebook_restart_until):
                average = trainer.average("vqvae", codebook.vectors)
                codebook.restart(batch.draws, trainer.optimizer("vqvae"), average)
            codebook.reset()
    return trainer.output_dir


def build_perceptual_loss(args):
    """The perceptual loss that the arguments ask for, as a function of two pictures in [-1, 1], or `None`."""
    from hwdiffusion.adversarial import FeatureLoss, laplacian_pyramid_loss

    if args.perceptual_weight == 0:
        return None
    if args.perceptual_model is None:
        return laplacian_pyramid_loss
    from transformers import AutoModel

    try:
        return FeatureLoss(AutoModel.from_pretrained(args.perceptual_model))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--perceptual_model {args.perceptual_model} can't be loaded: {reason}") from error


def main(argv: list[str] | None = None) -> int:
    return run_script("train_vqgan", train, argv)


if __name__ == "__main__":
    sys.exit(main())
