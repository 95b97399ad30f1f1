import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from running import MAIN, assert_identical, final_state, read_metrics

from hwdiffusion import InputError
from hwdiffusion.config import parse
from hwdiffusion.data import pixels_to_sample, to_model_range, views_of
from hwdiffusion.latents import latents_to_sample, what_is_noised
from hwdiffusion.objectives import draw_timesteps, levels, prediction_target
from hwdiffusion.randomness import Draws
from hwdiffusion.stable_targets import StableTargets
from hwdiffusion.train_scripts import train_ddpm, train_ldm


SCHEDULERS = {
    "ddpm": DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "zero terminal SNR": DDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
}


def clean_samples(count: int, views: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of three sets of labels, one of them of two labels."""
    sample = Draws(1, 0, torch.arange(count)).normal("sample", (views, 2, 3, 3))
    sets = torch.tensor([[0, -1], [1, -1], [0, 1]])
    return sample, sets[torch.arange(count) % 3]


def noise_and_levels(name: str, sample, timestep: float):
    noise = Draws(0, 0, torch.arange(len(sample))).normal("noise", sample.shape[1:])
    timesteps = torch.full((len(sample),), timestep)
    return noise, *levels(SCHEDULERS[name], timesteps if name == "flow" else timesteps.long(), sample)


def by_the_formula(views, labels, sample, noise, alpha, sigma, of_labels) -> torch.Tensor:
    """E[x | z, labels], one sample after the other, in float64."""
    sample, noise, alpha, sigma = (given.double() for given in (sample, noise, alpha, sigma))
    noisy, means = alpha * sample + sigma * noise, []
    for i in range(len(noisy)):
        group = views[(labels == of_labels[i]).all(dim=1)].flatten(0, 1).double()
        distance = (noisy[i] - alpha[i] * group).square().sum(dim=(1, 2, 3))
        weights = (-distance / (2 * sigma[i].flatten() ** 2)).softmax(dim=0)
        means.append((weights[:, None, None, None] * group).sum(dim=0))
    return torch.stack(means).float()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("timestep", [20.0, 400.0, 700.0, 999.0])
@pytest.mark.parametrize("views", [1, 2])
def test_the_clean_sample_is_the_mean_over_those_of_the_labels(name, timestep, views):
    stored, labels = clean_samples(30, views)
    chosen = torch.tensor([3, 17, 8, 4, 29, 0])
    sample, of_labels = stored[chosen, views - 1], labels[chosen]
    noise, alpha, sigma = noise_and_levels(name, sample, timestep)
    draws = Draws(0, 0, torch.arange(6))
    clean, left = StableTargets(stored, labels, count=100)(sample, noise, alpha, sigma, of_labels, draws)
    expected = by_the_formula(stored, labels, sample, noise, alpha, sigma, of_labels)
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(alpha * clean + sigma * left, alpha * sample + sigma * noise, rtol=0, atol=1e-5)
    if timestep == 999:
        assert (clean - sample).square().mean() > 0.5


@pytest.mark.parametrize(("name", "timestep"), [("ddpm", 0.0), ("flow", 0.0), ("flow", 1e-3), ("flow", 1.0)])
def test_with_next_to_no_noise_targets_are_the_usual_ones(name, timestep):
    stored, labels = clean_samples(30)
    noise, alpha, sigma = noise_and_levels(name, stored[:, 0], timestep)
    draws = Draws(0, 0, torch.arange(30))
    clean, left = StableTargets(stored, labels, count=100)(stored[:, 0], noise, alpha, sigma, labels, draws)
    assert torch.equal(clean, stored[:, 0]) and torch.equal(left, noise)


def test_a_flows_timesteps_never_reach_the_end_by_rounding():
    class Last:
        samples = torch.tensor([1023])

        def uniform(self, name):
            return torch.tensor([1 - 2**-24])

    assert draw_timesteps(Last(), SCHEDULERS["flow"], "stratified", 1024) > 0


def test_autocast_leaves_the_weights_their_digits():
    stored, labels = clean_samples(30)
    given = (stored[:, 0], *noise_and_levels("ddpm", stored[:, 0], 500), labels, Draws(0, 0, torch.arange(30)))
    targets = StableTargets(stored, labels, count=100)
    with torch.autocast("cpu", torch.bfloat16):
        there = targets(*given)
    for ours, plain in zip(there, targets(*given)):
        assert ours.dtype == torch.float32 and torch.equal(ours, plain)


def test_a_part_of_many_gives_the_mean_over_all_on_average():
    # two that are near and one that is far: a sample that counted twice would move the mean at once
    stored = torch.tensor([0.0, 1.0, -3.0]).view(3, 1, 1, 1, 1)
    labels = torch.zeros(3, 1, dtype=torch.int64)
    alpha, sigma = torch.full((1, 1, 1, 1), 0.6), torch.full((1, 1, 1, 1), 0.8)
    z = torch.full((1, 1, 1, 1), 0.5)
    weights = (-((z.flatten() - 0.6 * stored.flatten()) ** 2) / (2 * 0.8**2)).softmax(dim=0)
    expected = float(weights @ stored.flatten())
    part = StableTargets(stored, labels, count=2)
    generator, means, seen = torch.Generator().manual_seed(0), [], set()
    for step, own in enumerate(torch.multinomial(weights, 4000, replacement=True, generator=generator)):
        sample = stored[own]
        noise = (z - alpha * sample) / sigma
        given = (sample, noise, alpha, sigma, labels[:1], Draws(0, step, torch.zeros(1)))
        mean = part(*given)[0].item()
        assert part(*given)[0].item() == mean
        means.append(mean)
        seen.add(round(mean, 4))
    deviation = torch.tensor(means).std().item() / len(means) ** 0.5
    assert abs(sum(means) / len(means) - expected) < 4 * deviation < 0.05
    assert len(seen) > 6  # they are not always the same ones


def test_a_batch_cut_into_parts_has_the_same_targets():
    stored, labels = clean_samples(1500)
    noise, alpha, sigma = noise_and_levels("ddpm", stored[:8, 0], 800)
    targets = StableTargets(stored, labels, count=100)
    whole, _ = targets(stored[:8, 0], noise, alpha, sigma, labels[:8], Draws(0, 3, torch.arange(8)))
    for part in (slice(0, 4), slice(4, 8)):
        draws = Draws(0, 3, torch.arange(8)[part])
        ours, _ = targets(stored[part, 0], noise[part], alpha[part], sigma[part], labels[part], draws)
        torch.testing.assert_close(ours, whole[part], rtol=0, atol=1e-5)


def test_sets_are_the_same_in_any_order_and_pictures_without_labels_are_one():
    stored = clean_samples(12)[0]
    given = (stored[:, 0], *noise_and_levels("ddpm", stored[:, 0], 999))
    draws = Draws(0, 0, torch.arange(12))
    either = torch.tensor([[0, 1], [1, 0]]).repeat(6, 1)
    for labels in (either, torch.zeros(12, 0, dtype=torch.int64)):
        targets = StableTargets(stored, labels, count=100)
        assert targets.usual == 12
        expected = by_the_formula(stored, labels[:, :0], *given, labels[:, :0])
        torch.testing.assert_close(targets(*given, labels, draws)[0], expected, rtol=0, atol=1e-4)
    with pytest.raises(KeyError):
        targets(*given, either, draws)


def test_views_are_what_training_noises():
    images = torch.randint(0, 256, (16, 1, 4, 4), dtype=torch.uint8)
    draws = Draws(0, 0, torch.arange(16))
    views = views_of(to_model_range(images), random_flip=True)
    mirrored = (draws.uniform("flip") < 0.5).long()
    assert mirrored.unique().tolist() == [0, 1]
    assert torch.equal(pixels_to_sample(True)(images, draws), views[torch.arange(16), mirrored])
    assert torch.equal(pixels_to_sample(False)(images, draws), views_of(to_model_range(images), False)[:, 0])

    config = AutoencoderKL(block_out_channels=[32], scaling_factor=0.5, shift_factor=0.25).config
    latents, shift = torch.randn(16, 2, 4, 4, 4), torch.randn(4, 1, 1)
    view = (draws.uniform("flip") * 2).long()
    views = what_is_noised(config, latents, shift)
    assert torch.equal(latents_to_sample(config, True, shift)(latents, draws), views[torch.arange(16), view])
    torch.testing.assert_close(views, (latents - shift - 0.25) * 0.5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_loss_is_of_the_mean(name, preset, monkeypatch):
    """A model that says what the mean asks for has none."""
    noise_scheduler = SCHEDULERS[name]
    stored, labels = clean_samples(12)
    targets, said = StableTargets(stored, labels[:, :0], count=100), []

    def asked_for(sample, noise, *others):
        clean, left = targets(sample, noise, *others)
        said.append((clean, left))
        return clean, left

    monkeypatch.setattr("hwdiffusion.pipelines.num_label_classes", lambda config: 0)
    monkeypatch.setattr("hwdiffusion.pipelines.unet_conditioning", lambda config, tokens: {})
    args = parse("train_ddpm", ["--preset", preset, "--stable_targets", "100"]).args
    loss_of = train_ddpm.denoising_loss(noise_scheduler, None, args, 12, asked_for)

    def unet(noisy, timesteps, return_dict):
        ((clean, left),) = said
        alpha, sigma = levels(noise_scheduler, timesteps, noisy)
        torch.testing.assert_close(alpha * clean + sigma * left, noisy, rtol=0, atol=1e-5)
        return (prediction_target(noise_scheduler, clean, left, timesteps),)

    assert loss_of(unet, stored[:, 0], labels, Draws(0, 0, torch.arange(12))) < 1e-9
    assert (said[0][0] - stored[:, 0]).square().mean() > 0.1
    with pytest.raises(ValueError, match="stable_targets must be given"):
        train_ddpm.denoising_loss(noise_scheduler, None, args, 12)


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
@pytest.mark.parametrize("count", ["4", "64"])  # a part of the pictures of a label, and all
def test_a_run_by_stable_targets_has_a_lower_loss_and_continues_exactly(script, count, preset, tmp_path):
    argv = ["--preset", preset, "--gradient_accumulation_steps", "2", "--checkpointing_steps", "1"]
    if script == "train_ldm":
        argv += ["--image_memory_gb", "0.001"]
    losses = {}
    for flag in ("0", count):
        run = tmp_path / flag
        flags = ["--output_dir", str(run), "--stable_targets", flag]
        assert MAIN[script]([*argv, *flags, "--max_train_steps", "3"]) == 0
        losses[flag] = read_metrics(run / "metrics.jsonl")[0]["loss"]
    assert 0 < losses[count] < losses["0"]
    broken = tmp_path / "broken"
    argv += ["--output_dir", str(broken), "--stable_targets", count]
    assert MAIN[script]([*argv, "--max_train_steps", "2", "--lr_scheduler", "constant"]) == 0
    assert MAIN[script]([*argv, "--max_train_steps", "3", "--lr_scheduler", "constant"]) == 0
    whole = tmp_path / "whole"
    argv[argv.index(str(broken))] = str(whole)
    assert MAIN[script]([*argv, "--max_train_steps", "3", "--lr_scheduler", "constant"]) == 0
    assert_identical(final_state(broken), final_state(whole))


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_stable_targets_are_refused_where_they_cannot_be_had(script, preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run")]
    for flags, said in (
        (["--stable_targets", "-1"], "--stable_targets must be at least 0, not -1"),
        (["--stable_targets", "64", "--streaming"], "which --streaming hasn't; give --stable_targets 0"),
        (["--stable_targets", "64", "--image_memory_gb", "0"], "GiB, more than --image_memory_gb 0; raise that"),
    ):
        assert MAIN[script]([*argv, *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [train_ddpm, train_ldm])
def test_a_loss_of_the_users_takes_no_stable_targets(script, preset, tmp_path):
    name = script.__name__.rsplit(".", 1)[-1]
    config = parse(name, ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--stable_targets", "8"])
    with pytest.raises(InputError, match="is for the usual loss, not for one that make_loss makes"):
        script.train(config, train_ddpm.denoising_loss)
    assert not (tmp_path / "run").exists()
