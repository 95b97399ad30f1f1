"""Tiny pipelines of every kind that training makes, with random weights."""

import torch
from conftest import PROJECTION, TINY_GENERATOR, TINY_UNET, TINY_VQVAE, TOKENS
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import ResNetForImageClassification

from hwdiffusion.models import build_classifier, build_generator, build_unet, build_vqvae, latent_shape
from hwdiffusion.pipelines import ClassConditionalGANPipeline, ClassConditionalPipeline, noise_schedule


NAMES = {0: "cat", 1: "dog", 2: "wild"}
AUTOENCODERS = ("VQModel", "AutoencoderKL", "AutoencoderTiny")
KINDS = ("pixel", "latent", "tokens", "unconditional", "odd")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def make_autoencoder(name: str, channels: int = 1, seed: int = 0):
    """One of `AUTOENCODERS` with random weights; its latents are half as high and wide, and off centre."""
    torch.manual_seed(seed)
    shared = {"in_channels": channels, "out_channels": channels, "latent_channels": 3}
    if name == "AutoencoderTiny":
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        return AutoencoderTiny(**shared, **blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    if name == "AutoencoderKL":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(**shared, **blocks, block_out_channels=(8, 16), norm_num_groups=4).eval()
        with torch.no_grad():
            vae.quant_conv.bias[:3] += 2.0
        return vae
    vqvae = build_vqvae({**TINY_VQVAE, "latent_channels": 3}, channels, (16, 16)).eval()
    with torch.no_grad():
        vqvae.quantize.embedding.weight.normal_().add_(2.0)
        vqvae.quant_conv.bias += 2.0
    return vqvae


def make_unet(kind: str, shape=(1, 8, 8), seed: int = 0):
    torch.manual_seed(seed)
    odd = {"up_block_types": ["UpBlock2D", "UpBlock2D"]} if kind == "odd" else {}
    section = {**TINY_UNET, **odd, **({} if kind == "unconditional" else TOKENS if kind == "tokens" else PROJECTION)}
    return build_unet(section, shape, 0 if kind == "unconditional" else len(NAMES)).eval()


def make_pipeline(kind: str = "latent", prediction_type: str = "v_prediction", **config) -> ClassConditionalPipeline:
    """Pixels with the label projected, latents, pixels with the label's token, no labels, or an odd size."""
    torch.manual_seed(0)
    vqvae, shape = None, (3, 7, 9) if kind == "odd" else (1, 8, 8)
    if kind == "latent":
        vqvae = build_vqvae(TINY_VQVAE, 1, (16, 16)).eval()
        vqvae.register_to_config(scaling_factor=1.7)
        shape = latent_shape(vqvae, (16, 16))
    if prediction_type == "flow_prediction":
        scheduler = FlowMatchEulerDiscreteScheduler()
    else:
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction_type,
            clip_sample=False,
            timestep_spacing="leading" if prediction_type == "epsilon" else "trailing",
        )
    labelled = {} if kind == "unconditional" else {"id2label": NAMES, "has_null_label": True}
    pipe = ClassConditionalPipeline(
        unet=make_unet(kind, shape),
        scheduler=scheduler,
        vqvae=vqvae,
        prediction_type=prediction_type,
        **{**labelled, "default_num_inference_steps": 4, **config},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_gan(shape=(1, 8, 8), names=NAMES, max_labels: int = 1, **section) -> ClassConditionalGANPipeline:
    torch.manual_seed(0)
    generator = build_generator({**TINY_GENERATOR, **section}, shape, len(names)).eval()
    for module in generator.modules():
        if hasattr(module, "modulation") and module.modulation is not None:  # which starts at zero
            torch.nn.init.normal_(module.modulation.weight)
    return ClassConditionalGANPipeline(generator, names, max_labels)


def make_classifier(pipe: ClassConditionalPipeline, names=NAMES, **contract) -> ResNetForImageClassification:
    """A noise-aware classifier that fits a pipeline, but for what the contract says."""
    torch.manual_seed(1)
    channels, *size = pipe._latent_shape()
    contract = {
        "noise_aware": True,
        "latent": pipe.vqvae is not None,
        "noise_schedule": noise_schedule(pipe.scheduler.config, pipe.config.prediction_type),
        **contract,
    }
    section = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    channels = contract.pop("num_channels", channels + 1)
    return build_classifier(section, channels, tuple(size), list(names.values()), **contract).eval()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def ask(kind, *labels):
    """What draws a picture of each label; without labels, as many pictures."""
    return {"num_images_per_prompt": len(labels)} if kind == "unconditional" else {"labels": list(labels)}
