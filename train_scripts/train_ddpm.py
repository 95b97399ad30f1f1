#!/usr/bin/env python
"""Train a diffusion model on pixels.

accelerate launch train_scripts/train_ddpm.py --preset mnist-ddpm --train_data_dir PICTURES --output_dir runs/ddpm
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hwdiffusion.config import Config, run_script


def train(config: Config, make_loss: Callable | None = None) -> Path:
    """Train a UNet on pixels; the run folder, which is a pipeline, is returned.

    Args:
        make_loss: what makes the loss, in place of `denoising_loss`; called as that is.
    """
    from accelerate.utils import set_seed

    from hwdiffusion.data import image_channels, image_size, load_data, pixels_to_sample, to_model_range, views_of
    from hwdiffusion.judge import training_judge
    from hwdiffusion.labels import check_dropout
    from hwdiffusion.models import build_noise_scheduler, build_pipeline, build_unet, check_inference_steps
    from hwdiffusion.pipelines import num_label_classes
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.stable_targets import check_targets
    from hwdiffusion.trainer import Trainer

    args = config.args
    check_run(config)
    noise_scheduler = build_noise_scheduler(config.sections["noise_scheduler"], latent=False)
    check_inference_steps(noise_scheduler, args.num_inference_steps)
    data = load_data(args)
    check_dropout(args, data)
    check_targets(args, len(data.train), (image_channels(args), *image_size(args)), make_loss)
    set_seed(args.seed)
    unet = build_unet(config.sections["unet"], (image_channels(args), *image_size(args)), len(data.id2label))
    judge = training_judge(args, data, labelled=num_label_classes(unet.config) > 0)
    prepare_output_dir(config)

    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    pipeline = build_pipeline(unet, noise_scheduler, None, data, args)
    if args.stable_targets:
        images, labels = data.train[range(len(data.train))]
        views = views_of(to_model_range(images), args.random_flip)
        make_loss = with_stable_targets(views, labels, unet.config, trainer)
        del views  # many
    loss_of = (make_loss or denoising_loss)(noise_scheduler, unet.config, args, trainer.step_size)
    to_sample = pixels_to_sample(args.random_flip)
    fit_unet(trainer, data.train, to_sample, pipeline, data, judge, loss_of, args.guidance_unet_at)
    return Path(args.output_dir)


def with_stable_targets(views, labels, unet_config, trainer) -> Callable:
    """What makes the loss of stable targets, as `denoising_loss` makes that of the usual ones.

    Args:
        views, labels: of all clean samples, `(N, F, C, H, W)` and `(N, T)`.
    """
    from hwdiffusion.pipelines import num_label_classes
    from hwdiffusion.stable_targets import StableTargets

    told = labels if num_label_classes(unet_config) else labels[:, :0]
    stable_targets = StableTargets(views, told, trainer.args.stable_targets, trainer.device)
    trainer.print(f"targets are means over {stable_targets.usual} pictures with the same labels (median)")
    return partial(denoising_loss, stable_targets=stable_targets)


def denoising_loss(noise_scheduler, unet_config, args, step_size: int, stable_targets: Callable | None = None):
    """The loss of a diffusion model: a function of a UNet, clean samples `(B, C, H, W)`, their labels and draws.

    Args:
        step_size: the samples of a step over all processes and micro-batches.
        stable_targets: a `StableTargets`, which says what noisy samples are made of on average.

    Raises:
        ValueError: the flags ask for stable targets, and there are none, or the other way round.
    """
    from hwdiffusion.labels import drop_labels
    from hwdiffusion.objectives import add_noise, diffusion_loss, draw_timesteps, levels
    from hwdiffusion.pipelines import label_tokens, num_label_classes, unet_conditioning

    if (args.stable_targets > 0) != (stable_targets is not None):
        raise ValueError(f"stable_targets must be given if, and only if, --stable_targets is ({args.stable_targets})")
    num_classes = num_label_classes(unet_config)

    def loss_of(unet, sample, labels, draws):
        tokens = None
        if num_classes:
            tokens = label_tokens(labels, num_classes)  # (B, T, K)
            tokens = drop_labels(tokens, args.label_dropout, draws, args.single_label_dropout)
        noise = draws.normal("noise", sample.shape[1:])
        timesteps = draw_timesteps(draws, noise_scheduler, args.timestep_sampling, step_size)
        noisy = add_noise(noise_scheduler, sample, noise, timesteps)
        if stable_targets is not None:
            told = labels if num_classes else labels[:, :0]
            sample, noise = stable_targets(sample, noise, *levels(noise_scheduler, timesteps, sample), told, draws)
        prediction = unet(noisy, timesteps, **unet_conditioning(unet_config, tokens), return_dict=False)[0]
        return diffusion_loss(noise_scheduler, prediction, sample, noise, timesteps, args.snr_gamma)

    return loss_of


def fit_unet(trainer, dataset, to_sample, pipeline, data, judge, loss_of, guidance_unet_at: float = 0.0):
    """The loop that trains a pipeline's UNet, on pixels and on latents alike.

    Args:
        dataset: `dataset[indices]` gives pictures or latents, and labels `(B, T)`.
        to_sample: a function of those and of the batch's draws, to clean samples `(B, C, H, W)`.
        pipeline: what is saved.
        data: the pictures, for the names of their labels.
        judge: measures the pipeline as it is trained, if it is not `None`.
        loss_of: a function of the UNet, clean samples, labels and draws, to a scalar.
        guidance_unet_at: the part of the run after which the averaged weights become the pipeline's `guidance_unet`;
            0: never.
    """
    from hwdiffusion.autoguidance import STATE, EarlierSelf
    from hwdiffusion.figures import sample_grid
    from hwdiffusion.host import choose_attention
    from hwdiffusion.hub import finish
    from hwdiffusion.label_sets import sets_to_draw
    from hwdiffusion.model_card import pipeline_card
    from hwdiffusion.pipelines import num_label_classes
    from hwdiffusion.trainer import Evaluation

    args = trainer.args
    if data.id2label and not num_label_classes(pipeline.unet.config):
        trainer.print(f"the UNet takes no labels: the {len(data.id2label)} classes are not used")
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    earlier_self = EarlierSelf(pipeline, guidance_unet_at) if guidance_unet_at > 0 else None
    if earlier_self is not None:
        trainer.add_state(STATE, earlier_self)
        trainer.accelerator.prepare_model(earlier_self.unet, evaluation_mode=True)  # draws in the UNet's precision
    choose_attention(pipeline.unet, args.mixed_precision, trainer.device)
    unet = trainer.add_model("unet", pipeline.unet, args.learning_rate, torch_compile=args.torch_compile)

    evaluation = None
    if judge is not None:
        evaluation = Evaluation(args.evaluation_steps, lambda: judge(pipeline), judge.rank, judge.identity)
    sets = sets_to_draw(pipeline, data.validation)

    def preview():
        return sample_grid(pipeline, args.seed, sets)

    for batch in trainer.batches(dataset, pipeline.save_pretrained, preview, evaluation):
        if earlier_self is not None and earlier_self.is_due(trainer):
            with trainer.averaged_weights():
                earlier_self.take()
        stored, labels = batch.data
        sample = to_sample(stored, batch.draws)  # (B, C, H, W)
        loss = loss_of(unet, sample, labels, batch.draws)
        trainer.update("unet", loss)
        trainer.log(loss=loss)

    finish(trainer, lambda: pipeline_card(trainer.config, pipeline, data.summary(), trainer.max_steps))


def main(argv: list[str] | None = None) -> int:
    return run_script("train_ddpm", train, argv)


if __name__ == "__main__":
    sys.exit(main())
