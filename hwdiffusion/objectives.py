"""What the UNet predicts, how timesteps are drawn and how they are weighted."""

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from hwdiffusion.randomness import Draws


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def draw_timesteps(draws: Draws, num_train_timesteps: int, sampling: str, step_size: int) -> torch.Tensor:
    """Timesteps `(B,)`, int64 in [0, T).

    With `sampling="stratified"` sample i of a step's n samples falls into the i-th of n equal parts of [0, T), so that
    every step sees the whole schedule and the loss is less noisy (as Kingma et al. 2021, appendix I.1, but jittered
    independently); each is still uniform over a run. With `"uniform"` they are independent.

    Args:
        step_size: n, the samples of a step over all processes and micro-batches.
    """
    unit = draws.uniform("timestep")  # (B,)
    if sampling == "stratified":
        unit = (draws.samples + unit) / step_size
    return (unit * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def prediction_target(noise_scheduler, sample, noise, timesteps) -> torch.Tensor:
    """What the UNet is to say about a noisy sample, by the scheduler's `prediction_type`; `(B, C, H, W)`."""
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return sample
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(sample, noise, timesteps)
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, not {prediction_type!r}")


def min_snr_weights(noise_scheduler, timesteps, snr_gamma: float) -> torch.Tensor:
    """min-SNR-γ weights `(B,)` of the squared error of the prediction (Hang et al. 2023, section 3.4).

    The paper's weight min(SNR, γ) is that of an error in the clean sample; an error in ε counts SNR times less, one in
    v SNR + 1 times less.
    """
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
