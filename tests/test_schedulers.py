"""The Langevin sampler, where everything about it is known: on a Gaussian."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import make_pipeline, seeds

from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.schedulers import AnnealedLangevinScheduler, langevin_step


MEAN, DEVIATION = 0.8, 0.5


def levels(scheduler, timestep) -> tuple[float, float]:
    alpha_squared = float(scheduler.alphas_cumprod[int(timestep)])
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5


def true_output(scheduler, sample, timestep, prediction_type="epsilon"):
    """What a perfect model says of a noisy sample of data N(MEAN, DEVIATION²)."""
    alpha, sigma = levels(scheduler, timestep)
    variance = alpha**2 * DEVIATION**2 + sigma**2
    noise = sigma * (sample - alpha * MEAN) / variance  # -σ score
    clean = (sample - sigma * noise) / alpha
    return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[prediction_type]


def make(**settings) -> AnnealedLangevinScheduler:
    settings = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, **settings}
    return AnnealedLangevinScheduler(**settings)


def run(scheduler, sample, steps, generator=None, eta=0.0, prediction_type="epsilon"):
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        output = true_output(scheduler, sample, timestep, prediction_type)
        sample = scheduler.step(output, timestep, sample, eta=eta, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_correction_is_the_langevin_step(prediction_type):
    scheduler = make(prediction_type=prediction_type, step_size=0.3)
    scheduler.set_timesteps(5)
    timestep, sample = scheduler.timesteps[0], torch.randn(4, 1, 8, 8)
    alpha, sigma = levels(scheduler, timestep)
    score = -(sample - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    delta = 0.3 * sigma**2
    output = true_output(scheduler, sample, timestep, prediction_type)
    actual = scheduler.step(output, timestep, sample, generator=torch.Generator().manual_seed(7)).prev_sample
    torch.testing.assert_close(actual, sample + delta / 2 * score + delta**0.5 * noise, atol=1e-4, rtol=1e-4)


def test_many_corrections_at_one_level_end_in_the_closed_form():
    """On a Gaussian of variance V the chain is x' = (1 - δ/2V)(x - m) + m + √δ z: an AR(1) process, whose variance
    goes to V / (1 - δ/4V), wherever it began."""
    steps, step_size = 200, 0.4
    scheduler = make(num_corrector_steps=steps, step_size=step_size)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[5 * (steps + 1)]
    scheduler.set_begin_index(5 * (steps + 1))
    alpha, sigma = levels(scheduler, timestep)
    variance, delta = alpha**2 * DEVIATION**2 + sigma**2, step_size * sigma**2
    sample = torch.full((1, 1, 200, 200), 5.0)
    mean, spread = 5.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        output = true_output(scheduler, sample, timestep)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        shrink = 1 - delta / (2 * variance)
        mean, spread = alpha * MEAN + shrink * (mean - alpha * MEAN), shrink**2 * spread + delta
    assert spread == pytest.approx(variance / (1 - delta / (4 * variance)), rel=1e-6)
    count = sample.numel()
    assert sample.mean().item() == pytest.approx(mean, abs=5 * (spread / count) ** 0.5)
    assert sample.var().item() == pytest.approx(spread, rel=5 * (2 / count) ** 0.5)


def test_the_signal_to_noise_rule_holds_for_every_sample():
    """‖δ/2 score‖ = snr ‖√δ z‖, of each sample by itself (Song et al. 2021, algorithm 4)."""
    scheduler = make(snr=0.2)
    score, noise = torch.randn(5, 2, 4, 4) * torch.tensor([0.1, 1, 5, 20, 3]).view(5, 1, 1, 1), torch.randn(5, 2, 4, 4)
    delta = scheduler._delta(score, noise, sigma=0.7)
    zero = torch.zeros_like(score)
    drift, diffusion = langevin_step(zero, score, zero, delta), langevin_step(zero, zero, noise, delta)
    ratio = drift.flatten(1).norm(dim=1) / diffusion.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((5,), 0.2))


@pytest.mark.parametrize(
    "settings, steps, eta",
    [
        ({"snr": 0.1}, 100, 0.0),
        ({"snr": 0.1}, 100, 1.0),
        ({"snr": 0.1, "num_corrector_steps": 2, "prediction_type": "v_prediction"}, 50, 0.0),
        ({"snr": 0.3, "predictor": None, "num_corrector_steps": 4}, 50, 0.0),
    ],
)
def test_from_noise_it_ends_in_the_data(settings, steps, eta):
    scheduler = make(**settings)
    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    data = run(scheduler, noise, steps, generator, eta, settings.get("prediction_type", "epsilon"))
    assert data.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert data.std().item() == pytest.approx(DEVIATION, abs=0.04)


def test_between_corrections_it_is_ddim():
    """With corrections of no size what is left are DDIM's steps."""
    ddim = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    noise = torch.randn(2, 1, 8, 8)
    ddim.set_timesteps(10)
    expected = noise
    for timestep in ddim.timesteps:
        expected = ddim.step(true_output(ddim, expected, timestep), timestep, expected).prev_sample
    actual = run(AnnealedLangevinScheduler.from_config(ddim.config, step_size=1e-12), noise, 10)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"predictor": "euler"}, {"num_corrector_steps": 0}, {"snr": 0}, {"step_size": -1}]
)
def test_settings_that_make_no_sampler_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        make(**settings)


def test_a_pipeline_is_saved_with_the_scheduler_it_is_derived_from(tmp_path, caplog):
    """Nobody else could load it; its base is a stock class, and the pipeline in memory keeps what it has."""
    import diffusers

    pipe = make_pipeline("pixel")
    config = dict(pipe.scheduler.config)
    pipe.scheduler = AnnealedLangevinScheduler.from_config(pipe.scheduler.config)
    pipe(labels=[1], generator=seeds(0))
    diffusers.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        pipe.save_pretrained(tmp_path)
    diffusers.logging.disable_propagation()
    assert "the pipeline is saved with a DDIMScheduler" in caplog.text
    assert type(pipe.scheduler) is AnnealedLangevinScheduler
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is DDIMScheduler
    assert {key: loaded.config[key] for key in config if not key.startswith("_")} == {
        key: value for key, value in config.items() if not key.startswith("_")
    }
