"""Class-conditional image generation with stock diffusers components.

This file is the whole pipeline. Every repository that it saves carries a copy of it beside `model_index.json`, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works where nothing but diffusers and transformers
is installed. It therefore imports torch, numpy, Pillow, huggingface_hub and these two, and nothing else.

It also owns the one encoding of labels (`label_ids`, `label_tokens`, `encode_labels`, `unet_conditioning`) and the one
scaling of latents (`raw_latents`, `scale_latents`) that training imports, so that training and sampling can't disagree
on them; and what all pipelines do alike (`SelfContainedPipeline`).
"""

import contextlib
import difflib
import hashlib
import inspect
import json
import numbers
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchLCMScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from transformers import ResNetForImageClassification


logger = logging.get_logger(__name__)

DECODED_AT_ONCE = 2**22  # pixels
DENOISED_AT_ONCE = 2**20  # places of samples, so that a call's memory doesn't grow with its pictures without bounds
NULL_LABEL = -1  # the id that pads a set of labels; its token is all zeros

# A step of these draws noise from the global state, so a picture could not belong to its generator.
SCHEDULERS_WITHOUT_GENERATOR = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
# These keep the name of a prediction type and mean another parametrisation, or another task, by it.
SCHEDULERS_OF_OTHER_MODELS = (
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",  # it moves the noise levels
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "UnCLIPScheduler",
)
# These can't turn a predicted clean sample into what they step by.
SCHEDULERS_WITHOUT_SAMPLE_PREDICTION = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)
# These find the timestep of a step, and the next, by whole-number division.
DIVIDING_SCHEDULERS = (
    "AnnealedLangevinScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
)
# Those whose first step from the last timestep of a cosine schedule, almost pure noise, would be a leap.
LEAPING_SCHEDULERS = ("AnnealedLangevinScheduler", "PNDMScheduler")
# What a UNet that predicts a flow is sampled by, besides any scheduler with `use_flow_sigmas`.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("runs/digits", trust_remote_code=True)
        >>> image = pipe(labels=[3], generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


# ---------------------------------------------------------------------------------------------------------------------
# Latents: of a VQModel, an AutoencoderKL or an AutoencoderTiny
# ---------------------------------------------------------------------------------------------------------------------


def latent_channels(config) -> int:
    """How many channels the latents of an autoencoder with this config have."""
    return getattr(config, "vq_embed_dim", None) or config.latent_channels


def spatial_factor(config) -> int:
    """How many times smaller than a picture its latents are, on each side."""
    return 2 ** (len(config.block_out_channels) - 1)


def raw_latents(vqvae, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `(B, C, H, W)` in [-1, 1] to latents `(B, C, h, w)` as the autoencoder makes them: of a `VQModel` those
    before quantisation, of an `AutoencoderKL` the mean."""
    encoded = vqvae.encode(pictures)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def scale_latents(config, latents: torch.Tensor) -> torch.Tensor:
    """Latents of an autoencoder with this config to what the UNet works on: (latents - shift) * scale."""
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def unscale_latents(config, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


@contextlib.contextmanager
def _upcast(vqvae):
    """Within it an autoencoder that overflows in float16, as some say of themselves, works in float32."""
    halved = vqvae.dtype == torch.float16 and getattr(vqvae.config, "force_upcast", False)
    if halved:
        vqvae.to(torch.float32)
    try:
        yield vqvae
    finally:
        if halved:
            vqvae.to(torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Labels: ids, names and sets of them -> ids (B, T) -> one-hot tokens (B, T, K) -> what the UNet takes
# ---------------------------------------------------------------------------------------------------------------------


def label_ids(labels: Any, id2label: dict[int, str], max_labels: int = 1) -> torch.LongTensor:
    """Resolve ids and names of labels, or sets of them, to ids.

    Args:
        labels: one label, or a sequence with one entry a picture. An entry is an id, a name, `None` (the null label),
            or a sequence of ids and names (a set of labels; the empty set is the null label). An integer tensor or
            array of shape `(B,)` or `(B, T)` is taken as ids, with -1 as padding.
        id2label: the name of each id; its length K is the number of classes.
        max_labels: T, the most labels that a picture may have.

    Returns:
        `(B, T)` ids in [0, K), padded with -1.

    Raises:
        ValueError: an id outside [0, K), an unknown name (the nearest known one is named), too many labels in a set,
            one of them twice, or an entry that is none of the above.
    """
    if isinstance(labels, (torch.Tensor, np.ndarray)):
        array = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (0, 1, 2):
            raise ValueError(
                f"labels given as a tensor must be integer ids of shape (B,) or (B, T), or floating-point vectors of "
                f"shape (B, K) or (B, T, K), not {array.dtype} of shape {tuple(array.shape)}"
            )
        rows = array.reshape(len(array) if array.ndim else 1, -1).tolist()
        sets = [[label for label in row if label != NULL_LABEL] for row in rows]
    else:
        if labels is None or isinstance(labels, (str, numbers.Integral)):
            labels = [labels]
        if not isinstance(labels, Sequence):
            raise ValueError(f"labels must be an id, a name, or a sequence of them, not {labels!r:.80}")
        sets = [_as_set(entry) for entry in labels]

    name2id = {name: index for index, name in id2label.items()}
    ids = torch.full((len(sets), max_labels), NULL_LABEL, dtype=torch.long)  # (B, T)
    for row, entry in enumerate(sets):
        if len(entry) > max_labels:
            raise ValueError(f"labels[{row}] holds {len(entry)} labels, but this model takes at most {max_labels}")
        for slot, label in enumerate(entry):
            if not isinstance(label, (str, numbers.Integral)) or isinstance(label, bool):
                raise ValueError(
                    f"labels[{row}] holds {label!r:.80} where an id or a name is wanted; a set of labels is a list of "
                    "these"
                )
            ids[row, slot] = _label_id(label, name2id, len(id2label))
            if ids[row, slot] in ids[row, :slot]:
                raise ValueError(f"labels[{row}] holds {label!r} twice; a set has each label once")
    return ids


def _as_set(entry: Any) -> list:
    if isinstance(entry, (torch.Tensor, np.ndarray)):
        entry = entry.tolist()
    if entry is None:
        return []
    return list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]


def _label_id(label: int | str, name2id: dict[str, int], num_classes: int) -> int:
    if isinstance(label, str):
        if label in name2id:
            return name2id[label]
        nearest = difflib.get_close_matches(label, name2id, n=1, cutoff=0.0)
        hint = f"the nearest known one is {nearest[0]!r}" if nearest else "this model knows no label names"
        raise ValueError(f"unknown label {label!r}; {hint}")
    if 0 <= label < num_classes:
        return int(label)
    raise ValueError(f"label {label} is out of range; this model knows the ids 0 to {num_classes - 1}")


def label_tokens(ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Ids `(B, T)`, padded with -1, to one-hot tokens `(B, T, K)`, float32; the padding becomes zeros."""
    tokens = F.one_hot(ids.clamp(min=0), num_classes)  # (B, T, K)
    return tokens.float() * (ids >= 0).unsqueeze(-1)


def encode_labels(
    labels: Any, id2label: dict[int, str], max_labels: int = 1, has_null_label: bool = False
) -> torch.Tensor:
    """The labels of a call to tokens `(B, T, K)`: what [`label_ids`] takes, one-hot; and a floating-point tensor or
    array of shape `(B, K)` (multi-hot or soft labels) or `(B, T, K)` (tokens) as it is.

    Args:
        id2label, max_labels: as for [`label_ids`].
        has_null_label: whether the model knows pictures without labels.

    Raises:
        ValueError: as [`label_ids`]; such a tensor of another shape, or with a number that is not finite; a picture
            without a label, where the model knows none.
    """
    num_classes = len(id2label)
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "f":
        labels = torch.from_numpy(labels)
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        tokens = labels.unsqueeze(1) if labels.ndim == 2 else labels  # (B, T, K)
        if tokens.ndim != 3 or tokens.shape[-1] != num_classes:
            raise ValueError(
                f"floating-point labels must have the shape (B, {num_classes}) or (B, T, {num_classes}), not "
                f"{tuple(labels.shape)}"
            )
        wrong = (~tokens.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(wrong):
            raise ValueError(f"floating-point labels must be finite, but labels[{int(wrong[0])}] is not")
    else:
        tokens = label_tokens(label_ids(labels, id2label, max_labels), num_classes)
    if not has_null_label and (tokens == 0).all(dim=-1).all(dim=-1).any():
        raise ValueError("this model was trained without label dropout, so every picture needs a label")
    return tokens


def label_names(id2label: dict | None, num_classes: int) -> dict[int, str]:
    """The names of a model's ids, in their order; without any, the ids themselves.

    Raises:
        ValueError: they are not those of the ids 0 to K-1, or a name is there twice.
    """
    if not id2label:
        id2label = {index: str(index) for index in range(num_classes)}
    # JSON makes int keys strings, and sorts them as such
    id2label = {int(index): str(name) for index, name in sorted(id2label.items(), key=lambda item: int(item[0]))}
    if len(set(id2label.values())) < len(id2label):
        raise ValueError("id2label must give every id a name of its own")
    if num_classes and sorted(id2label) != list(range(num_classes)):
        raise ValueError(
            f"id2label must name the ids 0 to {num_classes - 1} of the model's {num_classes} classes, "
            f"not {sorted(id2label)}"
        )
    return id2label


def num_label_classes(unet_config: Any) -> int:
    """K, the number of classes that a UNet was built for; 0 if it takes no labels.

    Raises:
        ValueError: the UNet wants some other conditioning than labels.
    """
    sizes = set()
    if unet_config.get("class_embed_type") == "simple_projection":
        sizes.add(unet_config["projection_class_embeddings_input_dim"])
    if unet_config.get("encoder_hid_dim_type") == "text_proj":
        sizes.add(unet_config["encoder_hid_dim"])
    if len(sizes) > 1:
        raise ValueError(f"the UNet's class embedding and its token projection disagree on the classes: {sizes}")
    if not sizes:
        blocks = [*unet_config["down_block_types"], unet_config["mid_block_type"], *unet_config["up_block_types"]]
        cross_attention = sorted({block for block in blocks if block and "CrossAttn" in block})
        if cross_attention or unet_config.get("class_embed_type") or unet_config.get("num_class_embeds"):
            raise ValueError(
                "the UNet has neither class_embed_type='simple_projection' nor encoder_hid_dim_type='text_proj', the "
                "two ways to take labels, so it must not have num_class_embeds, another class_embed_type or "
                f"cross-attention blocks (it has {', '.join(cross_attention) or 'a class embedding'})"
            )
    return sizes.pop() if sizes else 0


def _at_once(sample: torch.Tensor) -> int:
    """How many samples, of these `(B, C, H, W)`, go through a network together."""
    return max(1, DENOISED_AT_ONCE // sample[0, 0].numel())


def unet_conditioning(unet_config: Any, tokens: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """The keyword arguments by which a UNet takes label tokens.

    With `class_embed_type="simple_projection"` the sum of the tokens over T goes in as `class_labels` `(B, K)`; with
    `encoder_hid_dim_type="text_proj"` the tokens themselves go in as `encoder_hidden_states` `(B, T, K)`.

    Raises:
        ValueError: tokens for a UNet that takes no labels, none for one that needs them, or another K.
    """
    num_classes = num_label_classes(unet_config)
    given_classes = tokens.shape[-1] if tokens is not None else 0
    if given_classes != num_classes:
        taken, given = (f"labels of {k} classes" if k else "no labels" for k in (num_classes, given_classes))
        raise ValueError(f"the UNet takes {taken}, not {given}")
    conditioning = {"encoder_hidden_states": None, "class_labels": None}
    if unet_config.get("class_embed_type") == "simple_projection":
        conditioning["class_labels"] = tokens.sum(dim=1)  # (B, K)
    if unet_config.get("encoder_hid_dim_type") == "text_proj":
        conditioning["encoder_hidden_states"] = tokens  # (B, T, K)
    return conditioning


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels, guidance, interpolation: the equations of a call
# ---------------------------------------------------------------------------------------------------------------------


def guidance_of(
    config: Any, guidance_scale: float | None = None, guidance_interval: Sequence[float] | None = None
) -> tuple[float, Sequence[float]]:
    """The guidance of a call, w and the part of the steps: what it gives, else what a pipeline's config recommends,
    the part only for the recommended w; of a config that knows none w = 1, and all steps."""
    if guidance_interval is None:
        own = config.get("default_guidance_interval", (0.0, 1.0))
        guidance_interval = own if guidance_scale is None else (0.0, 1.0)
    return config.get("default_guidance_scale", 1.0) if guidance_scale is None else guidance_scale, guidance_interval


def predict_clean(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    alpha: float | torch.Tensor,
    sigma: float | torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """The clean sample that a model's output says, of the noisy `sample` = α clean + σ noise; all `(B, C, H, W)`."""
    if prediction_type == "sample":
        return model_output
    if prediction_type == "epsilon":
        return (sample - sigma * model_output) / (
            alpha.clamp(min=1e-8) if torch.is_tensor(alpha) else max(alpha, 1e-8)
        )
    if prediction_type == "v_prediction":  # v = α noise - σ clean (Salimans and Ho 2022), with α² + σ² = 1
        return alpha * sample - sigma * model_output
    return sample - sigma * model_output  # flow_prediction: noise - clean, with α = 1 - σ


def classifier_inputs(sample: torch.Tensor, level: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
    """What a noise-aware classifier sees: noisy samples with their noise level as one more channel, scaled.

    Args:
        sample: `(B, C, H, W)`.
        level: `(B,)`, the timestep over the number of them in training, in [0, 1].
        image_size: height and width of its inputs.

    Returns:
        `(B, C + 1, *image_size)`.
    """
    level = level.to(sample)[:, None, None, None].expand(-1, 1, *sample.shape[-2:])
    return scaled(torch.cat([sample, level], dim=1), image_size)


def scaled(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Pictures or latents `(B, C, H, W)` scaled to height and width, without aliasing, as classifiers see them."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """Bring the guided output `(B, C, H, W)` back to the conditional one's deviation (Lin et al. 2023, eq. 15-16)."""
    dims = list(range(1, cond.ndim))
    rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


def slerp(first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of two tensors of one shape, `(N, *shape)` for weights `(N,)`.

    The straight line between two draws of normal noise passes through noise that is too small to be one; this doesn't.
    Between parallel vectors, and from or to zero (the null label), it is the straight line.
    """
    weights = weights.reshape(-1, *[1] * first.ndim).to(first)
    norms = first.norm() * second.norm()
    cosine = (first * second).sum() / norms if norms > 0 else first.new_tensor(1.0)
    if cosine.abs() > 0.9995:
        return (1 - weights) * first + weights * second
    angle = torch.arccos(cosine)
    return (torch.sin((1 - weights) * angle) * first + torch.sin(weights * angle) * second) / torch.sin(angle)


# ---------------------------------------------------------------------------------------------------------------------
# What every pipeline does alike: it checks a call, and carries its own source
# ---------------------------------------------------------------------------------------------------------------------


def number_of_images(batch_size: int, num_images_per_prompt: int) -> int:
    """How many pictures a call asks for; ValueError where it asks for none."""
    if not isinstance(num_images_per_prompt, numbers.Integral) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be a positive whole number, not {num_images_per_prompt!r}")
    if batch_size == 0:
        raise ValueError("labels is empty; give one label for each picture")
    return batch_size * num_images_per_prompt


def check_noise(generator: Any, latents: Any, shape: Sequence[int]):
    """Raise ValueError where noise of a shape `(B, ...)` can't be drawn by `generator`, one or a list of B, or isn't
    what `latents` is."""
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator) and (one is not None or isinstance(generator, list)):
            raise ValueError(f"generator must be a torch.Generator or a list of them, not {one!r}")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"generator is a list of {len(generator)}, but {shape[0]} pictures are asked for")
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents must be a tensor, not {type(latents).__name__}")
    if latents is not None and tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents must have the shape {tuple(shape)}, not {tuple(latents.shape)}")


def check_output_type(output_type: str, allowed: Sequence[str]):
    """Raise ValueError for an output type that a pipeline doesn't have."""
    if output_type not in allowed:
        *first, last = [repr(name) for name in allowed]
        raise ValueError(f"output_type must be {', '.join(first)} or {last}, not {output_type!r}")


def self_contained_source(path: Path) -> str:
    """The text of a source file, with the files that it imports from in the places of these imports: those beside it
    (`from .name import …`), and, if it is a user's own, those of the package (`from hwdiffusion.pipelines.name …`).

    diffusers would fetch such files too, from folders and from the Hub; but it makes a module path of a repository's
    name, and where that has a dot, `user/model-v1.0`, Python finds no package to import them from.
    """

    def imported(match: re.Match) -> str:
        beside = path if match[1] == "." else Path(__file__)
        return f"\n\n{self_contained_source(beside.with_name(f'{match[2]}.py')).strip()}\n\n"

    pattern = r"^from (\.|hwdiffusion\.pipelines\.)(\w+) import (?:\([^)]*\)|[^(\n]*)$"
    return re.sub(pattern, imported, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


class SelfContainedPipeline(DiffusionPipeline):
    """A pipeline whose saved folder carries its source, and that of components that diffusers doesn't ship, so that
    it loads where this package isn't."""

    source_name: str  # of the file at the root of a saved folder, before the digits of its content

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Save the components and this source file, so that the folder loads with or without this package.

        Takes the arguments of [`DiffusionPipeline.save_pretrained`]. With `push_to_hub=True` the folder is uploaded
        after the source file is in it (`repo_id`, `commit_message`, `private`, `create_pr` and `token` as there).
        """
        hub = {key: kwargs.pop(key, None) for key in ("repo_id", "commit_message", "private", "create_pr", "token")}
        save_directory = Path(save_directory)
        with self._to_be_saved():
            super().save_pretrained(str(save_directory), safe_serialization, variant, max_shard_size, **kwargs)

        index_file = save_directory / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        for name in self.components:
            library, class_name = index.get(name) or (None, None)
            known = library not in sys.modules or library.split(".")[0] in ("diffusers", "transformers", "__main__")
            if not known:
                cls = getattr(sys.modules[library], class_name)
                index[name] = [_write_source(cls, save_directory / name, name), class_name]
            config_file = save_directory / name / "config.json"
            if config_file.is_file():  # where a component came from is nobody's business
                config = json.loads(config_file.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        index["_class_name"] = [_write_source(type(self), save_directory, self.source_name), type(self).__name__]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        if push_to_hub:
            repo_id = hub["repo_id"] or save_directory.name
            repo_id = create_repo(repo_id, exist_ok=True, private=hub["private"], token=hub["token"]).repo_id
            if not (save_directory / "README.md").is_file():
                card = load_or_create_model_card(repo_id, token=hub["token"], is_pipeline=True)
                populate_model_card(card).save(save_directory / "README.md")
            self._upload_folder(
                str(save_directory),
                repo_id,
                token=hub["token"],
                commit_message=hub["commit_message"],
                create_pr=bool(hub["create_pr"]),
            )

    @contextlib.contextmanager
    def _to_be_saved(self):
        """Within it the components are what is to be saved of them."""
        yield

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # A folder names its own source as [file, class]; this class is that class, so nothing foreign is to be run.
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config


def _write_source(cls: type, folder: Path, name: str) -> str:
    """Write a class's source into a folder; the name of the file without its suffix is returned."""
    source = self_contained_source(Path(inspect.getsourcefile(cls))).encode()
    # All local remote code shares one module namespace, so the name is unique to the content.
    stem = f"{name}_{hashlib.sha256(source).hexdigest()[:8]}"
    for stale in folder.glob(f"{name}_*.py"):
        if stale.stem != stem:
            stale.unlink()
    (folder / f"{stem}.py.part").write_bytes(source)
    os.replace(folder / f"{stem}.py.part", folder / f"{stem}.py")
    return stem


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


class ClassConditionalPipeline(SelfContainedPipeline):
    r"""
    Pipeline for class-conditional image generation, variation and inpainting in pixel space or in the latent space of
    a `VQModel`.

    What sampling must know about training is part of the pipeline's config and travels with it.

    Args:
        unet ([`UNet2DConditionModel`]): denoises pictures or latents. It owns the label table, as
            `class_embed_type="simple_projection"` or `encoder_hid_dim_type="text_proj"`; with neither the pipeline is
            unconditional.
        scheduler ([`SchedulerMixin`]): any diffusers scheduler that does `prediction_type`; swap it by `from_config`.
        vqvae ([`VQModel`], [`AutoencoderKL`] or [`AutoencoderTiny`], *optional*): decodes latents; without it the UNet
            works on pixels in [-1, 1].
        classifier ([`~transformers.ResNetForImageClassification`], *optional*): knows the label of a noisy sample, for
            `classifier_guidance_scale`. Its config tells how it is fed: `noise_aware`, `latent`, `image_size`,
            `noise_schedule` (see [`classifier_inputs`]).
        guidance_unet ([`UNet2DConditionModel`], *optional*): a weaker version of `unet`, for example an earlier
            checkpoint. With it, `guidance_scale` guides away from what it says of the same label (autoguidance,
            Karras et al. 2024) rather than away from the null label.
        id2label (`dict[int, str]`, *optional*): the name of each label id.
        prediction_type (`str`): what the UNet was trained to predict: `epsilon`, `sample`, `v_prediction` or
            `flow_prediction` (noise - sample).
        has_null_label (`bool`): whether labels were dropped in training, which `labels=None` and
            classifier-free guidance need.
        max_labels (`int`): T, the most labels that a picture has.
        default_guidance_scale (`float`): what `guidance_scale=None` means.
        default_guidance_interval (`list` or `tuple`): what `guidance_interval=None` means, where `guidance_scale` is
            `None`, too; of other scales it isn't known which part of the steps they suit.
        default_num_inference_steps (`int`): what `num_inference_steps=None` means.
        default_classifier_guidance_scale (`float`): what `classifier_guidance_scale=None` means; where a UNet without
            labels is to obey some, 0 means 1.
    """

    source_name = "pipeline_class_conditional"
    model_cpu_offload_seq = "unet->vqvae"  # the other two take turns with the UNet, and stay beside it
    _exclude_from_cpu_offload = ["vqvae"]  # its codebook is read outside of any forward pass
    _optional_components = ["vqvae", "classifier", "guidance_unet"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vqvae: VQModel | AutoencoderKL | AutoencoderTiny | None = None,
        classifier: ResNetForImageClassification | None = None,
        guidance_unet: UNet2DConditionModel | None = None,
        id2label: dict | None = None,
        prediction_type: str = "epsilon",
        has_null_label: bool = False,
        max_labels: int = 1,
        default_guidance_scale: float = 1.0,
        default_guidance_interval: list | tuple = (0.0, 1.0),
        default_num_inference_steps: int = 50,
        default_classifier_guidance_scale: float = 0.0,
    ):
        super().__init__()
        if scheduler is not None:
            # What a config leaves to its class's defaults, `from_config` of another class would replace by its own:
            # other betas, another spacing. Now all of it counts as given, as in a scheduler that is loaded.
            scheduler.register_to_config(_use_default_values=[])
        self.register_modules(
            unet=unet, scheduler=scheduler, vqvae=vqvae, classifier=classifier, guidance_unet=guidance_unet
        )
        id2label = label_names(id2label, num_label_classes(unet.config) if unet is not None else 0)
        if unet is not None and vqvae is not None:
            channels = latent_channels(vqvae.config)
            if unet.config.in_channels != channels:
                raise ValueError(
                    f"the UNet works on {unet.config.in_channels} channels, but the {type(vqvae).__name__}'s latents "
                    f"have {channels}"
                )
        self.register_to_config(
            id2label=id2label,
            prediction_type=prediction_type,
            has_null_label=has_null_label,
            max_labels=max_labels,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=list(default_guidance_interval),
            default_num_inference_steps=default_num_inference_steps,
            default_classifier_guidance_scale=default_classifier_guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
            resample="nearest",
        )

    # -- persistence --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _to_be_saved(self):
        """Within it the scheduler is one that diffusers ships: itself, or, with a warning, the one that it is derived
        from, so that a saved folder holds nothing that stock diffusers can't load."""
        scheduler, stock = self.scheduler, _stock_scheduler(self.scheduler)
        try:
            self.scheduler = stock
            self.register_modules(**self.components)  # one that was None and has been given since is else left out
            yield
        finally:
            self.scheduler = scheduler

    def compile(self, **options):
        """Compile what a call spends its time in, the UNets and the decoder, in their places. The first call of each
        size of batch takes a minute or so longer on a CPU, so it pays where many batches of one size are drawn; what
        is saved is the same as before. Where there is no C++ compiler, which this needs for a CPU, a warning says so
        and nothing is compiled.

        Args:
            **options: those of `torch.compile`, such as `mode="max-autotune"`.
        """
        if not can_compile(self._execution_device, options.get("backend", "inductor")):
            return
        for unet in (self.unet, self.guidance_unet):
            if unet is not None:
                unet.compile(**options)
        if self.vqvae is not None:
            self.vqvae.decoder.compile(**options)

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs):
        """As [`DiffusionPipeline.enable_group_offload`]; the `VQModel`, which doesn't support it, stays loaded."""
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
        excluded += ["vqvae"] if self.vqvae is not None and "vqvae" not in excluded else []
        super().enable_group_offload(*args, exclude_modules=excluded, **kwargs)

    # -- what the model is, and what a call was asked for -------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        return spatial_factor(self.vqvae.config) if getattr(self, "vqvae", None) is not None else 1

    @property
    def num_classes(self) -> int:
        """K, the number of labels that the UNet knows, or, if it takes none, the classifier; else 0."""
        num_classes = num_label_classes(self.unet.config)
        if num_classes == 0 and self.classifier is not None:
            return self.classifier.config.num_labels
        return num_classes

    @property
    def id2label(self) -> dict[int, str]:
        id2label = self.config.id2label
        if not id2label and self.classifier is not None:
            id2label = self.classifier.config.id2label
        return {int(index): name for index, name in id2label.items()}

    @property
    def image_channels(self) -> int:
        return self.unet.config.out_channels if self.vqvae is None else self.vqvae.config.out_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        _, height, width = self._latent_shape()
        return (height * self.vae_scale_factor, width * self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def classifier_guidance_scale(self) -> float:
        return self._classifier_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    # -- checks: all of a call's arguments, before any work -----------------------------------------------------------

    def check_inputs(
        self,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        classifier_guidance_scale: float = 0.0,
        eta: float = 0.0,
        generator: Any = None,
        latents: Any = None,
        strength: float | None = None,
        has_labels: bool | None = None,
        output_type: str = "pt",
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ):
        """Raise ValueError before the first step for anything that can't be done, in one sentence."""
        num_images = number_of_images(batch_size, num_images_per_prompt)
        self._check_scheduler()
        self._check_steps(num_inference_steps, timesteps, strength)
        for what, value in (
            ("guidance_scale", guidance_scale),
            ("classifier_guidance_scale", classifier_guidance_scale),
        ):
            if not isinstance(value, numbers.Real) or not 0 <= value < float("inf"):
                raise ValueError(f"{what} must be a number of at least 0, not {value!r}")
        for what, value in (("guidance_rescale", guidance_rescale), ("eta", eta)):
            if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
                raise ValueError(f"{what} must be a number in [0, 1], not {value!r}")
        self._check_guidance(guidance_scale, guidance_interval)
        if classifier_guidance_scale > 0:
            self._check_classifier(classifier_guidance_scale, has_labels)
        elif has_labels and num_label_classes(self.unet.config) == 0:
            raise ValueError("the UNet takes no labels, so they act by classifier_guidance_scale alone, which is 0")

        check_noise(generator, latents, (num_images, *self._latent_shape()))
        check_output_type(output_type, ("pil", "np", "pt", "latent"))
        if isinstance(callback_on_step_end_tensor_inputs, str):
            callback_on_step_end_tensor_inputs = [callback_on_step_end_tensor_inputs]  # to be named as it is
        unknown = [key for key in callback_on_step_end_tensor_inputs or [] if key not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, not {unknown}"
            )

    def _check_scheduler(self):
        """Judged by what the pipeline was trained for: a swap by `from_config` may lose what the model predicts."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        trained_for = self.config.prediction_type
        if name in SCHEDULERS_WITHOUT_GENERATOR:
            raise ValueError(f"{name} takes no generator, so a picture could not belong to its seed; use another one")
        if trained_for == "flow_prediction":
            by_config = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
            if name not in FLOW_SCHEDULERS and not by_config:
                raise ValueError(
                    f"the model was trained for prediction_type='flow_prediction', which {name} as it is configured "
                    f"doesn't sample; use {FLOW_SCHEDULERS[0]}, or from_config(pipe.scheduler.config, "
                    "prediction_type='flow_prediction', use_flow_sigmas=True)"
                )
        else:
            if name in FLOW_SCHEDULERS:
                raise ValueError(
                    f"{name} samples flows, but the model was trained for prediction_type={trained_for!r}"
                )
            if name in SCHEDULERS_OF_OTHER_MODELS or config.get("use_flow_sigmas"):
                raise ValueError(
                    f"{name}, as it is configured, is for models of another kind than this one; use another one"
                )
            if config.get("prediction_type") != trained_for:
                raise ValueError(
                    f"the model was trained for prediction_type={trained_for!r}, but the scheduler {name} samples "
                    f"{config.get('prediction_type')!r}; make it with from_config(pipe.scheduler.config, "
                    f"prediction_type={trained_for!r})"
                )
            if trained_for == "sample" and name in SCHEDULERS_WITHOUT_SAMPLE_PREDICTION:
                raise ValueError(
                    f"{name} can't sample prediction_type='sample', for which the model was trained; use another one"
                )
            if not hasattr(self.scheduler, "init_noise_sigma") or not hasattr(self.scheduler, "alphas_cumprod"):
                raise ValueError(
                    f"{name} is not a scheduler for this pipeline; use DDIM, DDPM, DPM-Solver++ or another one"
                )
        takes = list(inspect.signature(self.scheduler.step).parameters.values())[:4]
        if any(item.default is item.empty for item in takes[3:] if item.kind is item.POSITIONAL_OR_KEYWORD):
            raise ValueError(f"{name} steps by more than the model's output, so this pipeline can't use it")

    def _check_steps(self, num_inference_steps, timesteps, strength):
        name, num_train_timesteps = type(self.scheduler).__name__, self.scheduler.config.num_train_timesteps
        if timesteps is not None:
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name} takes no custom timesteps; use num_inference_steps")
            flow = self.config.prediction_type == "flow_prediction"
            if flow and self.scheduler.config.get("shift", 1.0) != 1.0:
                raise ValueError(f"{name} takes custom timesteps only with shift=1; use num_inference_steps")
            try:
                timesteps = [float(t) for t in timesteps]
            except (TypeError, ValueError):
                raise ValueError(f"timesteps must be a descending sequence of numbers, not {timesteps!r}") from None
            if not timesteps or sorted(set(timesteps), reverse=True) != timesteps:
                raise ValueError(f"timesteps must be a strictly descending sequence, not {timesteps}")
            if not flow and any(t != int(t) for t in timesteps if t == t):
                raise ValueError(f"timesteps must be whole numbers, not {timesteps}")
            highest = num_train_timesteps - (not flow)
            if not all(0 <= t <= highest for t in timesteps):
                raise ValueError(f"timesteps must lie in 0 to {highest}, not {timesteps}")
        elif (
            not isinstance(num_inference_steps, numbers.Integral)
            or not 1 <= num_inference_steps <= num_train_timesteps
        ):
            raise ValueError(
                f"num_inference_steps must be a whole number from 1 to {num_train_timesteps}, "
                f"not {num_inference_steps!r}"
            )
        elif name in DIVIDING_SCHEDULERS and self.scheduler.config.timestep_spacing == "linspace":
            raise ValueError(
                f"{name} steps by a whole number of timesteps, which timestep_spacing='linspace' doesn't; use "
                "'trailing' or 'leading'"
            )
        elif name in DIVIDING_SCHEDULERS and num_train_timesteps % num_inference_steps:
            zero_snr = self.scheduler.config.get("rescale_betas_zero_snr")
            if zero_snr and self.scheduler.config.timestep_spacing == "trailing":
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} must divide {num_train_timesteps}, so that {name} "
                    "begins at pure noise, as zero terminal SNR demands"
                )
            first = num_train_timesteps // num_inference_steps * (num_inference_steps - 1)
            if _begins_late(first, num_inference_steps, num_train_timesteps):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} makes {name} begin at timestep {first} of "
                    f"{num_train_timesteps}, which is not pure noise yet; use a number that divides "
                    f"{num_train_timesteps}"
                )
        if strength is None:
            return
        if not isinstance(strength, numbers.Real) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be a number in [0, 1], not {strength!r}")
        if name == "PNDMScheduler" and 0 < strength < 1 and not self.scheduler.config.skip_prk_steps:
            raise ValueError(
                "PNDMScheduler can't begin in the middle with its Runge-Kutta steps; make it with "
                "from_config(pipe.scheduler.config, skip_prk_steps=True)"
            )
        steps = len(timesteps) if timesteps is not None else num_inference_steps
        if strength > 0 and _steps_of(strength, steps) == 0:
            raise ValueError(
                f"strength={strength} of {steps} steps is less than one step; use a strength of at least "
                f"{1 / steps:g}, or more steps"
            )

    def _check_guidance(self, guidance_scale, guidance_interval):
        if guidance_scale > 1 and self.guidance_unet is None:
            if num_label_classes(self.unet.config) == 0:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs labels or a guidance_unet, but this model is unconditional"
                )
            if not self.config.has_null_label:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs a model trained with label dropout, which this one "
                    "wasn't, or a guidance_unet; use guidance_scale=1"
                )
        if self.guidance_unet is not None:
            for what, of in (
                ("in_channels", lambda config: config.in_channels),
                ("sample_size", lambda config: config.sample_size),
                ("number of classes", num_label_classes),
            ):
                ours, theirs = of(self.unet.config), of(self.guidance_unet.config)
                if ours != theirs:
                    raise ValueError(
                        f"guidance_unet must be a weaker version of unet, but its {what} is {theirs}, not {ours}"
                    )
        if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
            raise ValueError(f"guidance_interval must be a pair (start, stop), not {guidance_interval!r}")
        start, stop = guidance_interval
        if not all(isinstance(end, numbers.Real) for end in (start, stop)) or not 0.0 <= start <= stop <= 1.0:
            raise ValueError(f"guidance_interval must be (start, stop), 0 <= start <= stop <= 1, not {(start, stop)}")

    def _check_label_guidance(self, weights, tokens) -> torch.Tensor | None:
        """Weights of labels as a tensor `(B, T)` with NaN where a set has no label, or `None`."""
        if weights is None:
            return None
        if tokens is None or num_label_classes(self.unet.config) == 0 or not self.config.has_null_label:
            raise ValueError("label_guidance_scale needs labels, and a UNet that was trained with label dropout")
        if self.guidance_unet is not None:
            raise ValueError("label_guidance_scale contrasts labels, not models; give the pipeline no guidance_unet")
        given = weights.tolist() if isinstance(weights, (torch.Tensor, np.ndarray)) else weights
        rows = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        if len(rows) != len(tokens):
            raise ValueError(f"label_guidance_scale has {len(rows)} entries, but there are labels of {len(tokens)}")
        known = (tokens != 0).any(dim=-1).cpu()  # (B, T)
        table = torch.full(known.shape, float("nan"))
        for place, row in enumerate(rows):
            row = row.tolist() if isinstance(row, (torch.Tensor, np.ndarray)) else row
            row = list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [row]
            if not all(isinstance(one, numbers.Real) and 0 <= one < float("inf") for one in row):
                raise ValueError(f"label_guidance_scale[{place}] must hold numbers of at least 0, not {row!r}")
            if len(row) != known[place].sum():
                raise ValueError(
                    f"label_guidance_scale[{place}] has {len(row)} numbers for {known[place].sum()} labels"
                )
            table[place, known[place]] = torch.tensor(row, dtype=table.dtype)
        return table

    def _check_classifier(self, scale, has_labels):
        if self.classifier is None:
            raise ValueError(
                f"classifier_guidance_scale={scale} needs a classifier; train one by train_classifier.py "
                "--noise_aware and give it to the pipeline as `classifier`"
            )
        if has_labels is False:
            raise ValueError(f"classifier_guidance_scale={scale} needs labels")
        if self.classifier.training:  # pictures of a batch would be normalised by each other
            raise ValueError("the classifier is in training mode; call pipe.classifier.eval()")
        config = self.classifier.config
        if not getattr(config, "noise_aware", False):
            raise ValueError("the classifier has not seen noisy samples, so it can't guide; train it by --noise_aware")
        theirs = [config.id2label[index] for index in sorted(config.id2label)]
        if theirs != list(self.id2label.values()):
            raise ValueError(
                f"the classifier knows the {len(theirs)} classes {_few(theirs)}, but the pipeline the "
                f"{self.num_classes} classes {_few(self.id2label.values())}; use one for these"
            )
        space = "latents" if self.vqvae is not None else "pixels"
        sees = "latents" if getattr(config, "latent", False) else "pixels"
        channels = self.unet.config.in_channels
        if sees != space or config.num_channels != channels + 1:
            raise ValueError(
                f"the classifier sees {sees} of {config.num_channels - 1} channels and the noise level, but the "
                f"pipeline works on {space} of {channels} channels; use one for these"
            )
        schedule = getattr(config, "noise_schedule", None)
        ours = noise_schedule(self.scheduler.config, self.config.prediction_type)
        if any(ours.get(key) != value for key, value in (schedule or {}).items()):
            raise ValueError(
                f"the classifier was trained on another noise schedule ({schedule}) than the pipeline's ({ours})"
            )

    # -- parts of a call ----------------------------------------------------------------------------------------------

    def encode_labels(self, labels: Any) -> torch.Tensor | None:
        """Labels, as [`encode_labels`] takes them, to tokens `(B, T, K)`, or `None` for an unconditional model."""
        if labels is None and num_label_classes(self.unet.config) == 0:
            return None
        if self.num_classes == 0:
            raise ValueError("this model is unconditional, so labels must be None; use num_images_per_prompt")
        return encode_labels(labels, self.id2label, self.config.max_labels, self.config.has_null_label)

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    def _set_timesteps(self, num_inference_steps, timesteps=None) -> float:
        """Set the scheduler's timesteps; the scale of the noise that its first one begins with is returned.

        Where the scheduler's spacing doesn't lead from noise to data, another one is taken for this call.
        """
        scheduler = self.scheduler  # on the CPU: it looks its tables up, which from a GPU would wait at every step
        if timesteps is not None:
            scheduler.set_timesteps(timesteps=list(timesteps), device="cpu")
            return float(getattr(scheduler, "init_noise_sigma", 1.0))
        evenly = {}
        if isinstance(scheduler, FlowMatchLCMScheduler):  # by itself it gives the last of its few steps to σ = 1/T
            evenly = {"sigmas": [1 - step / num_inference_steps for step in range(num_inference_steps)]}
        given, said = scheduler.config.get("timestep_spacing"), None
        num_train_timesteps = scheduler.config.num_train_timesteps
        try:
            if given == "trailing":
                said = self._trailing_flaw(num_inference_steps)
            if said is not None:
                scheduler.register_to_config(timestep_spacing="leading")
            scheduler.set_timesteps(num_inference_steps, device="cpu", **evenly)
            first = scheduler.timesteps[0].item()
            if given is not None and _begins_late(first, num_inference_steps, num_train_timesteps):
                said = f"begins at timestep {first:g} of {num_train_timesteps}; 'trailing' is used instead"
                scheduler.register_to_config(timestep_spacing="trailing")
                scheduler.set_timesteps(num_inference_steps, device="cpu")
            sigmas = getattr(scheduler, "sigmas", (0.0, 0.0))
            if given is not None and getattr(scheduler, "order", 1) == 2 and sigmas[0] > 100 * max(sigmas[1], 1):
                # Such a schedule begins at almost pure noise, for the cosine one at σ/α = 20,000, from where a step of
                # second order lands far outside of the data by the smallest error of a prediction.
                said = f"leaps from a noise of {sigmas[0]:g} to {sigmas[1]:g} at first; 'leading' is used instead"
                scheduler.register_to_config(timestep_spacing="leading")
                scheduler.set_timesteps(num_inference_steps, device="cpu")
            init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))  # a function of the spacing
        finally:
            if said is not None:
                scheduler.register_to_config(timestep_spacing=given)  # it is the user's
        if said is not None:
            logger.warning(f"{type(scheduler).__name__} with timestep_spacing={given!r} {said}")
        if scheduler.timesteps[-1] < 0:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} can't be spread over {num_train_timesteps} timesteps; use "
                "a number that divides it"
            )
        twice = len(scheduler.timesteps.unique()) < num_inference_steps
        if twice and "solver_order" in scheduler.config and self.config.prediction_type != "flow_prediction":
            raise ValueError(
                f"num_inference_steps={num_inference_steps} makes {type(scheduler).__name__} visit a timestep twice, "
                "by which it would divide by zero; use fewer"
            )
        return init_noise_sigma

    def _trailing_flaw(self, num_inference_steps: int) -> str | None:
        """Why "trailing" timesteps are none for the scheduler, in words; `None` where they are."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        num_train_timesteps = scheduler.config.num_train_timesteps
        instead = "'leading' is used instead"
        if name in DIVIDING_SCHEDULERS and num_train_timesteps % num_inference_steps:
            return f"needs steps that divide {num_train_timesteps}; {instead}"
        if name in LEAPING_SCHEDULERS and not scheduler.config.get("rescale_betas_zero_snr"):
            return f"would leap at first; {instead}"
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        if scheduler.timesteps[-1] < 0:  # diffusers' rounding, by 61 steps of 1000 and some others
            return f"has no {num_inference_steps} steps; {instead}"
        if self.unet.dtype == torch.float16 and float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1e4:
            return f"begins with noise that float16 can't hold; {instead}"
        return None

    def get_timesteps(self, strength: float) -> tuple[torch.Tensor, int]:
        """The timesteps that denoise a picture noised to `strength`, and the index of the first of them."""
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps
        order = getattr(scheduler, "order", 1)
        steps = -(-len(timesteps) // order)  # second-order schedulers have two timesteps a step, but for the last
        start = min((steps - _steps_of(strength, steps)) * order, len(timesteps))
        if type(scheduler).__name__ == "LMSDiscreteScheduler":  # takes its index for the number of steps done
            scheduler.timesteps, scheduler.sigmas = timesteps[start:], scheduler.sigmas[start:]
            scheduler.set_begin_index(0)
        elif hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return timesteps[start:], start

    def noise_levels(self, timesteps: torch.Tensor) -> list[tuple[float, float]]:
        """(α, σ) of what the UNet sees at each timestep: α clean + σ noise."""
        timesteps = timesteps.double().cpu()
        if self.config.prediction_type == "flow_prediction":
            sigmas = timesteps / self.scheduler.config.num_train_timesteps
            return [(1 - sigma, sigma) for sigma in sigmas.tolist()]
        alphas = self.scheduler.alphas_cumprod.double().cpu().clamp(1e-12, 1 - 1e-12).numpy()
        # Schedulers that put a timestep between two of training do it by the logarithm of σ/α, too.
        log_ratio = np.interp(timesteps.numpy(), np.arange(len(alphas)), np.log(1 / alphas - 1))
        alpha_squared = 1 / (1 + np.exp(log_ratio))
        return [(float(value) ** 0.5, float(1 - value) ** 0.5) for value in alpha_squared]

    def prepare_latents(self, num_images, dtype, device, generator, latents=None):
        """Standard normal noise `(B, C, H, W)`, or what was given for it."""
        if latents is None:
            shape = (num_images, *self._latent_shape())
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype)

    def add_noise(
        self, clean: torch.Tensor, noise: torch.Tensor, level: tuple[float, float], init_noise_sigma: float
    ) -> torch.Tensor:
        """Clean latents `(B, C, H, W)`, noised to a level (α, σ), as the scheduler keeps them.

        Not by the scheduler's own `add_noise`: that of some means another level than the UNet is told of next, and
        looks it up on the device.
        """
        alpha, sigma = level
        if init_noise_sigma != 1:  # these keep clean + σ/α noise, and scale it for the UNet
            return clean + sigma / alpha * noise
        return alpha * clean + sigma * noise

    def prepare_extra_step_kwargs(self, generator, eta):
        # Schedulers differ in what their step takes: few have eta, deterministic ones have no generator.
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {}
        if "eta" in accepted and eta > 0:  # that of TCD is another η, and has another default
            extra["eta"] = eta
        if "generator" in accepted:
            extra["generator"] = generator
        return extra

    def preprocess_image(self, image: Any) -> torch.Tensor:
        """Pictures `(B, C, H, W)` in [-1, 1], of the pipeline's size, from PIL images (of any size and mode), arrays
        `(B, H, W, C)` or tensors `(B, C, H, W)` in [0, 1]; latents `(B, C, h, w)` stay what they are.

        Raises:
            ValueError: it is none of these, or has other channels.
        """
        if isinstance(image, torch.Tensor) and self.vqvae is not None and image.shape[-3:] == self._latent_shape():
            return image if image.ndim == 4 else image.unsqueeze(0)
        channels = self.unet.config.in_channels if self.vqvae is None else self.vqvae.config.in_channels
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if images and all(isinstance(one, PIL.Image.Image) for one in images):
            images = [_eight_bits(one).convert("L" if channels == 1 else "RGB") for one in images]
        pictures = self._preprocess(self.image_processor, images, "image")
        if pictures.shape[1] != channels:
            raise ValueError(f"image must have {channels} channels, not {pictures.shape[1]}")
        return pictures

    def preprocess_mask(self, mask_image: Any, image: Any) -> torch.Tensor:
        """Masks `(B, 1, H, W)`, 1 where a picture is to be drawn anew and 0 where it is to be kept.

        Raises:
            ValueError: a mask of another size than the picture.
        """
        masks = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image]
        if isinstance(image, torch.Tensor) and self.vqvae is not None and image.shape[-3:] == self._latent_shape():
            sizes = [self.image_size]
        else:
            sizes = [_size_of(one) for one in (image if isinstance(image, (list, tuple)) else [image])]
        for index in range(max(len(masks), len(sizes))):
            (height, width), size = _size_of(masks[index % len(masks)]), sizes[index % len(sizes)]
            if (height, width) != size or 0 in size:
                raise ValueError(f"mask_image is {height}x{width}, but image is {size[0]}x{size[1]}; make them alike")
        masks = [_mask_of_zeros_and_ones(mask) for mask in masks]
        return self._preprocess(self.mask_processor, masks, "mask_image")

    def _preprocess(self, processor, images, what):
        height, width = self.image_size
        images = [one / 255.0 if getattr(one, "dtype", None) in (np.uint8, torch.uint8) else one for one in images]
        if any(isinstance(one, torch.Tensor) and one.is_floating_point() and one.min() < 0 for one in images):
            raise ValueError(f"{what} holds values outside of [0, 1]")  # which would be taken for [-1, 1]
        empty = any(0 in getattr(one, "shape", ()) for one in images)
        if not images or empty or not all(isinstance(one, type(images[0])) for one in images):
            raise ValueError(f"{what} must be a picture or a list of them, all of one type")
        try:
            pictures = processor.preprocess(images if len(images) > 1 else images[0], height, width).float()
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{what} must be PIL images, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1], not "
                f"{type(images[0]).__name__}"
            ) from error
        lowest = -1.0 if processor is self.image_processor else 0.0
        if not (pictures.min() >= lowest - 1e-3 and pictures.max() <= 1 + 1e-3):  # nor where it is no number
            raise ValueError(f"{what} holds values outside of [0, 1]")
        return pictures

    def encode_images(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures `(B, C, H, W)` in [-1, 1] to latents as the UNet knows them; latents stay as they are."""
        if self.vqvae is None or tuple(pictures.shape[1:]) == self._latent_shape():
            return pictures
        with _upcast(self.vqvae) as vqvae:
            return scale_latents(vqvae.config, raw_latents(vqvae, pictures.to(vqvae.dtype)))

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the UNet knows them to pictures `(B, C, H, W)` in about [-1, 1]."""
        if self.vqvae is None:
            return latents
        latents = unscale_latents(self.vqvae.config, latents)
        at_once = max(1, DECODED_AT_ONCE // (latents[0, 0].numel() * self.vae_scale_factor**2))
        return torch.cat([self._decode(some) for some in latents.split(at_once)])

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.vqvae, VQModel):
            with _upcast(self.vqvae) as vqvae:
                return vqvae.decode(latents.to(vqvae.dtype)).sample
        # The nearest code is found in float32: half precision would choose another for one latent in ten.
        codes, dtype = self.vqvae.quantize.embedding.weight.to(latents.device), self.vqvae.dtype
        if dtype == torch.float32:
            return self.vqvae.decode(latents.float()).sample
        flat = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])  # (B·h·w, C)
        nearest = torch.cdist(flat, codes.float()).argmin(dim=1)
        quantized = codes[nearest].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)  # (B, C, h, w)
        return self.vqvae.decode(quantized.to(dtype), force_not_quantize=True).sample

    def _prepare_conditioning(self, tokens, num_images_per_prompt, device, dtype, label_weights=None) -> dict:
        """What the UNet and the classifier are told of the labels, and how much of each."""
        if tokens is not None:
            tokens = tokens.to(device=device, dtype=dtype).repeat_interleave(num_images_per_prompt, dim=0)
        takes_labels = num_label_classes(self.unet.config) > 0
        of_unet = unet_conditioning(self.unet.config, tokens if takes_labels else None)
        conditioning = {"tokens": tokens, "labels": of_unet}
        if self.config.has_null_label and takes_labels:  # also where guidance is off now: a callback may turn it on
            null_and_label = torch.cat([torch.zeros_like(tokens), tokens])
            conditioning["null_and_labels"] = unet_conditioning(self.unet.config, null_and_label)
        if label_weights is not None and not label_weights.isnan().all():  # there are labels
            weights = label_weights.to(device=device, dtype=dtype).repeat_interleave(num_images_per_prompt, dim=0)
            slots = (~weights.isnan()).any(dim=0).nonzero()[:, 0].tolist()  # S of the T, where any set has a label
            without = torch.stack([tokens] * len(slots))  # (S, B, T, K), the i-th without its label
            without[range(len(slots)), :, slots] = 0
            every = torch.cat([null_and_label, without.flatten(0, 1)])
            conditioning["without_each"] = unet_conditioning(self.unet.config, every)
            conditioning["label_weights"] = weights.T[slots][..., None, None, None]  # (S, B, 1, 1, 1)
        return conditioning

    def _predict(self, sample, timestep, level, conditioning, guided=True) -> torch.Tensor:
        """What the UNet says of a noisy `sample` `(B, C, H, W)`, guided by whatever the call asked for.

        Args:
            timestep: on the UNet's device, without dimensions.
            level: (α, σ) at that timestep.
            conditioning: of `_prepare_conditioning`.
        """
        if guided and "without_each" in conditioning:
            weights = conditioning["label_weights"]
            every = torch.cat([sample] * (2 + len(weights)))
            every = self._denoise(self.unet, every, timestep, conditioning["without_each"])
            null, cond, *without = every.chunk(2 + len(weights))
            scale = max(self.guidance_scale, 1.0)
            more = torch.nan_to_num(weights - scale)  # w_i - w
            output = null + scale * (cond - null) + (more * (cond - torch.stack(without))).sum(dim=0)
            if self.guidance_rescale > 0:
                output = rescale_guidance(output, cond, self.guidance_rescale)
        elif not (guided and self.do_classifier_free_guidance):
            output = self._denoise(self.unet, sample, timestep, conditioning["labels"])
        else:
            if self.guidance_unet is not None:
                cond = self._denoise(self.unet, sample, timestep, conditioning["labels"])
                weak = self._denoise(self.guidance_unet, sample, timestep, conditioning["labels"])
            elif "null_and_labels" not in conditioning:  # a callback turned it on
                raise ValueError("guidance needs a model trained with label dropout, or a guidance_unet")
            else:
                both = torch.cat([sample] * 2)
                both = self._denoise(self.unet, both, timestep, conditioning["null_and_labels"])
                weak, cond = both.chunk(2)
            output = weak + self.guidance_scale * (cond - weak)
            if self.guidance_rescale > 0:
                output = rescale_guidance(output, cond, self.guidance_rescale)
        alpha, sigma = level
        if guided and self.classifier_guidance_scale > 0 and alpha > 1e-3:  # where there is any signal
            slices = zip(*(every.split(_at_once(sample)) for every in (sample, conditioning["tokens"])))
            gradient = torch.cat([self._classifier_gradient(some, timestep, tokens) for some, tokens in slices])
            # score + s gradient (Dhariwal and Nichol 2021, eq. 13), in terms of what the UNet predicts
            factor = {"epsilon": -sigma, "sample": sigma**2 / alpha}.get(self.config.prediction_type, -sigma / alpha)
            output = output + (self.classifier_guidance_scale * factor) * gradient.to(output.dtype)
        return output

    def _denoise(self, unet, sample, timestep, conditioning: dict) -> torch.Tensor:
        """What a UNet says of `(B, C, H, W)`, some of them at a time; they don't depend on each other."""
        at_once = _at_once(sample)
        said = []
        for start in range(0, len(sample), at_once):
            some = slice(start, start + at_once)
            told = {name: tensor if tensor is None else tensor[some] for name, tensor in conditioning.items()}
            said.append(unet(sample[some], timestep, **told, return_dict=False)[0])
        return torch.cat(said) if len(said) > 1 else said[0]

    def _classifier_gradient(self, sample, timestep, tokens) -> torch.Tensor:
        """∇ log p(labels | sample) of the classifier, `(B, C, H, W)`, float32."""
        level = (timestep / self.scheduler.config.num_train_timesteps).expand(len(sample))
        config = self.classifier.config
        with torch.inference_mode(False), torch.enable_grad():
            noisy = sample.detach().float().clone().requires_grad_()
            inputs = classifier_inputs(noisy, level, config.image_size)
            logits = self.classifier(pixel_values=inputs.to(self.classifier.dtype)).logits.float()  # (B, K)
            if config.problem_type == "multi_label_classification":
                log_probabilities = F.logsigmoid(logits)
            else:
                log_probabilities = F.log_softmax(logits, dim=1)
            wanted = tokens.float().sum(dim=1).clone()  # (B, K); zeros for the null label, which asks for nothing
            return torch.autograd.grad((wanted * log_probabilities).sum(), noisy)[0]

    # -- the call -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        labels: Any = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        label_guidance_scale: Sequence[Sequence[float]] | torch.Tensor | None = None,
        classifier_guidance_scale: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: Any = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate pictures of the given labels, vary given pictures, or draw parts of them anew.

        Args:
            labels: one entry a picture: an id, a name, a set of them, or `None` for the null label; or a tensor (see
                [`~ClassConditionalPipeline.encode_labels`]). `None` draws one picture without a label.
            image (*optional*): a picture or a list of them, one for all labels or one for each: PIL images, which are
                scaled to the pipeline's size, arrays `(B, H, W, C)` or tensors `(B, C, H, W)` in [0, 1], or latents.
                It is noised to `strength` and denoised by the labels (Meng et al. 2022, SDEdit).
            mask_image (*optional*): of the size of `image`; what is white (over 0.5) is drawn anew, the rest is kept.
            strength (`float`, *optional*): the part of the steps that is done, in [0, 1]: 0 gives the picture back, 1
                forgets it. By default 0.8, with a mask 1.
            num_images_per_prompt (`int`): pictures for each entry of `labels`.
            num_inference_steps (`int`, *optional*): denoising steps; the pipeline's recommended number by default.
            timesteps (`Sequence[float]`, *optional*): descending timesteps instead, for schedulers that take them.
            guidance_scale (`float`, *optional*): w of classifier-free guidance, uncond + w (cond - uncond) (Ho and
                Salimans 2022); it acts when > 1. With a `guidance_unet`, weak + w (cond - weak) (Karras et al. 2024).
                The pipeline's recommended one by default.
            guidance_interval (`tuple[float, float]`, *optional*): the part of the steps that is guided, 0 being the
                first step and 1 the last (Kynkäänniemi et al. 2024), whatever guides; the others cost half. By default
                the pipeline's recommended one where `guidance_scale` is its own, too, and else all.
            guidance_rescale (`float`): φ of Lin et al. 2023, eq. 16, in [0, 1].
            label_guidance_scale (*optional*): a guidance of its own for each label of a set, a sequence of numbers
                for each entry of `labels`, w_i: uncond + w (cond - uncond) + Σ_i (w_i - w) (cond - cond without
                label i). A label with w_i over w is insisted on, one below is played down, and with w_i = w nothing
                changes (w is `guidance_scale`, at least 1). Every label of the largest set costs one more pass
                through the UNet.
            classifier_guidance_scale (`float`, *optional*): s of classifier guidance (Dhariwal and Nichol 2021), on
                top of the other or instead of it; it acts when > 0. The pipeline's recommended one by default.
            eta (`float`): η of DDIM (Song et al. 2021, eq. 16), in [0, 1]; other schedulers ignore it.
            generator (`torch.Generator` or a list of them, *optional*): with a list, one for each picture, a picture
                depends on its own generator and not on the batch it is drawn in.
            latents (`torch.Tensor`, *optional*): standard normal noise `(B, C, H, W)` to start from, or to noise
                `image` by.
            output_type (`str`): `"pil"`; `"np"`, `(B, H, W, C)` in [0, 1]; `"pt"`, `(B, C, H, W)` in [0, 1]; or
                `"latent"`, what the UNet ends with.
            return_dict (`bool`): an [`ImagePipelineOutput`] rather than a tuple.
            callback_on_step_end: called after each step as `callback(pipe, step_index, timestep, tensors)`; the
                `latents` of the dict that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): which tensors it sees: `"latents"` and
                `"pred_original_sample"`, the clean latents as predicted in this step.
            class_labels: an alias of `labels`.

        Examples:

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple with them.

        Raises:
            ValueError, TypeError: an argument that can't be served, before the first step.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check, before any work
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be a function, not {callback_on_step_end!r}")
        if labels is not None and class_labels is not None:
            raise ValueError("class_labels is an alias of labels; give one of them")
        labels = class_labels if labels is None else labels
        tokens = self.encode_labels(labels)  # (B, T, K) or None
        guidance_scale, guidance_interval = guidance_of(self.config, guidance_scale, guidance_interval)
        if classifier_guidance_scale is None:
            classifier_guidance_scale = self.config.default_classifier_guidance_scale
            if labels is not None and num_label_classes(self.unet.config) == 0:
                classifier_guidance_scale = classifier_guidance_scale or 1.0  # nothing else would obey them
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if isinstance(generator, tuple):
            generator = list(generator)
        if image is None and (strength is not None or mask_image is not None):
            raise ValueError("strength and mask_image need an image; without one, pictures are drawn from noise")
        if image is not None and strength is None:
            strength = 0.8 if mask_image is None else 1.0
        pictures = self.preprocess_image(image) if image is not None else None  # (1 or B, C, H, W)
        mask = self.preprocess_mask(mask_image, image) if mask_image is not None else None  # (1 or B, 1, H, W)
        counts = {
            name: len(values)
            for name, values in (("labels", tokens), ("image", pictures), ("mask_image", mask))
            if values is not None
        }
        batch_size = max(counts.values(), default=1)
        if any(count not in (1, batch_size) for count in counts.values()):
            said = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"labels, image and mask_image must be one for all or one for each picture, not {said}")
        if counts.get("labels") == 0:
            batch_size = 0
        self.check_inputs(
            batch_size=batch_size,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            classifier_guidance_scale=classifier_guidance_scale,
            eta=eta,
            generator=generator,
            latents=latents,
            strength=strength,
            has_labels=labels is not None,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        label_weights = self._check_label_guidance(label_guidance_scale, tokens)
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._classifier_guidance_scale = classifier_guidance_scale
        device, dtype = self._execution_device, self.unet.dtype
        num_images = batch_size * num_images_per_prompt

        # 2. Labels, with and without the unconditional half
        if tokens is not None and len(tokens) == 1:
            tokens = tokens.expand(batch_size, -1, -1)
            label_weights = label_weights.expand(batch_size, -1) if label_weights is not None else None
        conditioning = self._prepare_conditioning(tokens, num_images_per_prompt, device, dtype, label_weights)

        # 3. Timesteps, and what to denoise
        init_noise_sigma = self._set_timesteps(num_inference_steps, timesteps)
        all_steps = len(self.scheduler.timesteps)
        timesteps, first_step = self.get_timesteps(1.0 if strength is None else strength)
        self._num_timesteps = len(timesteps)
        levels = self.noise_levels(timesteps)
        timesteps_on_device = timesteps.to(device)  # once: from here on the CPU never waits for the device
        noise = self.prepare_latents(num_images, dtype, device, generator, latents)
        if pictures is not None:
            pictures = _for_each(pictures, batch_size, num_images_per_prompt).to(device)
            clean = self.encode_images(pictures).to(dtype)  # (B, C, h, w)
        if mask is not None:
            mask = _for_each(mask, batch_size, num_images_per_prompt).to(device=device, dtype=dtype)
            redrawn = F.adaptive_max_pool2d(mask, noise.shape[-2:])  # (B, 1, h, w): all that the mask touches
        if pictures is None or strength == 1:
            latents = noise * init_noise_sigma
        else:
            latents = self.add_noise(clean, noise, levels[0], init_noise_sigma) if strength > 0 else clean
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 4. Denoise
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                progress = (first_step + i) / max(all_steps - 1, 1)
                guided = guidance_interval[0] <= progress <= guidance_interval[1]
                sample = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    sample = self.scheduler.scale_model_input(latents, t).to(dtype)
                model_output = self._predict(sample, timesteps_on_device[i], levels[i], conditioning, guided)
                if "pred_original_sample" in callback_on_step_end_tensor_inputs:
                    pred_original_sample = predict_clean(model_output, sample, *levels[i], self.config.prediction_type)
                latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]
                latents = latents.to(dtype)  # some schedulers compute in float32
                if mask is not None:
                    last = i + 1 == len(timesteps)
                    kept = clean if last else self.add_noise(clean, noise, levels[i + 1], init_noise_sigma)
                    latents = redrawn * latents + (1 - redrawn) * kept

                if callback_on_step_end is not None:
                    tensors = {}
                    for key in callback_on_step_end_tensor_inputs:
                        tensors[key] = locals()[key]
                    returned = callback_on_step_end(self, i, t, tensors)
                    if not isinstance(returned, (dict, type(None))):
                        raise TypeError(
                            f"callback_on_step_end must return a dict of tensors or None, not {returned!r}"
                        )
                    latents = (returned or {}).pop("latents", latents)
                progress_bar.update()

        # 5. Decode
        if output_type == "latent":
            images = latents
        else:
            images = self.decode_latents(latents)
            if mask is not None and images.shape == pictures.shape:  # what is kept is kept to the bit
                images = mask * images + (1 - mask) * pictures.to(images.dtype)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def interpolate(
        self,
        labels: Any = None,
        num_images: int = 8,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        """Pictures on the way from one to another: between two seeds, two labels, or both, by [`slerp`].

        Args:
            labels: none, one entry for all pictures, or two to go from and to.
            num_images (`int`): how many, with both ends.
            generator: two draw the noise of the two ends, one draws the same noise for all. What a stochastic
                scheduler adds is the same for all pictures.
            latents (`torch.Tensor`, *optional*): `(1, C, H, W)` or `(2, C, H, W)`, the noise of the ends instead.
            kwargs: of a call.

        Raises:
            ValueError: more than two ends, or what a call raises.
        """
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        tokens = self.encode_labels(labels)
        for what, count in (
            ("labels", 1 if tokens is None else len(tokens)),
            ("generator", len(generators)),
            ("latents", 1 if latents is None else len(latents)),
        ):
            if count not in (1, 2):
                raise ValueError(f"interpolate goes between two {what}, or keeps one, not {count}")
        if any(one is not None and not isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator must be a torch.Generator or two of them, not {generator!r}")
        if latents is not None and tuple(latents.shape[1:]) != self._latent_shape():
            shape = ", ".join(map(str, self._latent_shape()))
            raise ValueError(f"latents must have the shape (1 or 2, {shape}), not {tuple(latents.shape)}")
        if not isinstance(num_images, int) or num_images < 2:
            raise ValueError(f"num_images must be a whole number of at least 2, not {num_images!r}")
        weights = torch.linspace(0, 1, num_images)
        if latents is None:
            ends = [self.prepare_latents(1, self.unet.dtype, self._execution_device, one) for one in generators]
            latents = torch.cat(ends)
        latents = slerp(latents[0], latents[-1], weights)  # (N, C, H, W)
        if tokens is not None:
            tokens = torch.stack(
                [slerp(first, last, weights) for first, last in zip(tokens[0], tokens[-1])], dim=1
            )  # (N, T, K)
        else:
            kwargs["num_images_per_prompt"] = num_images
        one = generators[0]  # what is added on the way is the same for all
        copies = [_copy(one) for _ in range(num_images)] if one is not None else None
        return self(labels=tokens, latents=latents, generator=copies, **kwargs)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        labels: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        num_refinements: int = 3,
    ) -> torch.Tensor:
        """The noise `(B, C, H, W)` from which this pipeline draws the given pictures: DDIM inversion.

        `pipe(labels=labels, latents=pipe.invert(image, labels), guidance_scale=1)` is `image` again, as well as its
        autoencoder can, and with other labels it is the same hand writing something else. Each step of the
        deterministic sampler, x_s = α_s x̂(x_t) + σ_s ε̂(x_t) (Song et al. 2021, eq. 12), is solved for x_t by
        fixed-point iterations; the first takes ε̂ at x_s, as plain inversion does.

        Args:
            image: as in a call.
            labels: what the pictures show.
            num_inference_steps (`int`, *optional*): as many as the picture is to be drawn in.
            guidance_scale (`float`): to be drawn by; over 1 the inversion is rough.
            num_refinements (`int`): iterations after the first.

        Raises:
            ValueError: another scheduler than DDIM (for flows: Euler), or what a call raises.
        """
        flow = self.config.prediction_type == "flow_prediction"
        name = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        if type(self.scheduler).__name__ != name:
            raise ValueError(f"invert runs {name} backwards, not {type(self.scheduler).__name__}; swap it in before")
        if not isinstance(num_refinements, int) or num_refinements < 0:
            raise ValueError(f"num_refinements must be a whole number of at least 0, not {num_refinements!r}")
        tokens = self.encode_labels(labels)
        pictures = self.preprocess_image(image)
        batch_size = max(len(pictures), 1 if tokens is None else len(tokens))
        if len(pictures) not in (1, batch_size) or (tokens is not None and len(tokens) not in (1, batch_size)):
            raise ValueError(f"labels must be one for all or one for each of {len(pictures)} pictures")
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        has_labels = labels is not None
        self.check_inputs(batch_size, 1, num_inference_steps, guidance_scale=guidance_scale, has_labels=has_labels)
        self._guidance_scale, self._guidance_rescale, self._classifier_guidance_scale = guidance_scale, 0.0, 0.0
        device, dtype = self._execution_device, self.unet.dtype

        tokens = None if tokens is None else tokens.expand(batch_size, -1, -1)
        conditioning = self._prepare_conditioning(tokens, 1, device, dtype)
        self._set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        levels = self.noise_levels(timesteps)
        if flow:
            next_levels = [*levels[1:], (1.0, 0.0)]
        else:
            stride = self.scheduler.config.num_train_timesteps // num_inference_steps
            final = float(self.scheduler.final_alpha_cumprod)
            next_levels = [
                level if t >= stride else (final**0.5, (1 - final) ** 0.5)
                for t, level in zip(timesteps.tolist(), self.noise_levels((timesteps - stride).clamp(min=0)))
            ]
        latents = self.encode_images(_for_each(pictures, batch_size, 1).to(device)).to(dtype)
        on_device = timesteps.to(device)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i in reversed(range(len(timesteps))):
                (alpha, sigma), (next_alpha, next_sigma) = levels[i], next_levels[i]
                less_noisy = latents
                for _ in range(1 + num_refinements):
                    model_output = self._predict(latents, on_device[i], levels[i], conditioning)
                    clean = predict_clean(model_output, latents, alpha, sigma, self.config.prediction_type)
                    # Whichever of the two predictions hardly moves with the sample makes the iteration contract.
                    if next_sigma > next_alpha:
                        noise = (less_noisy - next_alpha * clean) / next_sigma
                    else:
                        noise = (latents - alpha * clean) / sigma
                        clean = (less_noisy - next_sigma * noise) / next_alpha
                    latents = alpha * clean + sigma * noise
                progress_bar.update()
        self.maybe_free_model_hooks()
        return latents


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def noise_schedule(scheduler_config: Any, prediction_type: str) -> dict:
    """What says how noisy a timestep is: the settings by which a scheduler makes its noise levels."""
    keys = ["num_train_timesteps"]
    if prediction_type != "flow_prediction":
        keys += ["beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"]
    schedule = {key: scheduler_config.get(key) for key in keys}
    if schedule.get("beta_schedule") == "squaredcos_cap_v2":  # has no ends to be set
        schedule.pop("beta_start")
        schedule.pop("beta_end")
    schedule["rescale_betas_zero_snr"] = bool(schedule.get("rescale_betas_zero_snr"))
    return schedule if prediction_type != "flow_prediction" else {**schedule, "flow": True}


def can_compile(device: torch.device, backend: str | Callable) -> bool:
    """Whether there is what `torch.compile` needs, on a CPU a C++ compiler; if not, a warning says so."""
    if device.type != "cpu" or backend != "inductor":
        return True
    found = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
    if not found:
        logger.warning("Nothing is compiled: that needs a C++ compiler on a CPU, such as g++, and there is none.")
    return found


def _stock_scheduler(scheduler):
    """A scheduler as diffusers can load it: itself, or what it is derived from."""
    cls = type(scheduler)
    if cls.__module__.split(".")[0] == "diffusers":
        return scheduler
    base = next((one for one in cls.__mro__ if one.__module__.startswith("diffusers.") and hasattr(one, "step")), None)
    if base is None:
        raise ValueError(
            f"{cls.__name__} is no scheduler of diffusers, nor derived from one, so nobody else could load it; give "
            "the pipeline another scheduler before it is saved"
        )
    logger.warning(f"{cls.__name__} is no scheduler of diffusers; the pipeline is saved with a {base.__name__}")
    known = inspect.signature(base.__init__).parameters
    return base.from_config({key: value for key, value in scheduler.config.items() if key in known})


def _steps_of(strength: float, num_inference_steps: int) -> int:
    return min(int(num_inference_steps * strength + 1e-6), num_inference_steps)


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Of gray in 16 bits its upper 8, to which it would otherwise be clipped."""
    if not image.mode.startswith("I"):
        return image
    return PIL.Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))


def _begins_late(first: float, num_inference_steps: int, num_train_timesteps: int) -> bool:
    # "leading" divides whole numbers: 600 steps of 1000 are 599, 598, …, which pure noise doesn't look like
    return first < num_train_timesteps - max(2 / num_inference_steps, 0.1) * num_train_timesteps


def _size_of(image: Any) -> tuple[int, int]:
    """Height and width of a picture or a batch, before it is scaled."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if isinstance(image, torch.Tensor) and image.ndim >= 2:
        return tuple(image.shape[-2:])
    if isinstance(image, np.ndarray) and image.ndim >= 2:
        channels_last = image.ndim == 4 or (image.ndim == 3 and image.shape[-1] in (1, 3, 4))
        return tuple(image.shape[-3:-1] if channels_last else image.shape[-2:])
    raise ValueError(f"a picture must be a PIL image, an array or a tensor, not {type(image).__name__}")


def _mask_of_zeros_and_ones(mask: Any) -> Any:
    """Masks of booleans, and of whole numbers to 1 or to 255, as floating-point ones."""
    if isinstance(mask, PIL.Image.Image):
        return mask
    mask = mask if isinstance(mask, np.ndarray) else mask.detach()
    values = torch.as_tensor(mask)
    if not values.is_floating_point():
        mask = mask / (255.0 if values.max() > 1 else 1.0)
        values = torch.as_tensor(mask)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError("mask_image holds values outside of [0, 1]")
    return mask


def _for_each(tensor: torch.Tensor, batch_size: int, num_images_per_prompt: int) -> torch.Tensor:
    if len(tensor) == 1:
        tensor = tensor.expand(batch_size, *tensor.shape[1:])
    return tensor.repeat_interleave(num_images_per_prompt, dim=0)


def _copy(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(device=generator.device)
    copied.set_state(generator.get_state())
    return copied


def _few(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
