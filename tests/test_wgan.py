"""The losses and networks of the Wasserstein GAN: the penalty's closed forms, a toy that trains, what labels do."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import TINY_CRITIC, TINY_GENERATOR
from tiny import NAMES, make_gan

from hwdiffusion import InputError
from hwdiffusion.models import build_critic, build_generator
from hwdiffusion.pipelines import label_ids, label_tokens
from hwdiffusion.wgan import critic_loss, generator_loss, gradient_penalty, standing_statistics


# -- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.3, 1.0, 4.0])
def test_the_penalty_of_a_linear_critic_is_the_distance_of_its_slope_from_one(length):
    """D(x) = ⟨w, x⟩ + b has the gradient w everywhere: the penalty is (|w| - 1)², its gradient 2 (|w| - 1) w / |w|."""
    torch.manual_seed(0)
    w = torch.randn(3, 4, 4)
    w = (w * length / w.norm()).requires_grad_()
    real, fake, mix = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5)
    penalty = gradient_penalty(lambda x: (x * w).sum(dim=(1, 2, 3)) + 7, real, fake, mix)
    torch.testing.assert_close(penalty, torch.tensor((length - 1) ** 2), atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, 2 * (length - 1) * w.detach() / length, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_taken_between_real_and_generated_pictures_of_a_pair():
    """D(x) = |x|² / 2 has the gradient x, so the penalty tells at which x̂ = ε x + (1 - ε) x̃ it was taken."""
    torch.manual_seed(0)
    real, fake, mix = torch.randn(64, 10), torch.randn(64, 10) + 3, torch.rand(64)
    between = mix[:, None] * real + (1 - mix[:, None]) * fake
    expected = (between.norm(dim=1) - 1).square().mean()
    penalty = gradient_penalty(lambda x: x.square().sum(dim=1) / 2, real, fake, mix)
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_penalty_is_of_full_precision_within_a_training_of_less(spectral_norm):
    torch.manual_seed(0)
    critic = build_critic({**TINY_CRITIC, "spectral_norm": spectral_norm}, (3, 16, 16), 3).eval()
    real, fake, mix = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.rand(4)
    tokens = label_tokens(torch.tensor([[0], [1], [2], [0]]), 3)
    scores, expected = critic(real, tokens), gradient_penalty(critic.scores, real, fake, mix, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(critic(real, tokens).float(), scores)  # it is less
        penalty = gradient_penalty(critic.scores, real, fake, mix, tokens)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, expected)


def test_the_losses_pull_the_critic_and_the_generator_apart():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.5])
    assert critic_loss(real, fake).item() == -2.0  # minus the gap
    assert generator_loss(fake + 1).item() == -1.0


def ring(count: int, generator: torch.Generator) -> torch.Tensor:
    """Samples `(B, 2)` of eight narrow Gaussians on the unit circle."""
    angles = torch.randint(0, 8, (count,), generator=generator) * (math.pi / 4)
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres + 0.05 * torch.randn(count, 2, generator=generator)


def test_a_ring_of_gaussians_is_learned_steadily():
    """All eight are found, and the gap, which estimates the distance, shrinks and stays small to the end.

    λ is 0.1, because with 10 it takes far more steps.
    """
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
    optimizers = [torch.optim.Adam(model.parameters(), betas=(0.0, 0.9)) for model in (generator, critic)]
    gaps = []
    for step in range(1500):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1500)
        real = ring(128, draws)
        fake = generator(torch.randn(128, 2, generator=draws))
        if (step + 1) % 3 == 0:
            optimizers[0].zero_grad()
            generator_loss(critic(fake)).backward()
            optimizers[0].step()
        fake = fake.detach()
        difference = critic_loss(critic(real), critic(fake))
        penalty = gradient_penalty(critic, real, fake, torch.rand(128, generator=draws))
        optimizers[1].zero_grad()
        (difference + 0.1 * penalty).backward()
        optimizers[1].step()
        gaps.append(-difference.item())

    with torch.no_grad():
        samples = generator(torch.randn(2000, 2, generator=draws))
    angles = torch.arange(8) * (math.pi / 4)
    distances = torch.cdist(samples, torch.stack([angles.cos(), angles.sin()], dim=1))
    nearest, which = distances.min(dim=1)
    near = nearest < 0.15  # three deviations; of points all around the circle 0.38 are that near
    assert near.float().mean() > 0.5
    assert torch.bincount(which[near], minlength=8).min() > 60  # of 250
    early, late = torch.tensor(gaps[:100]), torch.tensor(gaps[-200:])
    assert early.max() > 0.5 and late.abs().mean() < 0.25 and late.abs().max() < 0.4


# -- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size, blocks", [((16, 16), 2), ((28, 28), 2), ((24, 40), 3), ((64, 64), 4), ((128, 128), 5)])
def test_both_networks_take_every_size_and_all_weights_are_reached(channels, size, blocks):
    widths, shape = [8] * (blocks + 1), (channels, *size)
    generator = build_generator({**TINY_GENERATOR, "block_out_channels": widths}, shape, 3)
    critic = build_critic({"block_out_channels": widths[1:], "patch_size": 2}, shape, 3)
    tokens = label_tokens(torch.tensor([[0, -1], [1, 2]]), 3)
    pictures = generator(torch.randn(2, 8), tokens)
    assert pictures.shape == (2, *shape) and pictures.abs().max() <= 1
    scores = critic(pictures, tokens)
    assert scores.shape == (2,)
    penalty = gradient_penalty(critic.scores, torch.randn(2, *shape), pictures, torch.rand(2), tokens)
    (scores.mean() + penalty).backward()
    for model in (generator, critic):
        unmoved = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert not unmoved and all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_a_generator_without_conditional_norm_has_the_labels_beside_the_noise(norm_type):
    torch.manual_seed(0)
    section = {**TINY_GENERATOR, "norm_type": norm_type}
    plain, told = (build_generator({**section, "conditional_norm": by}, (1, 16, 16), 3) for by in (False, True))
    assert sum(weight.numel() for weight in plain.parameters()) < sum(weight.numel() for weight in told.parameters())
    noise, tokens = torch.randn(1, 8).expand(2, -1), label_tokens(torch.tensor([[0], [1]]), 3)
    with torch.no_grad():
        one, other = plain.eval()(noise, tokens)
    assert (one - other).abs().max() > 1e-4


def test_a_set_of_labels_is_the_sum_of_its_labels_in_any_order():
    torch.manual_seed(0)
    critic, generator = build_critic(TINY_CRITIC, (1, 16, 16), 3), make_gan((1, 16, 16)).generator
    images, noise = torch.randn(1, 1, 16, 16), torch.randn(1, 8)

    def of(model, sample, *labels):
        with torch.no_grad():
            return model(sample, label_tokens(label_ids([list(labels)], NAMES, 3), 3))

    for model, sample in ((critic, images), (generator, noise)):
        torch.testing.assert_close(of(model, sample, "cat", "wild"), of(model, sample, "wild", "cat"))
        assert (of(model, sample, "cat", "wild") - of(model, sample, "cat")).abs().max() > 1e-4
    one, two, both, none = (of(critic, images, *names) for names in (("cat",), ("dog",), ("cat", "dog"), ()))
    torch.testing.assert_close(both - none, (one - none) + (two - none), atol=1e-5, rtol=1e-4)


def test_a_score_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    critic = build_critic(TINY_CRITIC, (1, 16, 16), 0)
    images = torch.randn(4, 1, 16, 16)
    alone = torch.cat([critic(image[None]) for image in images])
    torch.testing.assert_close(critic(images), alone, atol=1e-5, rtol=1e-5)


def test_spectral_norm_bounds_every_weight():
    torch.manual_seed(0)
    critic = build_critic({**TINY_CRITIC, "spectral_norm": True}, (1, 16, 16), 3)
    layers = [module for module in critic.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        layer.parametrizations.weight.original.data.mul_(5)
    for _ in range(50):  # each pass is an iteration of the power method
        critic(torch.randn(1, 1, 16, 16), torch.zeros(1, 1, 3))
    largest = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in layers]
    assert largest == pytest.approx([1.0] * len(layers), abs=0.02)


def test_batch_norm_has_the_statistics_of_the_present_weights_while_it_is_looked_at():
    pipe = make_gan(norm_type="batch", conditional_norm=True)
    generator = pipe.generator.train()
    tokens = label_tokens(torch.tensor([[0], [1], [2]]), 3)
    for _ in range(5):
        generator(torch.randn(6, 8) * 3 + 1, tokens.repeat(2, 1, 1))  # other statistics than those of normal noise
    generator.eval()
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    seen = []
    norm = generator.up_blocks[0].norm1.norm
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with standing_statistics(generator, tokens, seed=0, batch_size=6, batches=4):
        hook.remove()
        assert not generator.training and len(seen) == 4
        torch.testing.assert_close(norm.running_mean, torch.cat(seen).mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
        noise = torch.randn(3, 8)
        alone = torch.cat([generator(noise[i : i + 1], tokens[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(generator(noise, tokens), alone, atol=1e-5, rtol=1e-4)
    after = dict(generator.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "build, section, shape, said",
    [
        (build_generator, {"block_out_channels": [8, 8, 8, 8]}, (1, 28, 28), "28x28 is not divisible by 8"),
        (build_generator, {"block_out_channels": [8, 12]}, (1, 16, 16), r"norm_num_groups \(8\), but 12 isn't"),
        (build_generator, {"norm_type": "layer"}, (1, 16, 16), "norm_type must be 'group' or 'batch', not 'layer'"),
        (build_generator, {"latent_dims": 8}, (1, 16, 16), "did you mean latent_dim"),
        (build_generator, {"latent_dim": 0}, (1, 16, 16), "latent_dim in section generator must be a positive whole"),
        (build_generator, {"out_channels": 3}, (1, 16, 16), "out_channels in section generator is 3, but the data"),
        (build_critic, {"block_out_channels": [8] * 6}, (1, 16, 16), "give at most 5 block_out_channels"),
        (build_critic, {"block_out_channels": []}, (1, 16, 16), "block_out_channels in section critic must be"),
        (build_critic, {"patch_size": 8, "block_out_channels": [8] * 3}, (1, 16, 16), "give at most 2 block_out"),
        (build_critic, {"patch_size": 0}, (1, 16, 16), "patch_size in section critic must be a positive whole"),
        (build_critic, {"patch_size": 3}, (1, 16, 16), "patch_size in section critic is 3, by which 16x16 is not div"),
        (build_critic, {"block_out_channels": [8] * 4}, (1, 28, 28), "give at most 3 block_out_channels"),
        (build_critic, {"norm": "layer"}, (1, 16, 16), "unknown key 'norm'"),
    ],
)
def test_what_can_not_be_built_is_refused_in_a_sentence(build, section, shape, said):
    with pytest.raises(InputError, match=said):
        build(section, shape, 3)
