"""Sections of a preset → stock diffusers models and schedulers, and the checks that they fit together.

What the data decides (channels, sizes, the number of classes) is filled in; what a preset says of it must agree.
"""

import difflib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from transformers import ResNetConfig, ResNetForImageClassification

from hwdiffusion import InputError
from hwdiffusion.arguments import ALL_STEPS
from hwdiffusion.objectives import FLOW_PREDICTION, PREDICTION_TYPES, is_flow, prediction_type_of, shift_of
from hwdiffusion.pipelines import (
    ClassConditionalGANPipeline,
    ClassConditionalPipeline,
    ResidualGenerator,
    latent_channels,
    num_label_classes,
    spatial_factor,
    unet_conditioning,
)
from hwdiffusion.places import is_here
from hwdiffusion.schedulers import AnnealedLangevinScheduler
from hwdiffusion.wgan import ProjectionCritic


NoiseScheduler = DDPMScheduler | FlowMatchEulerDiscreteScheduler
Autoencoder = VQModel | AutoencoderKL | AutoencoderTiny
AUTOENCODERS = {cls.__name__: cls for cls in (VQModel, AutoencoderKL, AutoencoderTiny)}


def build_vqvae(section: dict, channels: int, size: tuple[int, int]) -> VQModel:
    """A `VQModel` for pictures `(B, channels, *size)`.

    Raises:
        InputError: a key that isn't known, channels that don't fit, a size that the factor doesn't divide.
    """
    section = _completed("vqvae", section, in_channels=channels, out_channels=channels, sample_size=max(size))
    _check_keys("vqvae", section, VQModel)
    _check_norm_groups("vqvae", section)
    _check_lengths("vqvae", section, VQModel)
    check_factor(2 ** (len(section.get("block_out_channels", (64,))) - 1), size)
    return _build("vqvae", VQModel, section)


