"""Class-conditional image generation by the generator of a GAN, in one pass.

Labels, the checks of a call and the way to save are those of the diffusion pipeline, whose file is put into the copy
of this one that every saved repository carries: one file, which needs diffusers and transformers alone. That of the
generator travels beside it.
"""

import numbers
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from .class_conditional import (
    SelfContainedPipeline,
    check_noise,
    check_output_type,
    encode_labels,
    label_names,
    number_of_images,
)
from .residual_generator import ResidualGenerator


GAN_EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("runs/digits-wgan", trust_remote_code=True)
        >>> image = pipe(labels=[3], generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


def truncate(noise: torch.Tensor, threshold: float) -> torch.Tensor:
    """Standard normal noise as noise of the normal distribution truncated to [-threshold, threshold] (the truncation
    trick of Brock et al. 2019, §3.1): each value by the one of the same quantile.

    So a picture still belongs to its generator, and changes steadily with the threshold, which drawing anew what lies
    outside would not do.
    """
    bound = torch.tensor(threshold, dtype=torch.float64)  # on the CPU, since not every device has float64
    low, high = torch.special.ndtr(-bound), torch.special.ndtr(bound)
    quantiles = low + (high - low) * torch.special.ndtr(noise.cpu().double())
    return torch.special.ndtri(quantiles).clamp(-threshold, threshold).to(noise)


class ClassConditionalGANPipeline(SelfContainedPipeline):
    r"""
    Pipeline for class-conditional image generation by a generator: noise to pictures, in one pass.

    It is called as [`ClassConditionalPipeline`] is, so that what samples one samples the other.

    Args:
        generator ([`ResidualGenerator`]): draws pictures in [-1, 1] of noise and label tokens.
        id2label (`dict[int, str]`, *optional*): the name of each label id.
        max_labels (`int`): T, the most labels that a picture has.
    """

    source_name = "pipeline_class_conditional_gan"
    model_cpu_offload_seq = "generator"

    def __init__(self, generator: ModelMixin, id2label: dict | None = None, max_labels: int = 1):
        super().__init__()
        self.register_modules(generator=generator)
        num_classes = generator.config.num_classes if generator is not None else 0
        self.register_to_config(id2label=label_names(id2label, num_classes), max_labels=max_labels)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    # -- persistence --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As [`DiffusionPipeline.from_pretrained`]; no code of the folder or repository is run."""
        if kwargs.get("generator") is None:
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "variant",
                     "use_safetensors", "dtype", "torch_dtype")  # fmt: skip
            of_model = {name: kwargs[name] for name in names if name in kwargs}
            for name in ("dtype", "torch_dtype"):
                if isinstance(of_model.get(name), dict):
                    of_model[name] = of_model[name].get("generator", of_model[name].get("default", torch.float32))
            kwargs["generator"] = ResidualGenerator.from_pretrained(
                pretrained_model_name_or_path, subfolder="generator", **of_model
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        config = super()._dict_from_json_file(json_file)
        if "generator" in config:  # given to `from_pretrained`, it is held against the class that is named here
            config["generator"] = ["diffusers", "ModelMixin"]
        return config

    # -- what the model is --------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """K, the number of labels that the generator knows; 0 if it takes none."""
        return self.generator.config.num_classes

    @property
    def id2label(self) -> dict[int, str]:
        return {int(index): name for index, name in self.config.id2label.items()}

    @property
    def image_channels(self) -> int:
        return self.generator.config.out_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        size = self.generator.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    # -- the call -----------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        truncation: float | None = None,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pt",
    ):
        """Raise ValueError for anything that can't be done, in one sentence."""
        num_images = number_of_images(batch_size, num_images_per_prompt)
        for what, value in (("num_inference_steps", num_inference_steps), ("guidance_scale", guidance_scale)):
            if value is not None and value != 1:
                raise ValueError(
                    f"{what}={value!r} is for diffusion models; a GAN draws in one pass, without guidance"
                )
        if truncation is not None and (not isinstance(truncation, numbers.Real) or not 0 < truncation < float("inf")):
            raise ValueError(f"truncation must be a positive number, not {truncation!r}")
        check_noise(generator, latents, (num_images, self.generator.config.latent_dim))
        check_output_type(output_type, ("pil", "np", "pt"))
        if self.generator.training and self.generator.config.norm_type == "batch":  # pictures would blend
            raise ValueError("the generator is in training mode; call pipe.generator.eval()")

    def encode_labels(self, labels: Any) -> torch.Tensor | None:
        """Labels, as [`encode_labels`] takes them, to tokens `(B, T, K)`, or `None` for an unconditional model."""
        if labels is None and self.num_classes == 0:
            return None
        if self.num_classes == 0:
            raise ValueError("this model is unconditional, so labels must be None; use num_images_per_prompt")
        return encode_labels(labels, self.id2label, self.config.max_labels)

    @torch.no_grad()
    @replace_example_docstring(GAN_EXAMPLE_DOC_STRING)
    def __call__(
        self,
        labels: Any = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        truncation: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: Any = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate pictures of the given labels.

        Args:
            labels: one entry a picture: an id, a name or a set of them; or a tensor (see [`encode_labels`]). `None`
                for an unconditional model.
            num_images_per_prompt (`int`): pictures for each entry of `labels`.
            num_inference_steps, guidance_scale (*optional*): what a GAN hasn't; `None` or 1, so that it can be called
                as a diffusion pipeline is, and anything else is refused.
            truncation (`float`, *optional*): noise is drawn within [-truncation, truncation], see [`truncate`]: less
                of it gives more typical pictures, and fewer kinds of them.
            generator (`torch.Generator` or a list of them, *optional*): with a list, one for each picture, a picture
                depends on its own generator and not on the batch it is drawn in.
            latents (`torch.Tensor`, *optional*): standard normal noise `(B, Z)` instead.
            output_type (`str`): `"pil"`; `"np"`, `(B, H, W, C)` in [0, 1]; or `"pt"`, `(B, C, H, W)` in [0, 1].
            return_dict (`bool`): an [`ImagePipelineOutput`] rather than a tuple.
            class_labels: an alias of `labels`.

        Examples:

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple with them.

        Raises:
            ValueError, TypeError: an argument that can't be served, before anything is drawn.
        """
        if labels is not None and class_labels is not None:
            raise ValueError("class_labels is an alias of labels; give one of them")
        tokens = self.encode_labels(class_labels if labels is None else labels)  # (B, T, K) or None
        if isinstance(generator, tuple):
            generator = list(generator)
        batch_size = 1 if tokens is None else len(tokens)
        self.check_inputs(
            batch_size=batch_size,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            truncation=truncation,
            generator=generator,
            latents=latents,
            output_type=output_type,
        )
        device, dtype = self._execution_device, self.generator.dtype
        if latents is None:
            shape = (batch_size * num_images_per_prompt, self.generator.config.latent_dim)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device=device, dtype=dtype)  # (B, Z)
        if truncation is not None:
            latents = truncate(latents, truncation)
        if tokens is not None:
            tokens = tokens.to(device=device, dtype=dtype).repeat_interleave(num_images_per_prompt, dim=0)
        images = self.generator(latents, tokens)  # (B, C, H, W)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
