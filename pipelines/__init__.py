"""Pipelines: one self-contained file each, which is also shipped inside every repository that they save."""

from hwdiffusion.pipelines.class_conditional import (
    ClassConditionalPipeline,
    label_ids,
    label_tokens,
    num_label_classes,
    unet_conditioning,
)


__all__ = [
    "ClassConditionalPipeline",
    "label_ids",
    "label_tokens",
    "num_label_classes",
    "unet_conditioning",
]
