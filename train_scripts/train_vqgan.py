#!/usr/bin/env python
"""Train the first stage: a stock `VQModel`, with a codebook that stays alive and optionally a discriminator.

accelerate launch train_scripts/train_vqgan.py --preset mnist-ldm --train_data_dir PICTURES --output_dir runs/vqgan
"""

import sys
from pathlib import Path

from hwdiffusion.config import Config, run_script


def train(config: Config, data=None) -> Path:
    """Train a `VQModel`; its run folder, which is the model's folder too, is returned.

    Args:
        config: of this script.
        data: the pictures, if they were loaded before.
    """
    from functools import partial

    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed

    from hwdiffusion import adversarial, figures
    from hwdiffusion.codebook import Codebook, advice, whiten
    from hwdiffusion.data import flip, image_channels, image_size, load_data, to_model_range
    from hwdiffusion.hub import finish
    from hwdiffusion.latents import centred, encode_batches, encode_together, how_many_tell
    from hwdiffusion.model_card import autoencoder_card
    from hwdiffusion.models import build_vqvae, latent_shape
    from hwdiffusion.randomness import Draws
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.trainer import Evaluation, Trainer

    args = config.args
    check_run(config)
    data = load_data(args) if data is None else data
    channels = image_channels(args)
    set_seed(args.seed)
    vqvae = build_vqvae(config.sections["vqvae"], channels, image_size(args))
    perceptual_loss, judge = build_helpers(config, data)

    prepare_output_dir(config)
    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    if isinstance(perceptual_loss, torch.nn.Module):
        perceptual_loss.to(trainer.device)
    vqvae.to(trainer.device)
    codebook = Codebook(
        vqvae,
        args.commitment_beta,
        args.codebook_update,
        args.codebook_ema_decay,
        args.rotation_trick,
        trainer.accelerator.gather,
    )
    trainer.add_state("codebook", codebook)
    # pictures with some four latents a code: those that it starts on, and those that dead codes restart on
    _, height, width = latent_shape(vqvae, image_size(args))
    some = data.train.starting_pictures(max(256, -(-4 * codebook.size // (height * width))), args.seed)
    draws = Draws(args.seed, 0, torch.zeros(1, device=trainer.device))
    if args.latent_init == "white":
        whiten(vqvae, encode_together(vqvae, some))
    codebook.start(encode_together(vqvae, some), draws, args.codebook_init == "kmeans")

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
        pictures = data.train.spread_pictures(how_many_tell(image_size(args)))
        centred(stock, encode_batches(stock, pictures, args.random_flip)).save_pretrained(folder)

    def preview():
        images, _ = data.validation[range(min(16, len(data.validation)))]
        images = to_model_range(images.to(trainer.device))
        pairs = torch.stack([images, stock(images).sample], dim=1).flatten(0, 1)  # a picture beside its reconstruction
        return figures.image_grid(figures.to_pil(pairs), columns=8)

    def measure():
        measured = judge(stock)
        cure = advice(measured["eval_codebook_used"], measured["eval_codebook_possible"], args)
        if cure is not None:
            trainer.print(f"warning: {cure}")
        return measured

    evaluation = Evaluation(args.evaluation_steps, measure, draws=True)
    for batch in trainer.batches(data.train, save, preview, evaluation):
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
        if args.entropy_weight > 0:
            entropy = codebook.entropy_loss(batch.draws)
            loss = loss + args.entropy_weight * entropy
            trainer.log(entropy_loss=entropy)

        begin, length = trainer.step_at(args.discriminator_start), trainer.step_at(args.discriminator_warmup)
        if args.discriminator_weight > 0 and batch.step >= begin:
            frozen.requires_grad_(False)
            generator_loss = adversarial.generator_loss(frozen(reconstruction))
            weight = args.discriminator_weight * adversarial.adaptive_weight(
                reconstruction_loss,
                generator_loss,
                stock.decoder.conv_out.weight,
                trainer.mean_over_processes,
                args.adaptive_weight_max,
            )
            weight = weight * min(1.0, (batch.step - begin + 1) / (length + 1))
            loss = loss + weight * generator_loss
            trainer.update("vqvae", loss)

            frozen.requires_grad_(True)
            real, fake = discriminator(torch.cat([images, reconstruction.detach().float()])).chunk(2)
            discriminator_loss = adversarial.discriminator_loss(real, fake)
            trainer.update("discriminator", discriminator_loss)
            trainer.log(generator_loss=generator_loss, discriminator_loss=discriminator_loss, adaptive_weight=weight)
        else:
            trainer.update("vqvae", loss)

        if trainer.ends_interval(1):
            codebook.update()
        trainer.log(mse_loss=mse, l1_loss=l1, codebook_loss=codebook_loss)
        if trainer.ends_interval(args.codebook_restart_steps):
            trainer.log(codebook_usage=codebook.usage(), codebook_perplexity=codebook.perplexity())
            if batch.step < trainer.step_at(args.codebook_restart_until):
                average = trainer.average("vqvae", codebook.vectors)
                latents = partial(encode_together, stock, some)
                restarted = codebook.restart(batch.draws, trainer.optimizer("vqvae"), average, latents)
                trainer.log(codebook_restarted=float(restarted))
            codebook.reset()

    finish(trainer, lambda: autoencoder_card(config, stock, data.summary(), trainer.max_steps))
    return trainer.output_dir


def build_helpers(config: Config, data) -> tuple:
    """The perceptual loss, or `None`, and the judge of reconstructions that a configuration asks for.

    Raises:
        InputError: a model can't be had, or doesn't fit the pictures.
    """
    from hwdiffusion.data import image_channels, image_size
    from hwdiffusion.perceptual import build_perceptual_loss
    from hwdiffusion.reconstruction import ReconstructionJudge

    args, perceptual_loss = config.args, None
    if args.perceptual_weight > 0:
        perceptual_loss = build_perceptual_loss(args.perceptual_model, (image_channels(args), *image_size(args)))
    return perceptual_loss, ReconstructionJudge(data.validation, args.evaluation_classifier)


def main(argv: list[str] | None = None) -> int:
    return run_script("train_vqgan", train, argv)


if __name__ == "__main__":
    sys.exit(main())
