"""Samplers that diffusers lacks."""

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from hwdiffusion.pipelines import predict_clean


class AnnealedLangevinScheduler(DDIMScheduler):
    """Langevin corrections at every noise level, alone or between the steps of DDIM.

    At each of the levels of `set_timesteps` the sample x = α clean + σ noise takes `num_corrector_steps` steps

        x ← x + δ/2 · score(x) + √δ · z,    score(x) = -ε̂(x)/σ,    z ~ N(0, 1)

    whose stationary distribution is, for small δ, that of noisy data at that level (Song and Ermon 2019, algorithm 1).
    By default δ/2 = 2 (snr · ‖z‖/‖score‖)², which makes a step's drift `snr` times as large as its noise (Song et al.
    2021, algorithm 4), with the norms taken of each sample, so that a picture doesn't depend on its batch; the factor
    1 - β of their algorithm 5, which is one but for the noisiest levels, is left out.

    With `predictor="ddim"` a step of DDIM leads from each level to the next (predictor-corrector; `eta` is its η).
    With `predictor=None` the sample goes on to the next level as it is (annealed Langevin), and what noise is left
    after the last one is taken off by the model's prediction of the clean sample. That needs larger steps: an `snr` of
    0.4, and at least 100 of them, in few levels or in many.

    It is made from the config of any scheduler of a DDPM, and saved by a pipeline as the DDIM it is derived from.

    Args:
        num_corrector_steps: M, Langevin steps at each level, each of which takes an evaluation of the model.
        snr: r, the signal-to-noise rule's ratio.
        step_size: δ/σ² at each level, instead of that rule.
        predictor: "ddim" or `None`.
        others: of [`DDIMScheduler`].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        num_corrector_steps: int = 1,
        snr: float = 0.16,
        step_size: float | None = None,
        predictor: str | None = "ddim",
    ):
        if predictor not in ("ddim", None):
            raise ValueError(f"predictor must be 'ddim' or None, not {predictor!r}")
        if not isinstance(num_corrector_steps, int) or num_corrector_steps < 1:
            raise ValueError(f"num_corrector_steps must be a positive whole number, not {num_corrector_steps!r}")
        if not snr > 0 or not (step_size is None or step_size > 0):
            raise ValueError(f"snr and step_size must be positive, not {snr!r} and {step_size!r}")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._step_index = 0

    @property
    def order(self) -> int:
        """Evaluations of the model at each level."""
        return self.config.num_corrector_steps + (self.config.predictor is not None)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """Each of DDIM's timesteps as often as the model is evaluated at it; the last once more without predictor."""
        super().set_timesteps(num_inference_steps, device)
        timesteps = self.timesteps.repeat_interleave(self.order)
        if self.config.predictor is None:
            timesteps = torch.cat([timesteps, timesteps[-1:]])
        self.timesteps = timesteps
        self._step_index = 0
        self._alphas_squared = self.alphas_cumprod.tolist()  # so that no step waits for a device

    def set_begin_index(self, begin_index: int = 0):
        """Start at a later timestep of `timesteps`, the first of its level."""
        self._step_index = begin_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """A Langevin step, or the step to the next level; steps are to be taken in the order of `timesteps`.

        Args:
            model_output: what the UNet says of `sample`, `(B, C, H, W)`.
            eta: η of the predictor, in [0, 1].
            generator: one, or one for each sample.
        """
        index, self._step_index = self._step_index, self._step_index + 1
        if self.config.predictor is not None and index % self.order == self.order - 1:
            return super().step(model_output, timestep, sample, eta, generator=generator, return_dict=return_dict)

        alpha, sigma = self._level(int(timestep))
        clean = predict_clean(model_output, sample, alpha, sigma, self.config.prediction_type)
        if self.config.predictor is None and index == len(self.timesteps) - 1:
            return DDIMSchedulerOutput(clean, clean) if return_dict else (clean, clean)
        score = (alpha * clean - sample) / sigma**2
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        corrected = langevin_step(sample, score, noise, self._delta(score, noise, sigma))
        return DDIMSchedulerOutput(corrected, clean) if return_dict else (corrected, clean)

    def _level(self, timestep: int) -> tuple[float, float]:
        alpha_squared = self._alphas_squared[timestep]
        return max(alpha_squared, 1e-12) ** 0.5, max(1 - alpha_squared, 1e-12) ** 0.5

    def _delta(self, score, noise, sigma) -> torch.Tensor | float:
        if self.config.step_size is not None:
            return self.config.step_size * sigma**2
        ratio = noise.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1).clamp(min=1e-12)  # (B,)
        return 4 * (self.config.snr * ratio[:, None, None, None]) ** 2  # (B, 1, 1, 1)


def langevin_step(sample, score, noise, delta) -> torch.Tensor:
    """x + δ/2 · score + √δ · z, all `(B, C, H, W)`, δ a number or `(B, 1, 1, 1)`."""
    return sample + delta / 2 * score + delta**0.5 * noise
