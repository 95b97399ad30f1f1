import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from running import MAIN, read_metrics

from hwdiffusion import InputError
from hwdiffusion.config import parse
from hwdiffusion.objectives import add_noise, levels
from hwdiffusion.randomness import Draws
from hwdiffusion.stable_targets import StableTargets
from hwdiffusion.train_scripts import train_ddpm


SCHEDULERS = {
    "ddpm": DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "zero terminal SNR": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
}


def clean_samples(count: int, views: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of three sets of labels, one of them of two labels."""
    sample = Draws(1, 0, torch.arange(count)).normal("sample", (views, 2, 3, 3))
    sets = torch.tensor([[0, -1], [1, -1], [0, 1]])
    return sample, sets[torch.arange(count) % 3]


def noisy_ones(noise_scheduler, sample, timestep: float, step: int = 0):
    draws = Draws(0, step, torch.arange(len(sample)))
    timesteps = torch.full((len(sample),), timestep)
    timesteps = timesteps if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler) else timesteps.long()
    noisy = add_noise(noise_scheduler, sample, draws.normal("noise", sample.shape[1:]), timesteps)
    return noisy, timesteps, draws


def by_the_formula(noise_scheduler, views, labels, noisy, of_labels, timesteps) -> torch.Tensor:
    """E[x | z, labels], one sample after the other, in float64."""
    alpha, sigma = (level.double() for level in levels(noise_scheduler, timesteps, noisy))
    means = []
    for i in range(len(noisy)):
        group = views[(labels == of_labels[i]).all(dim=1)].flatten(0, 1).double()
        distance = (noisy[i].double() - alpha[i] * group).square().sum(dim=(1, 2, 3))
        weights = (-distance / (2 * sigma[i].flatten() ** 2)).softmax(dim=0)
        means.append((weights[:, None, None, None] * group).sum(dim=0))
    return torch.stack(means).float()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("timestep", [20.0, 400.0, 700.0, 999.0])
@pytest.mark.parametrize("views", [1, 2])
def test_the_clean_sample_is_the_mean_over_those_of_the_labels(name, timestep, views):
    noise_scheduler = SCHEDULERS[name]
    stored, labels = clean_samples(30, views)
    chosen = torch.tensor([3, 17, 8, 4, 29, 0])
    sample = stored[chosen, views - 1]
    noisy, timesteps, draws = noisy_ones(noise_scheduler, sample, timestep)
    targets = StableTargets(stored, labels, count=100)
    clean, noise = targets(noise_scheduler, sample, noisy, labels[chosen], timesteps, draws)
    expected = by_the_formula(noise_scheduler, stored, labels, noisy, labels[chosen], timesteps)
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-4)
    alpha, sigma = levels(noise_scheduler, timesteps, noisy)
    torch.testing.assert_close(alpha * clean + sigma * noise, noisy, rtol=0, atol=1e-5)
    if timestep == 20:
        torch.testing.assert_close(clean, sample, rtol=0, atol=1e-3)  # nothing else it may come from
    if timestep == 999:
        assert (clean - sample).square().mean() > 0.5


def test_autocast_leaves_the_weights_their_digits():
    noise_scheduler = SCHEDULERS["ddpm"]
    stored, labels = clean_samples(30)
    noisy, timesteps, draws = noisy_ones(noise_scheduler, stored[:, 0], 500)
    targets = StableTargets(stored, labels, count=100)
    given = (noise_scheduler, stored[:, 0], noisy, labels, timesteps, draws)
    with torch.autocast("cpu", torch.bfloat16):
        there = targets(*given)
    for ours, plain in zip(there, targets(*given)):
        assert ours.dtype == torch.float32 and torch.equal(ours, plain)


def test_a_part_of_many_is_another_in_each_step_and_has_the_sample_itself():
    noise_scheduler = SCHEDULERS["ddpm"]
    stored, labels = clean_samples(1500)
    sample, of_labels = stored[:6, 0], labels[:6]
    part, whole = (StableTargets(stored, labels, count) for count in (100, 500))
    noisy, timesteps, draws = noisy_ones(noise_scheduler, sample, 20)
    torch.testing.assert_close(part(noise_scheduler, sample, noisy, of_labels, timesteps, draws)[0], sample,
                               rtol=0, atol=1e-3)  # fmt: skip
    noisy, timesteps, _ = noisy_ones(noise_scheduler, sample, 950)
    means = []
    for step in range(200):
        draws = Draws(0, step, torch.arange(6))
        (mean, _), (again, _) = (part(noise_scheduler, sample, noisy, of_labels, timesteps, draws) for _ in range(2))
        assert torch.equal(mean, again)
        means.append(mean)
    assert not torch.allclose(means[0], means[1], rtol=0, atol=1e-2)
    of_all = whole(noise_scheduler, sample, noisy, of_labels, timesteps, draws)[0]
    assert (means[0] - of_all).square().mean() < 0.1 * (sample - of_all).square().mean()
    assert (torch.stack(means).mean(dim=0) - of_all).square().mean() < 0.2 * (means[0] - of_all).square().mean()


def test_a_batch_cut_into_parts_has_the_same_targets():
    noise_scheduler = SCHEDULERS["ddpm"]
    stored, labels = clean_samples(1500)
    noisy, timesteps, _ = noisy_ones(noise_scheduler, stored[:8, 0], 800)
    targets = StableTargets(stored, labels, count=100)
    whole, _ = targets(noise_scheduler, stored[:8, 0], noisy, labels[:8], timesteps, Draws(0, 3, torch.arange(8)))
    for part in (slice(0, 4), slice(4, 8)):
        draws = Draws(0, 3, torch.arange(8)[part])
        given = (stored[part, 0], noisy[part], labels[part], timesteps[part], draws)
        torch.testing.assert_close(targets(noise_scheduler, *given)[0], whole[part], rtol=0, atol=1e-5)


def test_pictures_without_labels_are_one_group():
    noise_scheduler = SCHEDULERS["ddpm"]
    stored, labels = clean_samples(12)[0], torch.zeros(12, 0, dtype=torch.int64)
    noisy, timesteps, draws = noisy_ones(noise_scheduler, stored[:, 0], 999)
    clean, _ = StableTargets(stored, labels, count=100)(noise_scheduler, stored[:, 0], noisy, labels, timesteps, draws)
    expected = by_the_formula(noise_scheduler, stored, labels, noisy, labels, timesteps)
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_a_run_by_stable_targets_has_a_lower_loss_from_the_first_step(script, preset, tmp_path):
    argv = ["--preset", preset, "--max_train_steps", "2", "--random_flip"]
    losses = {}
    for count in ("0", "64"):
        run = tmp_path / count
        assert MAIN[script]([*argv, "--output_dir", str(run), "--stable_targets", count]) == 0
        losses[count] = read_metrics(run / "metrics.jsonl")[0]["loss"]
    assert 0 < losses["64"] < losses["0"]


@pytest.mark.parametrize("script", ["train_ddpm", "train_ldm"])
def test_stable_targets_are_refused_where_they_cannot_be_had(script, preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run")]
    for flags, said in (
        (["--stable_targets", "-1"], "--stable_targets must be at least 0, not -1"),
        (["--stable_targets", "64", "--streaming"], "--streaming hasn't"),
    ):
        assert MAIN[script]([*argv, *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_of_the_users_takes_no_stable_targets(preset, tmp_path):
    config = parse("train_ddpm", ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--stable_targets", "8"])
    with pytest.raises(InputError, match="not for one of make_loss"):
        train_ddpm.train(config, train_ddpm.denoising_loss)
    assert not (tmp_path / "run").exists()