def build_unet(section: dict, sample_shape: tuple[int, int, int], num_classes: int) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` for samples `(B, *sample_shape)` and labels of `num_classes` classes.

    It takes labels if its section has `class_embed_type: simple_projection` or `encoder_hid_dim_type: text_proj`.

    Raises:
        InputError: a key that isn't known, channels or classes that don't fit.
    """
    channels, height, width = sample_shape
    size = height if height == width else [height, width]
    section = _completed("unet", section, in_channels=channels, out_channels=channels, sample_size=size)
    for kind, value, key in (
        ("class_embed_type", "simple_projection", "projection_class_embeddings_input_dim"),
        ("encoder_hid_dim_type", "text_proj", "encoder_hid_dim"),
    ):
        if section.get(kind) == value:
            if num_classes == 0:
                raise InputError(
                    f"the unet section takes labels ({kind}: {value}), but the pictures have none; put them into "
                    f"class folders, name --label_column, or give --unet.{kind} null"
                )
            section = _completed("unet", section, **{key: num_classes})
    _check_keys("unet", section, UNet2DConditionModel)
    _check_norm_groups("unet", section)
    _check_lengths("unet", section, UNet2DConditionModel)
    unet = _build("unet", UNet2DConditionModel, section)
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if (height % factor or width % factor) and "AttnUpBlock2D" in unet.config.up_block_types[:-1]:
        raise InputError(
            f"section unet: AttnUpBlock2D can't give back samples of {height}x{width}, which its factor {factor} "
            "doesn't divide; use UpBlock2D or CrossAttnUpBlock2D in its place, or another --resolution"
        )
    try:
        num_label_classes(unet.config)
    except ValueError as error:
        raise InputError(f"section unet: {error}") from error
    _check_forward(unet, sample_shape)
    return unet


def _check_forward(unet: UNet2DConditionModel, sample_shape: tuple[int, int, int]):
    """Raise InputError where a UNet is built of parts that don't fit each other; nothing is computed."""
    labels = num_label_classes(unet.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # shapes only
        sample = torch.zeros(2, *sample_shape)
        tokens = torch.zeros(2, 1, labels) if labels else None
        try:
            copied = UNet2DConditionModel.from_config(unet.config)
            conditioning = unet_conditioning(unet.config, tokens)
            shape = copied(sample, torch.zeros(2), **conditioning, return_dict=False)[0].shape
        except Exception as error:  # whatever the model trips over, it is the section's fault
            raise InputError(
                f"section unet makes a model that can't take samples of {'x'.join(map(str, sample_shape))}, look at "
                f"its channels, attention_head_dim and mid_block_type: {' '.join(str(error).split())[:200]}"
            ) from error
    if shape != sample.shape:
        raise InputError(f"section unet makes a model that turns samples of {sample_shape} into {tuple(shape[1:])}")


def build_noise_scheduler(section: dict, latent: bool) -> NoiseScheduler:
    """The scheduler to train with: a `DDPMScheduler`, or what `_class_name` says, as in a scheduler's config.

    Raises:
        InputError: a key that isn't known, a prediction type that can't be trained, clipping of latents.
    """
    section = dict(section)
    name = section.pop("_class_name", "DDPMScheduler")
    if name == "FlowMatchEulerDiscreteScheduler":
        section = {key: value for key, value in section.items() if value is not None}
        ours, theirs = (inspect.signature(cls).parameters for cls in (FlowMatchEulerDiscreteScheduler, DDPMScheduler))
        foreign = [key for key in section if key in theirs and key not in ours]
        if foreign:
            without = " ".join(f"--noise_scheduler.{key} null" for key in foreign)
            raise InputError(f"{name} in section noise_scheduler takes no {', '.join(foreign)}; give {without}")
        _check_keys("noise_scheduler", section, FlowMatchEulerDiscreteScheduler)
        if section.get("use_dynamic_shifting") or section.get("invert_sigmas"):
            raise InputError("use_dynamic_shifting and invert_sigmas in section noise_scheduler can't be trained")
        return _build("noise_scheduler", FlowMatchEulerDiscreteScheduler, section)
    if name != "DDPMScheduler":
        raise InputError(
            "_class_name in section noise_scheduler must be DDPMScheduler or FlowMatchEulerDiscreteScheduler, not "
            f"{name}; other schedulers sample what was trained by these"
        )
    # Latents are no pictures in [-1, 1], and the setting survives every swap of schedulers.
    section = _completed("noise_scheduler", section, **({"clip_sample": False} if latent else {}))
    _check_keys("noise_scheduler", section, DDPMScheduler)
    scheduler = _build("noise_scheduler", DDPMScheduler, section)
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"prediction_type in section noise_scheduler must be one of {', '.join(PREDICTION_TYPES)}, "
            f"not {scheduler.config.prediction_type}"
        )
    if scheduler.config.rescale_betas_zero_snr and scheduler.config.prediction_type == "epsilon":
        raise InputError(
            "rescale_betas_zero_snr in section noise_scheduler needs prediction_type v_prediction or sample: at zero "
            "signal an epsilon says nothing about the picture"
        )
    return scheduler


def build_classifier(
    section: dict, channels: int, size: tuple[int, int], class_names: list[str], **contract: Any
) -> ResNetForImageClassification:
    """A stock `ResNetForImageClassification` for inputs `(B, channels, *size)` in [-1, 1].

    What feeds it must be known to whoever loads it, so its config also has an `image_size`, to which inputs are scaled
    first (by default twice the pictures' size where that is small: the stem's stride is 4), and the `contract`.

    Raises:
        InputError: a key that isn't known, a value that doesn't fit.
    """
    section = _completed("classifier", section, num_channels=channels, **contract)
    section = {
        "layer_type": "basic",
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 1],
        **section,
    }
    default = [max(size)] * 2 if section.get("pretext") == "rotation" else list(size)  # a square can be turned
    image_size = section.pop("image_size", [side * 2 if max(size) < 64 else side for side in default])
    if not (isinstance(image_size, list) and len(image_size) == 2 and all(isinstance(n, int) for n in image_size)):
        raise InputError(f"image_size in section classifier must be a list of height and width, not {image_size!r}")
    given = {key: value for key, value in section.items() if key not in contract}
    _check_keys("classifier", given, ResNetConfig)
    names = {"id2label": dict(enumerate(class_names)), "label2id": {name: k for k, name in enumerate(class_names)}}
    config = _build("classifier", ResNetConfig, {**section, **names, "image_size": image_size})
    return _build("classifier", ResNetForImageClassification, {"config": config})


def build_generator(section: dict, sample_shape: tuple[int, int, int], num_classes: int) -> ResidualGenerator:
    """A `ResidualGenerator` of pictures `(B, *sample_shape)` and labels of `num_classes` classes, 0 for none.

    Raises:
        InputError: a key that isn't known, a size that its blocks don't divide, widths that its norm doesn't.
    """
    channels, height, width = sample_shape
    size = height if height == width else [height, width]
    section = _completed("generator", section, out_channels=channels, sample_size=size, num_classes=num_classes)
    _check_keys("generator", section, ResidualGenerator)
    _check_norm_groups("generator", {"norm_num_groups": 8, **section})
    return _build("generator", ResidualGenerator, section)


def build_critic(section: dict, sample_shape: tuple[int, int, int], num_classes: int) -> ProjectionCritic:
    """A `ProjectionCritic` of pictures `(B, *sample_shape)` and labels of `num_classes` classes, 0 for none.

    Raises:
        InputError: a key that isn't known, pictures that it can't halve evenly as often as it would.
    """
    channels, *size = sample_shape
    section = _completed("critic", section, in_channels=channels, num_classes=num_classes)
    _check_keys("critic", section, ProjectionCritic)
    _check_norm_groups("critic", {**section, "norm_num_groups": 1})  # it has no norm: widths alone are looked at
    critic = _build("critic", ProjectionCritic, section)
    patch, height_by_width = section.get("patch_size", 1), "x".join(map(str, size))
    if any(side % patch for side in size):
        raise InputError(f"patch_size in section critic is {patch}, by which {height_by_width} is not divisible")
    divisor = math.gcd(*size) // patch
    evenly = (divisor & -divisor).bit_length() - 1  # times: the number of zeros that it ends with in binary
    if len(critic.down_blocks) > evenly:  # a pool would leave out the last row and column
        raise InputError(
            f"section critic halves pictures of {height_by_width}, in patches of {patch}, {len(critic.down_blocks)} "
            f"times, which is too often to be even; give at most {evenly + 1} block_out_channels"
        )
    return critic


def sampling_scheduler(noise_scheduler: NoiseScheduler) -> SchedulerMixin:
    """The DDIM scheduler, for flows the Euler scheduler, that a trained pipeline is saved with.

    It begins at the last timestep, that of pure noise, which is what a pipeline begins with (Lin et al. 2024): with
    "leading" timesteps 10 steps of 1000 would begin at 900. Not so where the UNet predicts ε, which at the last
    timestep says nothing of the picture.
    """
    if is_flow(noise_scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    spacing = "leading" if noise_scheduler.config.prediction_type == "epsilon" else "trailing"
    return DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing=spacing)


PIPELINES = (ClassConditionalPipeline, ClassConditionalGANPipeline)


def load_pipeline(
    run: str,
    device: torch.device,
    kinds: tuple[type, ...] = (ClassConditionalPipeline,),
    dtype: str = "float32",
):
    """The pipeline of a run folder or of the Hub, on the device.

    Args:
        kinds: which of `PIPELINES` will do.
        dtype: of its weights, and so of all that is computed: `float32`, `bfloat16` or `float16`.

    Raises:
        InputError: there is none of ours, or one of another kind.
    """
    is_here(run, "the run")
    try:
        name = DiffusionPipeline.load_config(run).get("_class_name")
        name = name[-1] if isinstance(name, list) else name
        cls = next((cls for cls in PIPELINES if cls.__name__ == name), ClassConditionalPipeline)
        if cls not in kinds:
            raise InputError(
                f"{run} is a {name}, which draws in one pass; this needs a diffusion model, which draws in steps"
            )
        pipe = cls.from_pretrained(run)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f": {' '.join(str(error).split())[:200]}" if Path(run).exists() else ""
        raise InputError(f"{run} is neither a run folder nor a pipeline of the Hub that can be had{reason}") from error
    if cls is ClassConditionalPipeline and not isinstance(pipe.unet, UNet2DConditionModel):
        raise InputError(f"{run} is not a pipeline of hwdiffusion: its unet is a {type(pipe.unet).__name__}")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return pipe if dtype == "float32" else pipe.to(getattr(torch, dtype))  # diffusers warns of any cast


def load_autoencoder(path: str, channels: int, size: tuple[int, int]) -> Autoencoder:
    """A trained autoencoder: a folder or Hub repository that is one, or a pipeline with one in `vqvae/` or `vae/`.

    Raises:
        InputError: there is none, or it doesn't fit pictures `(B, channels, *size)`.
    """
    folder = Path(path)
    places = (None, "vqvae", "vae")
    if is_here(path, "the autoencoder"):
        places = [place for place in places if (folder / (place or "") / "config.json").is_file()]
        if not places:
            raise InputError(
                f"{path} holds no autoencoder: none of config.json, vqvae/config.json and vae/config.json is in it"
            )
    try:
        subfolder, config = _first_config(path, places)
        name = config.get("_class_name") or config.get("model_type")
        if name not in AUTOENCODERS:
            raise InputError(f"{path} holds a {name}, not one of {', '.join(AUTOENCODERS)}")
        vqvae = AUTOENCODERS[name].from_pretrained(path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the autoencoder {path} can't be loaded: {' '.join(str(error).split())[:200]}") from error
    if vqvae.config.in_channels != channels:
        raise InputError(
            f"the autoencoder {path} takes pictures of {vqvae.config.in_channels} channels, but --image_mode gives "
            f"{channels}"
        )
    check_factor(spatial_factor(vqvae.config), size)
    return vqvae


def _first_config(path: str, places) -> tuple[str | None, dict]:
    for place in places[:-1]:
        try:
            return place, VQModel.load_config(path, subfolder=place)
        except OSError:
            pass
    return places[-1], VQModel.load_config(path, subfolder=places[-1])


def check_factor(factor: int, size: tuple[int, int]):
    if size[0] % factor or size[1] % factor:
        fitting = [[side // factor * factor + add for side in size] for add in (0, factor)]
        proposals = [" ".join(map(str, sides)) for sides in fitting if min(sides) > 0]
        raise InputError(
            f"--resolution {' '.join(map(str, size))} is not divisible by the autoencoder's factor {factor}; "
            f"use {' or '.join(proposals)}"
        )


def latent_shape(vqvae: Autoencoder, size: tuple[int, int]) -> tuple[int, int, int]:
    """The shape `(C, h, w)` of the latents of pictures of that size."""
    factor = spatial_factor(vqvae.config)
    return (latent_channels(vqvae.config), size[0] // factor, size[1] // factor)


def check_inference_steps(noise_scheduler: NoiseScheduler, num_inference_steps: int):
    """Raise InputError where the pipeline could not sample in so many steps."""
    steps = noise_scheduler.config.num_train_timesteps
    if num_inference_steps > steps:
        raise InputError(
            f"--num_inference_steps must be at most num_train_timesteps, {steps}, not {num_inference_steps}"
        )
    if noise_scheduler.config.get("rescale_betas_zero_snr") and steps % num_inference_steps:
        raise InputError(
            f"--num_inference_steps must divide num_train_timesteps, {steps}, with rescale_betas_zero_snr, which "
            f"{num_inference_steps} doesn't"
        )


# What `--scheduler` names: of models with a DDPM's noise, and of flows.
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmpp": (DPMSolverMultistepScheduler, {}),
    "dpmpp_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "langevin": (AnnealedLangevinScheduler, {}),
}
_FLOW_SOLVER = {"prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True}
FLOW_SAMPLERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "heun": (FlowMatchHeunDiscreteScheduler, {}),
    "dpmpp": (DPMSolverMultistepScheduler, _FLOW_SOLVER),
    "dpmpp_sde": (DPMSolverMultistepScheduler, {**_FLOW_SOLVER, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, _FLOW_SOLVER),
}


def swap_scheduler(pipeline: ClassConditionalPipeline, name: str):
    """Give a pipeline another scheduler, one of `SAMPLERS`, for the same model.

    Raises:
        ValueError: the model is a flow, which this one can't sample.
    """
    samplers, config = SAMPLERS, dict(pipeline.scheduler.config)
    if pipeline.config.prediction_type == FLOW_PREDICTION:
        samplers = FLOW_SAMPLERS
        if name not in samplers:
            raise ValueError(f"the model predicts a flow, which {', '.join(samplers)} sample")
    cls, settings = samplers[name]
    if samplers is FLOW_SAMPLERS:
        settings = {**settings, "flow_shift" if "use_flow_sigmas" in settings else "shift": shift_of(config)}
    pipeline.scheduler = cls.from_config(config, **settings)


def build_pipeline(unet, noise_scheduler, vqvae, data, args) -> ClassConditionalPipeline:
    """The pipeline that a training run saves; what it must know of training is in its config."""
    labelled = num_label_classes(unet.config) > 0
    guided = labelled or args.guidance_unet_at > 0
    return ClassConditionalPipeline(
        unet=unet,
        scheduler=sampling_scheduler(noise_scheduler),
        vqvae=vqvae,
        id2label=data.id2label if labelled else {},
        prediction_type=prediction_type_of(noise_scheduler),
        has_null_label=labelled and args.label_dropout > 0,
        max_labels=data.max_labels if labelled else 1,
        default_guidance_scale=args.guidance_scale if guided else 1.0,
        default_guidance_interval=args.guidance_interval if guided else ALL_STEPS,
        default_num_inference_steps=args.num_inference_steps,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks of a section
# ---------------------------------------------------------------------------------------------------------------------


_COUNTS = {"latent_channels", "num_vq_embeddings", "layers_per_block", "num_train_timesteps", "attention_head_dim",
           "cross_attention_dim", "embedding_size", "latent_dim", "label_dim", "patch_size"}  # fmt: skip


def _completed(name: str, section: dict, **derived: Any) -> dict:
    for key, value in derived.items():
        given = section.get(key)
        if given is not None and given != value:
            raise InputError(f"{key} in section {name} is {given}, but the data and the other stage make it {value}")
    return {**section, **derived}


def _check_keys(name: str, section: dict, cls: type):
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for key, value in section.items():
        counts = value if isinstance(value, (list, tuple)) else [value]
        if key in _COUNTS and value is not None and not all(type(count) is int and count > 0 for count in counts):
            raise InputError(f"{key} in section {name} must be a positive whole number, not {value!r}")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise InputError(
                f"section {name} has an unknown key {key!r}{hint}; it takes the arguments of {cls.__name__}"
            )


def _check_norm_groups(name: str, section: dict):
    groups = section.get("norm_num_groups", 32)
    channels = section.get("block_out_channels", ())
    if not isinstance(groups, int) or groups < 1:
        raise InputError(f"norm_num_groups in section {name} must be a positive whole number, not {groups!r}")
    listed = isinstance(channels, (list, tuple)) and (len(channels) > 0 or "block_out_channels" not in section)
    if not listed or not all(isinstance(width, int) and width > 0 for width in channels):
        raise InputError(f"block_out_channels in section {name} must be a list of positive numbers, not {channels!r}")
    wrong = [width for width in channels if width % groups]
    if wrong:
        raise InputError(
            f"block_out_channels in section {name} must be divisible by norm_num_groups ({groups}), but {wrong[0]} "
            "isn't"
        )


def _check_lengths(name: str, section: dict, cls: type):
    defaults = inspect.signature(cls.__init__).parameters
    keys = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {key: len(section.get(key, defaults[key].default)) for key in keys}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(f"in section {name} these must be of one length: {said}")


def _build(name: str, cls: type, section: dict):
    try:
        return cls(**section)
    except Exception as error:  # whatever the class trips over, it is the section's fault
        raise InputError(f"section {name} makes no {cls.__name__}: {' '.join(str(error).split())}") from error
