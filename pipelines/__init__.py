"""Pipelines: what they import of each other is put into the one file of them that every saved repository carries."""

from hwdiffusion.pipelines.class_conditional import (
    ClassConditionalPipeline,
    can_compile,
    classifier_inputs,
    encode_labels,
    guidance_of,
    label_ids,
    label_tokens,
    latent_channels,
    noise_schedule,
    num_label_classes,
    predict_clean,
    raw_latents,
    scale_latents,
    scaled,
    slerp,
    spatial_factor,
    unet_conditioning,
    unscale_latents,
)
from hwdiffusion.pipelines.class_conditional_gan import ClassConditionalGANPipeline, truncate
from hwdiffusion.pipelines.residual_generator import ResidualGenerator


__all__ = [
    "ClassConditionalGANPipeline",
    "ClassConditionalPipeline",
    "ResidualGenerator",
    "can_compile",
    "classifier_inputs",
    "encode_labels",
    "guidance_of",
    "label_ids",
    "label_tokens",
    "latent_channels",
    "noise_schedule",
    "num_label_classes",
    "predict_clean",
    "raw_latents",
    "scale_latents",
    "scaled",
    "slerp",
    "spatial_factor",
    "truncate",
    "unet_conditioning",
    "unscale_latents",
]
