#!/usr/bin/env python
"""Distil a trained pipeline into a student that draws in 1 to 4 steps, without guidance.

accelerate launch train_scripts/train_distill.py --teacher runs/mnist-ldm --output_dir runs/mnist-lcm
"""

import sys
from pathlib import Path

from hwdiffusion import InputError
from hwdiffusion.config import Config, run_script
from hwdiffusion.train_scripts.train_ddpm import fit_unet


LEAST_SIGNAL = 5e-3  # a prediction of noise is divided by it to tell the picture


def train(config: Config) -> Path:
    """Train a student of `--teacher`; the run folder, which is a pipeline, is returned."""
    import torch

    from hwdiffusion.data import image_size, load_data, pixels_to_sample
    from hwdiffusion.distillation import build_student, training_scheduler
    from hwdiffusion.judge import training_judge
    from hwdiffusion.latents import LatentDataset, cached_latents, latents_to_sample
    from hwdiffusion.models import latent_shape, load_pipeline
    from hwdiffusion.pipelines import guidance_of, num_label_classes
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.trainer import Trainer

    args = config.args
    check_run(config)
    teacher = load_pipeline(args.teacher, "cpu")
    scale, interval = guidance_of(teacher.config, args.teacher_guidance_scale, args.teacher_guidance_interval)
    data = load_data(args)
    check_teacher(teacher, scale, data, args)
    noise_scheduler = training_scheduler(teacher)
    student = build_student(teacher, noise_scheduler, args)
    judge = training_judge(args, data, labelled=num_label_classes(student.unet.config) > 0)
    prepare_output_dir(config)

    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    if teacher.classifier is not None:
        trainer.print("the teacher's classifier guides no student, and is left out")
    for model in (teacher.unet, teacher.guidance_unet, teacher.vqvae):
        if model is not None:
            model.to(trainer.device).eval().requires_grad_(False)
    for unet in (teacher.unet, teacher.guidance_unet):
        if unet is not None:
            trainer.accelerator.prepare_model(unet, evaluation_mode=True)  # in the run's precision, as the student is
    dataset, to_sample = data.train, pixels_to_sample(args.random_flip)
    if teacher.vqvae is not None:
        encoder = teacher.vqvae if args.streaming else None
        to_sample = latents_to_sample(teacher.vqvae.config, args.random_flip, encoder=encoder)
        if args.dry_run and not args.streaming:
            shape = latent_shape(teacher.vqvae, image_size(args))
            dataset = LatentDataset(torch.randn(len(data.train), 1, *shape), data.train.labels)
        elif not args.streaming:
            path = Path(args.output_dir) / "latents.safetensors"
            dataset = cached_latents(teacher.vqvae, data.train, args.random_flip, path)
    loss_of = consistency_loss(teacher, scale, interval, noise_scheduler, args.num_ddim_timesteps, trainer.step_size)
    fit_unet(trainer, dataset, to_sample, student, data, judge, loss_of)
    return Path(args.output_dir)


def consistency_loss(
    teacher,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    noise_scheduler,
    num_ddim_timesteps: int,
    step_size: int,
):
    """The loss of a student: a function of its UNet, clean samples `(B, C, H, W)`, their labels and draws."""
    import torch
    import torch.nn.functional as F

    from hwdiffusion.distillation import consistency, ddim_step, guided_prediction, pseudo_huber
    from hwdiffusion.objectives import add_noise, draw_timesteps
    from hwdiffusion.pipelines import label_tokens, num_label_classes, unet_conditioning

    unet_config = teacher.unet.config
    num_classes, most = num_label_classes(unet_config), teacher.config.max_labels
    span = noise_scheduler.config.num_train_timesteps / num_ddim_timesteps  # from t to s

    def loss_of(unet, sample, labels, draws):
        tokens = None
        if num_classes:
            tokens = label_tokens(labels, num_classes)
            tokens = F.pad(tokens, (0, 0, 0, most - tokens.shape[1]))  # (B, T, K), T as the teacher has it
        conditioning = unet_conditioning(unet_config, tokens)
        timesteps = draw_timesteps(draws, noise_scheduler, "stratified", step_size)
        earlier = (timesteps - span).clamp(min=0).to(timesteps.dtype)
        noisy = add_noise(noise_scheduler, sample, draws.normal("noise", sample.shape[1:]), timesteps)
        prediction = guided_prediction(teacher, noisy, timesteps, tokens, guidance_scale, guidance_interval)
        less_noisy = ddim_step(noise_scheduler, prediction, noisy, timesteps, earlier)

        output = unet(noisy, timesteps, **conditioning, return_dict=False)[0]
        end = consistency(noise_scheduler, output, noisy, timesteps)
        with torch.no_grad():
            output = unet(less_noisy, earlier, **conditioning, return_dict=False)[0]
            same_end = consistency(noise_scheduler, output, less_noisy, earlier)
        return pseudo_huber(end, same_end)

    return loss_of


def check_teacher(teacher, guidance_scale: float, data, args):
    """Raise InputError where a pipeline can't be distilled as asked, or on these pictures."""
    from hwdiffusion.data import image_channels, image_size
    from hwdiffusion.distillation import least_signal, training_scheduler
    from hwdiffusion.pipelines import num_label_classes
    from hwdiffusion.sources import few

    channels = teacher.unet.config.in_channels if teacher.vqvae is None else teacher.vqvae.config.in_channels
    theirs, ours = (channels, *teacher.image_size), (image_channels(args), *image_size(args))
    if theirs != ours:
        raise InputError(
            f"--teacher {args.teacher} draws pictures of (channels, height, width) {theirs}, but those to train on "
            f"are {ours}; give --resolution {' '.join(map(str, teacher.image_size))} and its --image_mode"
        )
    timesteps = teacher.scheduler.config.num_train_timesteps
    if timesteps % args.num_ddim_timesteps:  # LCMScheduler would begin below pure noise
        raise InputError(f"--num_ddim_timesteps must divide the teacher's {timesteps}, not {args.num_ddim_timesteps}")
    labelled = num_label_classes(teacher.unet.config) > 0
    if labelled and teacher.id2label != data.id2label:
        theirs, ours = list(teacher.id2label.values()), list(data.id2label.values())
        more = [name for name in ours if name not in theirs] or [name for name in theirs if name not in ours]
        what = (
            f"the label {more[0]!r} is only {'in the pictures' if more[0] in ours else 'known to it'}"
            if more
            else (f"they are in another order: {few(theirs)} and {few(ours)}")
        )
        raise InputError(f"--teacher {args.teacher} has other labels than the pictures: {what}; give those it had")
    if labelled and data.max_labels > teacher.config.max_labels:
        raise InputError(
            f"--teacher {args.teacher} takes {teacher.config.max_labels} labels a picture at most, but there are "
            f"pictures of {data.max_labels}"
        )
    signal = least_signal(training_scheduler(teacher))
    if teacher.config.prediction_type == "epsilon" and signal < LEAST_SIGNAL:
        raise InputError(
            f"--teacher {args.teacher} predicts the noise, of which its noisiest timestep is all but {signal:.1g}, so "
            "that no step from there tells a picture; distil one of prediction_type v_prediction"
        )
    if guidance_scale != 1 and teacher.guidance_unet is None and not (labelled and teacher.config.has_null_label):
        raise InputError(
            f"--teacher {args.teacher} was trained without label dropout, so it has no guidance to distil; give "
            "--teacher_guidance_scale 1"
        )


def main(argv: list[str] | None = None) -> int:
    return run_script("train_distill", train, argv)


if __name__ == "__main__":
    sys.exit(main())
