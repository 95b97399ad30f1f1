"""What the UNet predicts, how timesteps are drawn, how samples are noised by them and how they are weighted.

A `noise_scheduler` is what training is about: a `DDPMScheduler`, by whose table a timestep t of [0, T) is noised, or a
`FlowMatchEulerDiscreteScheduler`, by which a timestep T·σ with σ in (0, 1] is (1 - σ) sample + σ noise (Lipman et al.
2023; Liu et al. 2023).
"""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from hwdiffusion.randomness import Draws


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # of a DDPMScheduler
FLOW_PREDICTION = "flow_prediction"  # of a flow: noise - sample, as diffusers' solvers spell it


def is_flow(noise_scheduler) -> bool:
    return isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler)


def shift_of(scheduler_config) -> float:
    """How far a flow's timesteps are shifted to noise, which schedulers' configs call by two names."""
    return scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0))


def prediction_type_of(noise_scheduler) -> str:
    """What a UNet that is trained with it predicts."""
    return FLOW_PREDICTION if is_flow(noise_scheduler) else noise_scheduler.config.prediction_type


def draw_timesteps(draws: Draws, noise_scheduler, sampling: str, step_size: int) -> torch.Tensor:
    """Timesteps `(B,)`: int64 in [0, T), of flows float32 in (0, T].

    With `sampling="stratified"` sample i of a step's n samples falls into the i-th of n equal parts of [0, T), so that
    every step sees the whole schedule and the loss is less noisy (as Kingma et al. 2021, appendix I.1, but jittered
    independently); each is still uniform over a run. With `"uniform"` they are independent. With `"logit_normal"` they
    are stratified, and dense in the middle (Esser et al. 2024, eq. 19, with m = 0 and s = 1). A flow's `shift` moves
    them as it moves those of its sampler.

    Args:
        step_size: n, the samples of a step over all processes and micro-batches.
    """
    unit = draws.uniform("timestep")  # (B,)
    if sampling != "uniform":
        unit = ((draws.samples + unit) / step_size).clamp(max=1 - 2**-24)  # which rounding may make a 1
    if sampling == "logit_normal":
        unit = torch.sigmoid(torch.special.ndtri(unit.double().clamp(1e-9, 1 - 1e-9))).float()
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    if is_flow(noise_scheduler):
        shift, sigma = noise_scheduler.config.shift, (1 - unit).float()  # in (0, 1]
        return num_train_timesteps * shift * sigma / (1 + (shift - 1) * sigma)
    return (unit * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def add_noise(noise_scheduler, sample, noise, timesteps) -> torch.Tensor:
    """The sample `(B, C, H, W)`, noised to the timesteps `(B,)`."""
    if not is_flow(noise_scheduler):
        return noise_scheduler.add_noise(sample, noise, timesteps)
    alpha, sigma = levels(noise_scheduler, timesteps, sample)
    return alpha * sample + sigma * noise


def _flow_sigma(noise_scheduler, timesteps) -> torch.Tensor:
    return timesteps / noise_scheduler.config.num_train_timesteps


def levels(noise_scheduler, timesteps, sample) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ of noisy samples α sample + σ noise at the timesteps `(B,)`; `(B, 1, 1, 1)` each, as `sample` is."""
    if is_flow(noise_scheduler):
        sigma = _flow_sigma(noise_scheduler, timesteps).to(sample)[:, None, None, None]
        return 1 - sigma, sigma
    alpha_squared = noise_scheduler.alphas_cumprod.to(sample.device)[timesteps][:, None, None, None]
    return alpha_squared.sqrt().to(sample), (1 - alpha_squared).sqrt().to(sample)


def prediction_target(noise_scheduler, sample, noise, timesteps) -> torch.Tensor:
    """What the UNet is to say about a noisy sample; `(B, C, H, W)`."""
    prediction_type = prediction_type_of(noise_scheduler)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return sample
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(sample, noise, timesteps)
    if prediction_type == FLOW_PREDICTION:
        return noise - sample
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, not {prediction_type!r}")


def min_snr_weights(noise_scheduler, timesteps, snr_gamma: float) -> torch.Tensor:
    """min-SNR-γ weights `(B,)` of the squared error of the prediction (Hang et al. 2023, section 3.4).

    The paper's weight min(SNR, γ) is that of an error in the clean sample; an error in ε counts SNR times less, one in
    v SNR + 1 times less, and one in a flow 1/σ² times less.
    """
    if is_flow(noise_scheduler):
        sigma = _flow_sigma(noise_scheduler, timesteps).float()
        return torch.minimum((1 - sigma) ** 2, snr_gamma * sigma**2)
    snr = compute_snr(noise_scheduler, timesteps).float()
    clipped = snr.clamp(max=snr_gamma)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return torch.where(snr > 0, clipped / snr, torch.ones_like(snr))  # the limit: 0/0 at zero terminal SNR
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


def diffusion_loss(noise_scheduler, model_output, sample, noise, timesteps, snr_gamma: float | None = None):
    """The mean squared error of a prediction, optionally weighted by min-SNR; a scalar."""
    target = prediction_target(noise_scheduler, sample, noise, timesteps)
    error = F.mse_loss(model_output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if snr_gamma is not None:
        error = error * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
    return error.mean()
