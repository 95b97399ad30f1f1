#!/usr/bin/env python
"""Train a Wasserstein GAN with gradient penalty on pixels: the baseline that a diffusion model is compared with.

accelerate launch train_scripts/train_wgan.py --preset mnist-wgan --train_data_dir PICTURES --output_dir runs/wgan
"""

import sys
from pathlib import Path

from hwdiffusion.config import Config, run_script


def train(config: Config) -> Path:
    """Train a generator against a critic; the run folder, which is a pipeline, is returned."""
    import torch
    from accelerate.utils import set_seed

    from hwdiffusion import RunError, wgan
    from hwdiffusion.data import image_channels, image_size, load_data, pixels_to_sample
    from hwdiffusion.figures import sample_grid
    from hwdiffusion.hub import finish
    from hwdiffusion.judge import training_judge
    from hwdiffusion.label_sets import sets_to_draw
    from hwdiffusion.model_card import pipeline_card
    from hwdiffusion.models import build_critic, build_generator
    from hwdiffusion.pipelines import ClassConditionalGANPipeline, label_tokens
    from hwdiffusion.randomness import epoch_order
    from hwdiffusion.run_folder import check_run, prepare_output_dir
    from hwdiffusion.trainer import Evaluation, Trainer

    args = config.args
    check_run(config)
    data = load_data(args)
    num_classes, shape = len(data.id2label), (image_channels(args), *image_size(args))
    set_seed(args.seed)
    generator = build_generator(config.sections["generator"], shape, num_classes)
    critic = build_critic(config.sections["critic"], shape, num_classes)
    judge = training_judge(args, data, labelled=num_classes > 0)
    prepare_output_dir(config)

    trainer = Trainer(config, len(data.train))
    trainer.print(data.summary())
    max_labels = data.max_labels if num_classes else 1
    pipeline = ClassConditionalGANPipeline(generator, data.id2label, max_labels)
    generator = trainer.add_model("generator", generator, args.learning_rate, every=args.critic_steps)
    critic = trainer.add_model("critic", critic, args.critic_learning_rate or args.learning_rate, ema=False)
    stock_critic = trainer.unwrap("critic")  # without what gathers its gradients; its `scores` don't cast either
    latent_dim = pipeline.generator.config.latent_dim
    to_sample = pixels_to_sample(args.random_flip)

    def tokens_of(labels):
        return label_tokens(labels, num_classes) if num_classes else None  # (B, T, K)

    mixed = epoch_order(args.seed, 0, len(data.validation))  # folders come sorted by class
    some_labels = tokens_of(data.validation.labels[mixed[:1024]])
    sets = sets_to_draw(pipeline, data.validation)

    def as_saved():
        return wgan.standing_statistics(pipeline.generator, some_labels, args.seed, args.train_batch_size)

    def save(folder: Path):
        with as_saved():
            pipeline.save_pretrained(folder)

    def preview():
        with as_saved():
            return sample_grid(pipeline, args.seed, sets)

    def measure():
        with as_saved():
            return judge(pipeline)

    evaluation = None if judge is None else Evaluation(args.evaluation_steps, measure, judge.rank, judge.identity)
    for batch in trainer.batches(data.train, save, preview, evaluation):
        stored, labels = batch.data
        real, tokens = to_sample(stored, batch.draws), tokens_of(labels)  # (B, C, H, W), (B, T, K)
        noise = batch.draws.normal("noise", (latent_dim,))
        generators_turn = (batch.step + 1) % args.critic_steps == 0
        with torch.set_grad_enabled(generators_turn):
            fake = generator(noise, tokens)  # (B, C, H, W), of the labels that the real ones have

        if generators_turn:
            stock_critic.requires_grad_(False)
            generator_loss = wgan.generator_loss(stock_critic(fake, tokens))
            trainer.update("generator", generator_loss)
            stock_critic.requires_grad_(True)
            trainer.log(generator_loss=generator_loss)

        fake = fake.detach()
        both_tokens = None if tokens is None else torch.cat([tokens, tokens])
        real_scores, fake_scores = critic(torch.cat([real, fake]), both_tokens).chunk(2)  # each (B,)
        mix = batch.draws.uniform("mix")
        penalty = wgan.gradient_penalty(stock_critic.scores, real, fake, mix, tokens)
        difference = wgan.critic_loss(real_scores, fake_scores)
        loss = difference + args.gradient_penalty_weight * penalty  # Gulrajani et al. 2017, eq. 3
        trainer.update("critic", loss)
        trainer.log(critic_loss=loss, critic_gap=-difference, gradient_penalty=penalty)

    if trainer.step < args.critic_steps and not args.dry_run:
        raise RunError(
            f"the run in {args.output_dir} ended after {trainer.step} steps of the critic, before the generator's "
            f"first, at --critic_steps {args.critic_steps}, so what it saved is untrained; raise --max_train_seconds"
        )
    finish(trainer, lambda: pipeline_card(config, pipeline, data.summary(), trainer.max_steps))
    return Path(args.output_dir)


def main(argv: list[str] | None = None) -> int:
    return run_script("train_wgan", train, argv)


if __name__ == "__main__":
    sys.exit(main())
