"""Class-conditional image generation with stock diffusers components.

This file is the whole pipeline. Every repository that it saves carries a copy of it beside `model_index.json`, so that
`DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works where nothing but diffusers is installed. It
therefore imports torch, numpy, diffusers and what diffusers depends on, and nothing else.

It also owns the one encoding of labels (`label_ids`, `label_tokens`, `unet_conditioning`) that training imports, so
that training and sampling can't disagree about what a label is.
"""

import difflib
import hashlib
import inspect
import json
import numbers
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo


NULL_LABEL = -1  # the id that pads a set of labels; its token is all zeros

# A step of these draws noise from the global state, so a picture could not belong to its generator.
SCHEDULERS_WITHOUT_GENERATOR = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
# These keep the name of a prediction type and mean another parametrisation, or another task, by it.
SCHEDULERS_OF_OTHER_MODELS = (
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
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
        ValueError: an id outside [0, K), an unknown name (the nearest known one is named), too many labels in a set.
        TypeError: an entry that is none of the above.
    """
    if isinstance(labels, (torch.Tensor, np.ndarray)):
        array = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (0, 1, 2):
            raise TypeError(
                f"labels given as a tensor must be integer ids of shape (B,) or (B, T), or floating-point vectors of "
                f"shape (B, K) or (B, T, K), not {array.dtype} of shape {tuple(array.shape)}"
            )
        rows = array.reshape(len(array) if array.ndim else 1, -1).tolist()
        sets = [[label for label in row if label != NULL_LABEL] for row in rows]
    else:
        if labels is None or isinstance(labels, (str, numbers.Integral)):
            labels = [labels]
        if not isinstance(labels, Sequence):
            raise TypeError(f"labels must be an id, a name, or a sequence of them, not {type(labels).__name__}")
        sets = [_as_set(entry) for entry in labels]

    name2id = {name: index for index, name in id2label.items()}
    ids = torch.full((len(sets), max_labels), NULL_LABEL, dtype=torch.long)  # (B, T)
    for row, entry in enumerate(sets):
        if len(entry) > max_labels:
            raise ValueError(f"labels[{row}] holds {len(entry)} labels, but this model takes at most {max_labels}")
        for slot, label in enumerate(entry):
            ids[row, slot] = _label_id(label, name2id, len(id2label))
    return ids


def _as_set(entry: Any) -> list:
    if entry is None:
        return []
    if isinstance(entry, (str, numbers.Integral)):
        return [entry]
    if isinstance(entry, torch.Tensor):
        return entry.reshape(-1).tolist()
    if isinstance(entry, (Sequence, np.ndarray)):
        return list(entry)
    raise TypeError(f"a label must be an id, a name, None, or a sequence of ids and names, not {entry!r}")


def _label_id(label: int | str, name2id: dict[str, int], num_classes: int) -> int:
    if isinstance(label, str):
        if label in name2id:
            return name2id[label]
        nearest = difflib.get_close_matches(label, name2id, n=1, cutoff=0.0)
        hint = f"the nearest known one is {nearest[0]!r}" if nearest else "this model knows no label names"
        raise ValueError(f"unknown label {label!r}; {hint}")
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        if 0 <= label < num_classes:
            return int(label)
        raise ValueError(f"label {label} is out of range; this model knows the ids 0 to {num_classes - 1}")
    raise TypeError(f"a label must be an id or a name, not {label!r}")


def label_tokens(ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Ids `(B, T)`, padded with -1, to one-hot tokens `(B, T, K)`, float32; the padding becomes zeros."""
    tokens = torch.nn.functional.one_hot(ids.clamp(min=0), num_classes)  # (B, T, K)
    return tokens.float() * (ids >= 0).unsqueeze(-1)


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
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


class ClassConditionalPipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation in pixel space or in the latent space of a `VQModel`.

    What sampling must know about training is part of the pipeline's config and travels with it.

    Args:
        unet ([`UNet2DConditionModel`]): denoises pictures or latents. It owns the label table, as
            `class_embed_type="simple_projection"` or `encoder_hid_dim_type="text_proj"`; with neither the pipeline is
            unconditional.
        scheduler ([`SchedulerMixin`]): any diffusers scheduler that does `prediction_type`; swap it by `from_config`.
        vqvae ([`VQModel`], *optional*): decodes latents; without it the UNet works on pixels in [-1, 1].
        id2label (`dict[int, str]`, *optional*): the name of each label id.
        prediction_type (`str`): what the UNet was trained to predict: `epsilon`, `sample` or `v_prediction`.
        has_null_label (`bool`): whether labels were dropped in training, which guidance and `labels=None` need.
        max_labels (`int`): T, the most labels that a picture has.
        default_guidance_scale (`float`): what `guidance_scale=None` means.
        default_num_inference_steps (`int`): what `num_inference_steps=None` means.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _optional_components = ["vqvae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vqvae: VQModel | None = None,
        id2label: dict | None = None,
        prediction_type: str = "epsilon",
        has_null_label: bool = False,
        max_labels: int = 1,
        default_guidance_scale: float = 1.0,
        default_num_inference_steps: int = 50,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)
        num_classes = num_label_classes(unet.config) if unet is not None else 0
        if not id2label:
            id2label = {index: str(index) for index in range(num_classes)}
        # JSON makes int keys strings, and sorts them as such
        id2label = {int(index): str(name) for index, name in sorted(id2label.items(), key=lambda item: int(item[0]))}
        if len(set(id2label.values())) < len(id2label):
            raise ValueError("id2label must give every id a name of its own")
        if unet is not None and sorted(id2label) != list(range(num_classes)):
            raise ValueError(
                f"id2label must name the ids 0 to {num_classes - 1} of the UNet's {num_classes} classes, "
                f"not {sorted(id2label)}"
            )
        if unet is not None and vqvae is not None:
            channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
            if unet.config.in_channels != channels:
                raise ValueError(
                    f"the UNet works on {unet.config.in_channels} channels, but the VQModel's latents have {channels}"
                )
        self.register_to_config(
            id2label=id2label,
            prediction_type=prediction_type,
            has_null_label=has_null_label,
            max_labels=max_labels,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )
        self.vae_scale_factor = 2 ** (len(vqvae.config.block_out_channels) - 1) if vqvae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # -- persistence: a saved folder carries this file and names it ---------------------------------------------------

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
        super().save_pretrained(str(save_directory), safe_serialization, variant, max_shard_size, **kwargs)

        source = Path(inspect.getsourcefile(type(self)))
        # All local remote code shares one module namespace, so the name is unique to the content.
        stem = f"pipeline_class_conditional_{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}"
        for stale in save_directory.glob("pipeline_class_conditional_*.py"):
            if stale.stem != stem:
                stale.unlink()
        shutil.copyfile(source, save_directory / f"{stem}.py.part")
        os.replace(save_directory / f"{stem}.py.part", save_directory / f"{stem}.py")

        index_file = save_directory / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [stem, type(self).__name__]
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

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # A folder names its own source as [file, class]; this class is that class, so nothing foreign is to be run.
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    # -- what a call was asked for ------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def num_classes(self) -> int:
        """K, the number of labels that the model knows; 0 for an unconditional one."""
        return num_label_classes(self.unet.config)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        _, height, width = self._latent_shape()
        return (height * self.vae_scale_factor, width * self.vae_scale_factor)

    @property
    def id2label(self) -> dict[int, str]:
        return {int(index): name for index, name in self.config.id2label.items()}

    # -- parts of a call ----------------------------------------------------------------------------------------------

    def encode_labels(self, labels: Any) -> torch.Tensor | None:
        """Labels to tokens `(B, T, K)`, or `None` for an unconditional model.

        Besides what [`label_ids`] takes, a floating-point tensor of shape `(B, K)` (multi-hot or soft labels) or
        `(B, T, K)` (tokens) is taken as it is.
        """
        if self.num_classes == 0:
            if labels is not None:
                raise ValueError("this model is unconditional, so labels must be None; use num_images_per_prompt")
            return None
        if isinstance(labels, np.ndarray):
            labels = torch.from_numpy(labels)
        if isinstance(labels, torch.Tensor) and labels.is_floating_point():
            tokens = labels.unsqueeze(1) if labels.ndim == 2 else labels  # (B, T, K)
            if tokens.ndim != 3 or tokens.shape[-1] != self.num_classes:
                raise ValueError(
                    f"floating-point labels must have the shape (B, {self.num_classes}) or "
                    f"(B, T, {self.num_classes}), not {tuple(labels.shape)}"
                )
        else:
            tokens = label_tokens(label_ids(labels, self.id2label, self.config.max_labels), self.num_classes)
        if not self.config.has_null_label and (tokens == 0).all(dim=-1).all(dim=-1).any():
            raise ValueError("this model was trained without label dropout, so every picture needs a label")
        return tokens

    def check_inputs(
        self,
        batch_size,
        num_images_per_prompt,
        num_inference_steps,
        timesteps,
        guidance_scale,
        guidance_interval,
        guidance_rescale,
        eta,
        generator,
        latents,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        """Raise before the first step for anything that can't be done, in one sentence."""
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a positive whole number, not {num_images_per_prompt!r}")
        num_images = batch_size * num_images_per_prompt
        if num_images == 0:
            raise ValueError("labels is empty; give one label for each picture")

        name = type(self.scheduler).__name__
        if name in SCHEDULERS_WITHOUT_GENERATOR:
            raise ValueError(f"{name} takes no generator, so a picture could not belong to its seed; use another one")
        if name in SCHEDULERS_OF_OTHER_MODELS or self.scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"{name}, as it is configured, is for models of another kind than this one; use another one"
            )
        predicts = self.scheduler.config.get("prediction_type")
        if predicts != self.config.prediction_type:
            raise ValueError(
                f"the model was trained for prediction_type={self.config.prediction_type!r}, but the scheduler {name} "
                f"samples {predicts!r}; make it with from_config(pipe.scheduler.config, "
                f"prediction_type={self.config.prediction_type!r})"
            )

        if not hasattr(self.scheduler, "init_noise_sigma") or not hasattr(self.scheduler, "step"):
            raise ValueError(
                f"{name} is not a scheduler for this pipeline; use DDIM, DDPM, DPM-Solver++ or another one"
            )
        takes = list(inspect.signature(self.scheduler.step).parameters.values())[:4]
        if any(item.default is item.empty for item in takes[3:] if item.kind is item.POSITIONAL_OR_KEYWORD):
            raise ValueError(f"{name} steps by more than the model's output, so this pipeline can't use it")

        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if timesteps is not None:
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name} takes no custom timesteps; use num_inference_steps")
            timesteps = [int(t) for t in timesteps]
            if not timesteps or sorted(set(timesteps), reverse=True) != timesteps:
                raise ValueError(f"timesteps must be a strictly descending sequence, not {timesteps}")
            if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
                raise ValueError(f"timesteps must lie in 0 to {num_train_timesteps - 1}, not {timesteps}")
        elif (
            not isinstance(num_inference_steps, numbers.Integral)
            or not 1 <= num_inference_steps <= num_train_timesteps
        ):
            raise ValueError(
                f"num_inference_steps must be a whole number from 1 to {num_train_timesteps}, "
                f"not {num_inference_steps!r}"
            )
        elif (
            name in ("DDIMScheduler", "DDIMParallelScheduler")
            and self.scheduler.config.timestep_spacing == "trailing"
            and num_train_timesteps % num_inference_steps
        ):
            # DDIM finds the previous timestep by integer division, which is wrong here.
            raise ValueError(
                f"{name} with timestep_spacing='trailing' needs a number of steps that divides {num_train_timesteps}, "
                f"which {num_inference_steps} doesn't; use timestep_spacing='leading' or another number"
            )

        for what, value in (("guidance_scale", guidance_scale), ("eta", eta), ("guidance_rescale", guidance_rescale)):
            if not isinstance(value, numbers.Real) or not 0 <= value < float("inf"):
                raise ValueError(f"{what} must be a number of at least 0, not {value!r}")
        if guidance_scale > 1 and self.num_classes and not self.config.has_null_label:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a model trained with label dropout, which this one wasn't; "
                "use guidance_scale=1"
            )
        if guidance_scale > 1 and not self.num_classes:
            raise ValueError(f"guidance_scale={guidance_scale} needs labels, but this model is unconditional")
        if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
            raise ValueError(f"guidance_interval must be a pair (start, stop), not {guidance_interval!r}")
        start, stop = guidance_interval
        if not 0.0 <= start <= stop <= 1.0:
            raise ValueError(f"guidance_interval must be (start, stop), 0 <= start <= stop <= 1, not {(start, stop)}")
        if not 0.0 <= guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must lie in [0, 1], not {guidance_rescale}")

        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], not {eta}")
        for one in generator if isinstance(generator, list) else [generator]:
            if one is not None and not isinstance(one, torch.Generator):
                raise ValueError(f"generator must be a torch.Generator or a list of them, not {one!r}")
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents must be a tensor, not {type(latents).__name__}")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"generator is a list of {len(generator)}, but {num_images} pictures are asked for")
        shape = (num_images, *self._latent_shape())
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', not {output_type!r}")
        unknown = [key for key in callback_on_step_end_tensor_inputs or [] if key not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, not {unknown}"
            )

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    def prepare_latents(self, num_images, dtype, device, generator, latents=None):
        """Noise of the scheduler's initial scale, `(B, C, H, W)`; the given latents are scaled too."""
        if latents is None:
            shape = (num_images, *self._latent_shape())
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device=device, dtype=dtype)
        return latents * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator, eta):
        # Schedulers differ in what their step takes: only DDIM has eta, deterministic ones have no generator.
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {}
        if "eta" in accepted:
            extra["eta"] = eta
        if "generator" in accepted:
            extra["generator"] = generator
        return extra

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the UNet knows them to pictures `(B, C, H, W)` in about [-1, 1]."""
        if self.vqvae is None:
            return latents
        latents = latents / self.vqvae.config.scaling_factor
        # The nearest code is found in float32: half precision would choose another for one latent in ten.
        codes, dtype = self.vqvae.quantize.embedding.weight.to(latents.device), self.vqvae.dtype
        if dtype == torch.float32:
            return self.vqvae.decode(latents.float()).sample
        flat = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])  # (B·h·w, C)
        nearest = torch.cdist(flat, codes.float()).argmin(dim=1)
        quantized = codes[nearest].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)  # (B, C, h, w)
        return self.vqvae.decode(quantized.to(dtype), force_not_quantize=True).sample

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        labels: Any = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
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
        Generate pictures of the given labels.

        Args:
            labels: one entry a picture: an id, a name, a set of them, or `None` for the null label; or a tensor (see
                [`~ClassConditionalPipeline.encode_labels`]). `None` draws one picture without a label.
            num_images_per_prompt (`int`): pictures for each entry of `labels`.
            num_inference_steps (`int`, *optional*): denoising steps; the pipeline's recommended number by default.
            timesteps (`Sequence[int]`, *optional*): descending timesteps instead, for schedulers that take them.
            guidance_scale (`float`, *optional*): w of classifier-free guidance, uncond + w (cond - uncond) (Ho and
                Salimans 2022); it acts when > 1. The pipeline's recommended one by default.
            guidance_interval (`tuple[float, float]`): the part of the steps that is guided, 0 being the first step and
                1 the last (Kynkäänniemi et al. 2024); the others cost half.
            guidance_rescale (`float`): φ of Lin et al. 2023, eq. 16, in [0, 1].
            eta (`float`): η of DDIM (Song et al. 2021, eq. 16), in [0, 1]; other schedulers ignore it.
            generator (`torch.Generator` or a list of them, *optional*): with a list, one for each picture, a picture
                depends on its own generator and not on the batch it is drawn in.
            latents (`torch.Tensor`, *optional*): standard normal noise `(B, C, H, W)` to start from.
            output_type (`str`): `"pil"`; `"np"`, `(B, H, W, C)` in [0, 1]; `"pt"`, `(B, C, H, W)` in [0, 1]; or
                `"latent"`, what the UNet ends with.
            return_dict (`bool`): an [`ImagePipelineOutput`] rather than a tuple.
            callback_on_step_end: called after each step as `callback(pipe, step_index, timestep, tensors)`; the dict
                that it returns replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): which tensors it sees; `["latents"]`.
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
        if labels is not None and class_labels is not None:
            raise ValueError("class_labels is an alias of labels; give one of them")
        tokens = self.encode_labels(class_labels if labels is None else labels)  # (B, T, K) or None
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if isinstance(generator, tuple):
            generator = list(generator)
        batch_size = 1 if tokens is None else tokens.shape[0]
        self.check_inputs(
            batch_size,
            num_images_per_prompt,
            num_inference_steps,
            timesteps,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            eta,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        device, dtype = self._execution_device, self.unet.dtype

        # 2. Labels, with and without the unconditional half
        conditioning = self._conditioning(tokens, num_images_per_prompt, device, dtype)
        if self.config.has_null_label:  # also where guidance is off now: a callback may turn it on
            null_and_label = torch.cat([torch.zeros_like(tokens), tokens])
            guided_conditioning = self._conditioning(null_and_label, num_images_per_prompt, device, dtype)

        # 3. Timesteps and noise
        if timesteps is not None:
            self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(batch_size * num_images_per_prompt, dtype, device, generator, latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 4. Denoise
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                progress = i / max(self._num_timesteps - 1, 1)
                guided = self.do_classifier_free_guidance and guidance_interval[0] <= progress <= guidance_interval[1]
                if guided:
                    sample = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
                    uncond, cond = self.unet(sample, t, **guided_conditioning, return_dict=False)[0].chunk(2)
                    model_output = uncond + self.guidance_scale * (cond - uncond)
                    if self.guidance_rescale > 0:
                        model_output = rescale_guidance(model_output, cond, self.guidance_rescale)
                else:
                    sample = self.scheduler.scale_model_input(latents, t)
                    model_output = self.unet(sample, t, **conditioning, return_dict=False)[0]
                latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]
                latents = latents.to(dtype)  # some schedulers compute in float32

                if callback_on_step_end is not None:
                    tensors = {}
                    for key in callback_on_step_end_tensor_inputs:
                        tensors[key] = locals()[key]
                    returned = callback_on_step_end(self, i, t, tensors) or {}
                    latents = returned.pop("latents", latents)
                progress_bar.update()

        # 5. Decode
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditioning(self, tokens, num_images_per_prompt, device, dtype):
        if tokens is not None:
            tokens = tokens.to(device=device, dtype=dtype).repeat_interleave(num_images_per_prompt, dim=0)
        return unet_conditioning(self.unet.config, tokens)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """Bring the guided output `(B, C, H, W)` back to the conditional one's deviation (Lin et al. 2023, eq. 15-16)."""
    dims = list(range(1, cond.ndim))
    rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided
