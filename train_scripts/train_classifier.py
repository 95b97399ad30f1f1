#!/usr/bin/env python
"""Train the classifier that judges pictures: a stock `ResNetForImageClassification`. Without flags: embedded digits.

accelerate launch train_scripts/train_classifier.py --preset mnist-classifier --train_data_dir PICTURES \\
    --output_dir runs/classifier

Where pictures have sets of labels it learns each label by itself (sigmoid), and its accuracy is over all labels of all
sets, the k likeliest of a picture being taken for its k. `--noise_aware` trains the one that guides instead: it sees
noisy pictures (or, with `--vqvae`, noisy latents) and the noise level. Pictures without labels, or of one class, teach
it by how many quarters they are turned.
"""

import sys
from pathlib import Path

from hwdiffusion import InputError
from hwdiffusion.config import Config, run_script


def train(config: Config, data=None) -> Path:
    """Train a classifier; its run folder, which is the model's folder too, is returned.

    Args:
        config: of this script.
        data: the pictures, if they were loaded before.
    """
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed

    from hwdiffusion.data import flip, image_channels, image_size, load_data, to_model_range
    from hwdiffusion.extractors import scaled
    from hwdiffusion.hub import finish
    from hwdiffusion.latents import LatentDataset, cached_latents
    from hwdiffusion.metrics import labels_found, wilson_interval
    from hwdiffusion.model_card import classifier_card
    from hwdiffusion.models import build_classifier, build_noise_scheduler, latent_shape, load_autoencoder
    from hwdiffusion.objectives import add_noise, draw_timesteps, prediction_type_of
    from hwdiffusion.pipelines import classifier_inputs, label_tokens, noise_schedule, raw_latents, scale_latents
    from hwdiffusion.randomness import Draws
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.trainer import Trainer

    args = config.args
    output_dir = Path(args.output_dir)
    check_run(config)
    latent = args.vqvae is not None
    if latent and args.streaming:
        raise InputError("latents of all pictures are cached, which --streaming is not for; leave the autoencoder out")
    noise_scheduler = build_noise_scheduler(config.sections["noise_scheduler"], latent)
    channels, size = image_channels(args), image_size(args)
    vqvae = load_autoencoder(args.vqvae, channels, size) if latent else None
    data = load_data(args) if data is None else data
    rotation = args.pretext == "rotation" or (args.pretext == "auto" and len(data.id2label) < 2)
    if rotation and latent:
        raise InputError("a classifier of latents needs labels to learn; --pretext rotation is for pictures")
    if not rotation and len(data.id2label) < 2:
        raise InputError("there are fewer than two classes to tell apart; use --pretext rotation")
    class_names = ["0°", "90°", "180°", "270°"] if rotation else list(data.id2label.values())
    sets = not rotation and data.has_sets
    if not rotation and not (data.validation.labels >= 0).any():
        raise InputError(f"none of the {len(data.validation)} validation pictures has a label to test a classifier by")
    set_seed(args.seed)
    input_shape = latent_shape(vqvae, size) if latent else (channels, *size)
    classifier = build_classifier(
        config.sections["classifier"],
        input_shape[0] + args.noise_aware,
        input_shape[1:],
        class_names,
        pretext="rotation" if rotation else "labels",
        noise_aware=args.noise_aware,
        latent=latent,
        noise_schedule=noise_schedule(noise_scheduler.config, prediction_type_of(noise_scheduler))
        if args.noise_aware
        else None,
        trained_on=data.summary(),
        test_accuracy=None,
        **({"problem_type": "multi_label_classification"} if sets else {}),
    )
    input_size = classifier.config.image_size
    if rotation and input_size[0] != input_size[1]:
        raise InputError(f"image_size in section classifier must be square to be turned, not {input_size}")

    prepare_output_dir(config)
    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    dataset = data.train
    if latent and args.dry_run:
        dataset = LatentDataset(torch.randn(len(data.train), 1, *input_shape), data.train.labels)
    elif latent:
        vqvae.to(trainer.device).eval().requires_grad_(False)
        dataset = cached_latents(vqvae, data.train, False, output_dir / "latents.safetensors")
    classifier = trainer.add_model("classifier", classifier, args.learning_rate)
    stock = trainer.unwrap("classifier")

    def to_inputs(stored, labels, draws, augmented):
        """What the classifier sees, `(B, C, *input_size)`, and the ids that it should say, `(B, T)`."""
        if stored.ndim == 5:  # latents (B, 1, C, h, w)
            sample = scale_latents(vqvae.config, stored[:, 0])  # as sampling does
        else:
            sample = to_model_range(stored)
            if augmented and args.random_flip:
                sample = flip(sample, draws.uniform("flip") < 0.5)
            if augmented:
                sample = moved(sample, draws, args.random_shift, args.random_rotation, args.random_scale)
        if rotation:
            quarters = (draws.uniform("rotation") * 4).long()  # (B,)
            sample = scaled(sample, input_size)
            turned = torch.stack([torch.rot90(sample, number, (-2, -1)) for number in range(4)])  # (4, B, C, H, W)
            sample = turned[quarters, torch.arange(len(quarters), device=sample.device)]
            labels = quarters[:, None]
        if args.noise_aware:
            timesteps = draw_timesteps(draws, noise_scheduler, "uniform", trainer.step_size)
            sample = add_noise(noise_scheduler, sample, draws.normal("noise", sample.shape[1:]), timesteps)
            level = timesteps / noise_scheduler.config.num_train_timesteps
            return classifier_inputs(sample, level, input_size), labels
        return scaled(sample, input_size), labels

    def right_answers() -> tuple[int, int]:
        right = count = 0
        for start in range(0, len(data.validation), 256):
            places = torch.arange(start, min(start + 256, len(data.validation)))
            images, labels = data.validation[places]
            stored = images.to(trainer.device)
            if latent:
                stored = raw_latents(vqvae, to_model_range(stored))[:, None]
            draws = Draws(args.seed, 0, places.to(trainer.device))
            inputs, targets = to_inputs(stored, labels.to(trainer.device), draws, augmented=False)
            found = labels_found(stock(pixel_values=inputs).logits, targets)
            right, count = right + found.sum().item(), count + (targets >= 0).sum().item()
        return right, count

    def save(folder: Path):
        right, count = right_answers()
        stock.config.test_accuracy = right / count
        stock.save_pretrained(folder)

    for batch in trainer.batches(dataset, save):
        inputs, targets = to_inputs(*batch.data, batch.draws, augmented=True)
        logits = classifier(pixel_values=inputs).logits  # (B, K)
        if sets:
            wanted = label_tokens(targets, len(class_names)).sum(dim=1)  # (B, K)
            smoothed = torch.lerp(wanted, torch.full_like(wanted, 0.5), args.label_smoothing)
            loss = F.binary_cross_entropy_with_logits(logits.float(), smoothed)
        else:
            loss = F.cross_entropy(logits.float(), targets[:, 0], label_smoothing=args.label_smoothing)
        found = labels_found(logits, targets).sum() / (targets >= 0).sum().clamp(min=1)
        trainer.update("classifier", loss)
        trainer.log(loss=loss, accuracy=found)

    count = len(data.validation)
    judged = count if rotation else (data.validation.labels >= 0).sum().item()
    if trainer.is_main_process and not args.dry_run:
        accuracy = stock.config.test_accuracy
        low, high = wilson_interval(round(accuracy * judged), judged)
        of = f"{judged} labels of {count} pictures" if sets else f"{count} pictures"
        trainer.print(f"test accuracy {accuracy:.4f} (95 % {low:.4f} to {high:.4f}) on {of}")
    finish(trainer, lambda: classifier_card(config, stock.config, data.summary(), trainer.max_steps, judged))
    return output_dir


def moved(images, draws, shift: float, rotation: float, scale: float):
    """Pictures `(B, C, H, W)` shifted, turned and scaled at random about their middle; their edges are drawn out.

    Args:
        shift: the largest, as a share of the picture.
        rotation: the largest, in degrees.
        scale: the largest change of size, as a share.
    """
    import math

    import torch
    import torch.nn.functional as F

    across, down, angle, size = (draws.uniform("affine", (4,)) * 2 - 1).unbind(dim=1)  # each (B,), in (-1, 1)
    angle, size = angle * math.radians(rotation), 1 + size * scale
    height, width = images.shape[-2:]
    rows = [
        torch.stack([angle.cos() * size, -angle.sin() * size * height / width, 2 * shift * across], dim=1),
        torch.stack([angle.sin() * size * width / height, angle.cos() * size, 2 * shift * down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def main(argv: list[str] | None = None) -> int:
    return run_script("train_classifier", train, argv)


if __name__ == "__main__":
    sys.exit(main())
