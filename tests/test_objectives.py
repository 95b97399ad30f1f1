import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hwdiffusion.objectives import (
    PREDICTION_TYPES,
    add_noise,
    diffusion_loss,
    draw_timesteps,
    min_snr_weights,
    prediction_target,
)
from hwdiffusion.randomness import Draws


def scheduler(prediction_type: str, **options) -> DDPMScheduler:
    options = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, **options}
    return DDPMScheduler(prediction_type=prediction_type, **options)


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = Draws(0, 0, torch.arange(count))
    return draws.normal("sample", (2, 4, 4)).double(), draws.normal("noise", (2, 4, 4)).double()


def coefficients(noise_scheduler, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = noise_scheduler.alphas_cumprod[timesteps].double()[:, None, None, None]
    return alphas.sqrt(), (1 - alphas).sqrt()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timestep", [0, 100, 500, 900])
def test_a_sampler_that_is_given_the_target_finds_the_sample(prediction_type, timestep):
    noise_scheduler = scheduler(prediction_type)
    sampler = DDIMScheduler.from_config(noise_scheduler.config)
    sampler.set_timesteps(1000)
    sample, noise = samples(4)
    timesteps = torch.full((4,), timestep)
    noisy = noise_scheduler.add_noise(sample, noise, timesteps)
    target = prediction_target(noise_scheduler, sample, noise, timesteps)
    found = sampler.step(target, timestep, noisy).pred_original_sample
    torch.testing.assert_close(found, sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_sampler_that_is_given_the_target_finds_the_sample_at_zero_terminal_snr(prediction_type):
    noise_scheduler = scheduler(prediction_type, rescale_betas_zero_snr=True)
    assert noise_scheduler.alphas_cumprod[-1] == 0
    sampler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(10)
    sample, noise = samples(4)
    timesteps = torch.full((4,), 999)
    noisy = noise_scheduler.add_noise(sample, noise, timesteps)
    target = prediction_target(noise_scheduler, sample, noise, timesteps)
    torch.testing.assert_close(sampler.step(target, 999, noisy).pred_original_sample, sample, rtol=0, atol=1e-5)


def test_an_unknown_prediction_type_is_refused():
    sample, noise = samples(1)
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="epsilon.*flow"):
        prediction_target(noise_scheduler, sample, noise, torch.tensor([3]))


def losses_of_one_clean_error(snr_gamma: float | None) -> tuple[dict[str, float], float]:
    """The loss of each parametrisation where all of them err by the same in the clean sample; and by the paper."""
    sample, noise = samples(8)
    error = Draws(0, 1, torch.arange(8)).normal("error", (2, 4, 4)).double()
    timesteps = torch.tensor([20, 100, 200, 300, 400, 500, 700, 850])  # SNR above and below gamma
    losses = {}
    for prediction_type in PREDICTION_TYPES:
        noise_scheduler = scheduler(prediction_type)
        alpha, sigma = coefficients(noise_scheduler, timesteps)
        noisy = alpha * sample + sigma * noise
        wrong_sample = sample + error
        wrong_noise = (noisy - alpha * wrong_sample) / sigma
        output = {
            "epsilon": wrong_noise,
            "sample": wrong_sample,
            "v_prediction": alpha * wrong_noise - sigma * wrong_sample,
        }[prediction_type]
        losses[prediction_type] = diffusion_loss(noise_scheduler, output, sample, noise, timesteps, snr_gamma).item()
    weights = ((alpha / sigma) ** 2).clamp(max=snr_gamma)
    return losses, (weights * error**2).mean().item()


def test_min_snr_weighs_the_same_clean_error_alike_in_all_parametrisations():
    losses, expected = losses_of_one_clean_error(snr_gamma=5.0)
    assert losses == pytest.approx(dict.fromkeys(PREDICTION_TYPES, expected), rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_stays_finite_at_zero_terminal_snr(prediction_type):
    noise_scheduler = scheduler(prediction_type, rescale_betas_zero_snr=True)
    weights = min_snr_weights(noise_scheduler, torch.arange(1000), snr_gamma=5.0)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    sample, noise = samples(2)
    output = torch.ones_like(sample, requires_grad=True)
    diffusion_loss(noise_scheduler, output, sample, noise, torch.tensor([999, 0]), 5.0).backward()
    assert output.grad.isfinite().all()


def test_an_unweighted_loss_is_the_mean_squared_error():
    noise_scheduler = scheduler("v_prediction")
    sample, noise = samples(4)
    timesteps = torch.tensor([1, 200, 600, 999])
    target = noise_scheduler.get_velocity(sample, noise, timesteps)
    output = torch.zeros_like(sample)
    loss = diffusion_loss(noise_scheduler, output, sample, noise, timesteps)
    assert loss.item() == pytest.approx(F.mse_loss(output, target).item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, 50])
def test_stratified_timesteps_fall_one_into_each_stratum(size):
    for step in range(50):
        timesteps = draw_timesteps(Draws(0, step, torch.arange(size)), DDPMScheduler(), "stratified", size)
        assert torch.equal(timesteps // (1000 // size), torch.arange(size))


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_processes_draw_their_slices_of_the_timesteps(sampling):
    whole = draw_timesteps(Draws(0, 5, torch.arange(32)), DDPMScheduler(), sampling, 32)
    parts = [
        draw_timesteps(Draws(0, 5, torch.arange(start, start + 16)), DDPMScheduler(), sampling, 32)
        for start in (0, 16)
    ]
    assert torch.equal(torch.cat(parts), whole)


def timesteps_of_a_run(noise_scheduler, sampling: str, size: int = 4, steps: int = 400) -> torch.Tensor:
    """What a step of `size` samples draws, `(steps, size)`."""
    draws = (Draws(0, step, torch.arange(size)) for step in range(steps))
    return torch.stack([draw_timesteps(drawn, noise_scheduler, sampling, size) for drawn in draws])


@pytest.mark.parametrize("sampling, steps_of_a_part", [("stratified", 10), ("uniform", 40)])
def test_timesteps_are_uniform_over_a_run(sampling, steps_of_a_part):
    drawn = torch.stack(
        [draw_timesteps(Draws(0, step, torch.arange(4)), DDPMScheduler(40), sampling, 4) for step in range(400)]
    )
    counts = torch.bincount(drawn.reshape(-1) % steps_of_a_part, minlength=steps_of_a_part)
    assert drawn.unique().tolist() == list(range(40))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_uniform_timesteps_are_independent_of_their_place():
    drawn = torch.stack(
        [draw_timesteps(Draws(0, step, torch.arange(4)), DDPMScheduler(), "uniform", 4) for step in range(400)]
    )
    correlation = torch.corrcoef(drawn.double().T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 400**0.5
    assert (drawn.double().mean(dim=0) - 499.5).abs().max() < 4 * (1000**2 / 12 / 400) ** 0.5


# -- flows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_sampler_takes_a_sample_of_any_noise_straight_to_the_end(shift):
    """One step of Euler from σ to 0 by the target is exact: the path is a straight line."""
    noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sample, noise = samples(4)
    timesteps = draw_timesteps(Draws(0, 0, torch.arange(4)), noise_scheduler, "stratified", 4)
    noisy = add_noise(noise_scheduler, sample, noise, timesteps)
    target = prediction_target(noise_scheduler, sample, noise, timesteps)
    sampler = FlowMatchEulerDiscreteScheduler()
    for index, timestep in enumerate(timesteps.tolist()):
        sampler.set_timesteps(sigmas=[timestep / 1000])
        found = sampler.step(target[index : index + 1], sampler.timesteps[0], noisy[index : index + 1]).prev_sample
        torch.testing.assert_close(found, sample[index : index + 1], rtol=0, atol=1e-5)


def test_a_flows_timesteps_reach_pure_noise_and_never_none():
    drawn = timesteps_of_a_run(FlowMatchEulerDiscreteScheduler(), "stratified", size=64)
    assert drawn.dtype == torch.float32 and 0 < drawn.min() < 1 and 999 < drawn.max() <= 1000
    assert scipy.stats.kstest(drawn.flatten().numpy() / 1000, "uniform").pvalue > 1e-3


def test_a_flows_shift_is_that_of_its_sampler():
    """Its sampler moves σ to s σ / (1 + (s - 1) σ) (Esser et al. 2024, eq. 23): training sees the same levels."""
    draws = Draws(0, 3, torch.arange(16))
    plain, shifted = (
        draw_timesteps(draws, FlowMatchEulerDiscreteScheduler(shift=shift), "uniform", 16) for shift in (1.0, 3.0)
    )
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.set_timesteps(sigmas=(plain / 1000).tolist())
    torch.testing.assert_close(shifted, sampler.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("noise_scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_logit_normal_timesteps_have_the_logistic_of_a_normal(noise_scheduler):
    drawn = timesteps_of_a_run(noise_scheduler, "logit_normal", size=64)
    unit = (drawn.double().flatten() + (0.5 if drawn.dtype == torch.int64 else 0)) / 1000
    assert scipy.stats.kstest(torch.logit(unit.clamp(1e-6, 1 - 1e-6)).numpy(), "norm").pvalue > 1e-3


def test_min_snr_weighs_a_flows_error_as_that_of_the_clean_sample():
    noise_scheduler, gamma = FlowMatchEulerDiscreteScheduler(), 5.0
    sample, noise = samples(4)
    error = Draws(0, 1, torch.arange(4)).normal("error", (2, 4, 4)).double()
    timesteps = torch.tensor([50.0, 200.0, 500.0, 1000.0])
    sigma = (timesteps / 1000)[:, None, None, None].double()
    wrong = (noise - sample) - error / sigma  # errs by `error` in the clean sample x - σ v
    snr = ((1 - sigma) / sigma) ** 2
    expected = (snr.clamp(max=gamma) * error**2).mean().item()
    assert diffusion_loss(noise_scheduler, wrong, sample, noise, timesteps, gamma).item() == pytest.approx(expected)
