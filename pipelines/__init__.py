"""Pipelines: one self-contained file each, which is also shipped inside every repository that they save."""

from hwdiffusion.pipelines.class_conditional import (
    ClassConditionalPipeline,
    classifier_inputs,
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


__all__ = [
    "ClassConditionalPipeline",
    "classifier_inputs",
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
    "unet_conditioning",
    "unscale_latents",
]
