"""Few-step students: consistency distillation of a diffusion model.

A student f(z_t, t) says from any point of a path of the teacher's probability-flow ODE where the path ends, so that
one evaluation leads from noise to data, and two to four do it well (Song et al. 2023; on latents, with the guidance
distilled along, Luo et al. 2023). Two neighbouring points must be told the same end:

    loss = d(f(z_t, t), f⁻(ẑ_s, s)),    s < t,

where ẑ_s is where one DDIM step of the guided teacher leads from z_t, and f⁻ is the student without gradients.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)

from hwdiffusion.objectives import FLOW_PREDICTION, is_flow, levels, prediction_type_of, shift_of
from hwdiffusion.pipelines import ClassConditionalPipeline, predict_clean, unet_conditioning


TIMESTEP_SCALING = 10.0  # of the boundary condition; also diffusers' default
SIGMA_DATA = 0.5  # which LCMScheduler has fixed


def training_scheduler(teacher: ClassConditionalPipeline):
    """The scheduler that a pipeline was trained by: its own may be any that samples it."""
    if teacher.config.prediction_type == FLOW_PREDICTION:
        config = teacher.scheduler.config
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift_of(config))
    return DDPMScheduler.from_config(teacher.scheduler.config, prediction_type=teacher.config.prediction_type)


def least_signal(noise_scheduler) -> float:
    """α at the noisiest timestep: how much of a sample is left in it; of a flow 0."""
    return 0.0 if is_flow(noise_scheduler) else float(noise_scheduler.alphas_cumprod[-1].sqrt())


def build_student(teacher: ClassConditionalPipeline, noise_scheduler, args) -> ClassConditionalPipeline:
    """A pipeline whose UNet starts as its teacher's, with the stock scheduler that samples students."""
    config = {key: value for key, value in teacher.unet.config.items() if key != "_name_or_path"}  # of this machine
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(teacher.unet.state_dict())
    if is_flow(noise_scheduler):
        scheduler = FlowMatchLCMScheduler.from_config(noise_scheduler.config)
    else:
        scheduler = LCMScheduler.from_config(
            noise_scheduler.config,
            original_inference_steps=args.num_ddim_timesteps,
            timestep_scaling=TIMESTEP_SCALING,
            clip_sample=False,
        )
    return ClassConditionalPipeline(
        unet=unet,
        scheduler=scheduler,
        vqvae=teacher.vqvae,
        id2label=teacher.id2label,
        prediction_type=teacher.config.prediction_type,
        has_null_label=False,  # it knows one guidance, its teacher's
        max_labels=teacher.config.max_labels,
        default_guidance_scale=1.0,
        default_num_inference_steps=args.num_inference_steps,
    )


def consistency(noise_scheduler, model_output, sample, timesteps) -> torch.Tensor:
    """f(z_t, t): the end of the path that a student's output says; all `(B, C, H, W)`, timesteps `(B,)`.

    f = c_skip(t) z_t + c_out(t) clean(z_t, t), with c_skip(0) = 1 and c_out(0) = 0, so f(z_0, 0) = z_0 (Luo et al.
    2023, eq. 7); these are the scalings that LCMScheduler steps by. Of flows clean = z - σ v has that by itself.
    """
    alpha, sigma = levels(noise_scheduler, timesteps, sample)  # (B, 1, 1, 1) each
    clean = predict_clean(model_output, sample, alpha, sigma, prediction_type_of(noise_scheduler))
    if is_flow(noise_scheduler):
        return clean
    scaled = timesteps.to(sample)[:, None, None, None] * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return skip * sample + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * clean


def ddim_step(noise_scheduler, model_output, sample, timesteps, earlier) -> torch.Tensor:
    """ẑ_s: where DDIM with η = 0 (Song et al. 2021, eq. 12), of flows the Euler step, leads from z_t.

    Args:
        timesteps, earlier: t and s, `(B,)`, with s ≤ t.
    """
    alpha, sigma = levels(noise_scheduler, timesteps, sample)
    clean = predict_clean(model_output, sample, alpha, sigma, prediction_type_of(noise_scheduler))
    noise = (sample - alpha * clean) / sigma.clamp(min=1e-8)
    alpha, sigma = levels(noise_scheduler, earlier, sample)
    there = alpha * clean + sigma * noise
    return torch.where((earlier == timesteps)[:, None, None, None], sample, there)


def pseudo_huber(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """√(‖a - b‖² + c²) - c with c = 0.00054 √d (Song and Dhariwal 2024, section 3.4), over √d; a scalar."""
    dimension = ours[0].numel()
    squared = (ours.float() - theirs.float()).square().flatten(1).sum(dim=1)  # (B,)
    c = 0.00054 * math.sqrt(dimension)
    return ((squared + c**2).sqrt() - c).mean() / math.sqrt(dimension)


def steps_done(scheduler_config, timesteps: torch.Tensor) -> torch.Tensor:
    """The part of a scheduler's steps that lies before timesteps `(B,)`, in [0, 1), if they are many: they are even in
    the timesteps, of flows before these are shifted."""
    left = timesteps / scheduler_config.num_train_timesteps
    shift = shift_of(scheduler_config)
    return 1 - left / (shift - (shift - 1) * left)


@torch.no_grad()
def guided_prediction(
    teacher, sample, timesteps, tokens, guidance_scale: float, guidance_interval: Sequence[float]
) -> torch.Tensor:
    """What a pipeline's UNet says with classifier-free guidance, or with that by its `guidance_unet`; `(B, C, H, W)`.

    Args:
        sample, timesteps: `(B, C, H, W)` and `(B,)`.
        tokens: of labels, `(B, T, K)`; `None` for a UNet without labels.
        guidance_interval: the part of the steps that is guided, start and stop, in [0, 1].
    """

    def of(unet, tokens):
        return unet(sample, timesteps, **unet_conditioning(unet.config, tokens), return_dict=False)[0]

    cond = of(teacher.unet, tokens)
    if guidance_scale == 1:
        return cond
    by = (teacher.unet, torch.zeros_like(tokens)) if teacher.guidance_unet is None else (teacher.guidance_unet, tokens)
    weak = of(*by)
    done = steps_done(teacher.scheduler.config, timesteps)
    guided = (done >= guidance_interval[0]) & (done <= guidance_interval[1])
    return torch.where(guided[:, None, None, None], weak + guidance_scale * (cond - weak), cond)
