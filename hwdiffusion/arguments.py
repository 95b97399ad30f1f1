"""The flags of the scripts and commands, as dataclasses; `config.py` parses them."""

from dataclasses import dataclass, field
from typing import Literal, Optional


@dataclass
class DataArguments:
    """Where pictures and labels come from. The first stage of a latent diffusion shares all of these."""

    dataset_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "A data set of the Hub (ylecun/mnist), `digits` or `shapes`, which are embedded, or MODULE:NAME "
            "of your own, in the current folder or installed, a function that returns a dict of `Source`."
        },
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "The configuration of that data set."})
    train_data_dir: Optional[str] = field(
        default=None,
        metadata={"help": "A folder instead: parquet files, one sub-folder a class, or pictures without labels."},
    )
    data_license: Optional[str] = field(
        default=None,
        metadata={
            "help": "The licence of the pictures, such as cc-by-4.0, for the model card. Default: what the data set's "
            "page on the Hub says."
        },
    )
    image_column: Optional[str] = field(default=None, metadata={"help": "Default: the first column with images."})
    label_column: Optional[str] = field(default=None, metadata={"help": "Default: the column with class labels."})
    resolution: list[int] = field(
        default_factory=lambda: [32], metadata={"help": "Size in pixels: one number, or height and width."}
    )
    image_mode: Literal["L", "RGB"] = field(
        default="RGB", metadata={"help": "What pictures are converted to: L (grayscale, one channel) or RGB."}
    )
    center_crop: bool = field(
        default=True, metadata={"help": "Scale and crop the centre; with false, resize without keeping the aspect."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Flip pictures horizontally at random."})
    class_balance: float = field(
        default=0.0,
        metadata={
            "help": "How far lopsided classes are evened out, in 0 to 1: a picture is shown in proportion to its "
            "class's size to the power of minus this. 0: every picture as often; 1: every class."
        },
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "What is split off for validation where the data has no split of its own."}
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "Use only so many pictures, drawn by the seed."}
    )
    skip_bad_images: bool = field(default=False, metadata={"help": "Skip and count unreadable pictures."})
    image_memory_gb: float = field(
        default=4.0, metadata={"help": "Decoded pictures are kept in memory up to this size, else read lazily."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that read pictures lazily."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read a data set of the Hub or parquet files in passing; nothing is downloaded first."},
    )
    shuffle_buffer_size: int = field(
        default=4096, metadata={"help": "With --streaming: pictures, undecoded, that the next ones are drawn from."}
    )


PRECISIONS = ("auto", "no", "fp16", "bf16")
COMPILATIONS = ("no", "regional", "full")
ALL_STEPS = [0.0, 1.0]  # as the part of the steps that is guided
_INTERVAL_OF_A_CALL = {
    "help": "The part of the steps that is guided: its start and stop, in 0 to 1. Default: the pipeline's own where "
    "--guidance_scale is, too, else 0 1."
}
_TRUNCATION = {
    "help": "Of GANs only, above 0: noise within plus and minus this; less gives more typical pictures, and fewer "
    "kinds of them. Default: noise as it is."
}
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass
class MachineArguments:
    """What the run is done with. The first stage of a latent diffusion shares these too."""

    seed: int = field(default=0, metadata={"help": "Everything that is drawn in training is a function of it."})
    mixed_precision: Optional[str] = field(
        default=None,
        metadata={
            "help": "no, fp16, bf16, or auto: bf16 where the device multiplies in it, else no. Default: what "
            "`accelerate launch` was told, or no."
        },
    )
    report_to: Optional[str] = field(
        default=None, metadata={"help": "tensorboard, wandb or another tracker of accelerate, besides metrics.jsonl."}
    )
    logging_steps: int = field(default=25, metadata={"help": "Losses are fetched from the device this often."})


@dataclass
class TrainingArguments(MachineArguments, DataArguments):
    """The flags that every training script has."""

    preset: str = field(default="digits", metadata={"help": "The name of a preset, or the path of a YAML file."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "The run folder. Default: runs/PRESET."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete the run in it and start anew."})
    resume_from_checkpoint: Optional[str] = field(
        default=None,
        metadata={
            "help": "`latest`, or a checkpoint folder, to continue from although settings changed. By default a run "
            "continues from its latest checkpoint if its settings are the same."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print configuration, sizes and the time a step takes."})

    train_batch_size: int = field(default=64, metadata={"help": "Pictures a step, process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches a step."})
    max_train_steps: Optional[int] = field(default=None, metadata={"help": "Optimizer steps; or give epochs."})
    num_train_epochs: Optional[int] = field(default=None, metadata={"help": "Epochs, if no steps are given."})
    max_train_seconds: Optional[float] = field(
        default=None,
        metadata={
            "help": "Or a time, from when the pictures are read to the last step: the number of steps, and with it "
            "the learning-rate schedule, is fitted to it as the run goes on."
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The highest learning rate."})
    lr_scheduler: str = field(default="linear", metadata={"help": f"{', '.join(LR_SCHEDULERS)}."})
    lr_warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    skip_nonfinite_steps: bool = field(
        default=False,
        metadata={"help": "Leave out and count steps whose gradient is not finite, instead of stopping the run."},
    )
    use_8bit_adam: bool = field(
        default=False, metadata={"help": "AdamW with moments of 8 bits, by bitsandbytes, which must be installed."}
    )
    use_ema: bool = field(default=True, metadata={"help": "Save and sample an average of the weights."})
    ema_max_decay: float = field(default=0.999, metadata={"help": "The average's largest decay."})
    ema_power: float = field(default=0.75, metadata={"help": "Its warm-up: decay 1 - (1 + step)^-power."})

    checkpointing_steps: Optional[int] = field(default=None, metadata={"help": "Default: a tenth of the run."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "How many to keep, at least 1."})
    sample_steps: Optional[list[int]] = field(default=None, metadata={"help": "Draw a sample grid after these steps."})
    sample_epochs: Optional[list[int]] = field(default=None, metadata={"help": "And after these epochs."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload what was trained, with its card."})
    hub_model_id: Optional[str] = field(default=None, metadata={"help": "Where to: USER/NAME."})
    hub_private: bool = field(default=False, metadata={"help": "Make that repository private."})


@dataclass
class VQGANArguments(TrainingArguments):
    """Flags of train_vqgan.py."""

    mse_weight: float = field(default=1.0, metadata={"help": "Weight of the squared error."})
    l1_weight: float = field(default=0.2, metadata={"help": "Weight of the absolute error."})
    perceptual_weight: float = field(default=0.0, metadata={"help": "Weight of the perceptual loss."})
    perceptual_model: Optional[str] = field(
        default=None,
        metadata={
            "help": "By what: an image model of transformers, whose hidden states are compared; `lpips`, if that is "
            "installed; or MODULE:NAME of your own, in the current folder or installed, a class or function without "
            "arguments that gives a function from two batches in [-1, 1] to one number. Default: a Laplacian pyramid, "
            "which needs no model."
        },
    )
    codebook_weight: float = field(default=1.0, metadata={"help": "Weight of codebook and commitment loss."})
    commitment_beta: float = field(default=0.25, metadata={"help": "Weight of the commitment within it."})
    latent_init: Literal["white", "default"] = field(
        default="default",
        metadata={
            "help": "`white`: the encoder's last layer starts so that its channels have unit variance and don't "
            "correlate, since few of them may else stay on a line or plane, where all codes then lie."
        },
    )
    codebook_init: Literal["sampled", "kmeans"] = field(
        default="sampled", metadata={"help": "Codes start on encoder outputs, or on the centres of their clusters."}
    )
    codebook_update: Literal["gradient", "ema"] = field(
        default="gradient", metadata={"help": "Codes learn by the optimizer, or as averages of what chose them."}
    )
    codebook_ema_decay: float = field(default=0.99, metadata={"help": "The decay of those averages."})
    rotation_trick: bool = field(
        default=False, metadata={"help": "Gradients pass the quantiser turned (Fifty et al. 2024), not unchanged."}
    )
    entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss that rewards sure choices and even use of the codes."}
    )
    codebook_restart_steps: int = field(default=100, metadata={"help": "Dead codes restart this often; 0: never."})
    codebook_restart_until: float = field(default=0.6, metadata={"help": "The part of training with restarts."})
    discriminator_weight: float = field(default=0.0, metadata={"help": "Weight of the adversarial loss; 0: none."})
    discriminator_start: float = field(default=0.5, metadata={"help": "The part of training before it sets in."})
    discriminator_warmup: float = field(
        default=0.0, metadata={"help": "The part of training in which its weight then grows from 0."}
    )
    adaptive_weight_max: float = field(
        default=1e4, metadata={"help": "The largest factor by which the adversarial gradient is evened out."}
    )
    discriminator_learning_rate: float = field(default=2e-4, metadata={"help": "Its learning rate."})
    discriminator_channels: int = field(default=64, metadata={"help": "Channels of its first layer."})
    discriminator_layers: int = field(default=2, metadata={"help": "Its down-sampling layers."})

    evaluation_steps: Optional[int] = field(
        default=None,
        metadata={"help": "Measure reconstructions of the validation pictures this often. Default: at the end only."},
    )
    evaluation_classifier: Optional[str] = field(
        default=None,
        metadata={"help": "A folder of train_classifier.py: also take their Fréchet distance by its features."},
    )


@dataclass
class JudgedArguments(TrainingArguments):
    """What the scripts share whose pipelines are judged while they are trained."""

    evaluation_steps: Optional[int] = field(
        default=None, metadata={"help": "Judge samples this often, and keep the best pipeline in `best`."}
    )
    evaluation_samples: int = field(default=500, metadata={"help": "How many, always of the same labels and seeds."})
    evaluation_classifier: Optional[str] = field(
        default=None, metadata={"help": "By whom: a folder of train_classifier.py."}
    )
    best_metric: Literal["frechet_distance", "label_accuracy"] = field(
        default="frechet_distance", metadata={"help": "What the best pipeline is chosen by."}
    )


@dataclass
class UNetArguments(JudgedArguments):
    """What the scripts that train a UNet share."""

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute the UNet's activations again in place of keeping them: less memory."}
    )
    torch_compile: Optional[str] = field(
        default=None,
        metadata={
            "help": "Compile the UNet's training by torch.compile: no, regional (each of its repeated blocks by "
            "itself, which takes less time) or full. Default: what `accelerate launch` was told, or no."
        },
    )


@dataclass
class DiffusionArguments(UNetArguments):
    """Flags of train_ddpm.py."""

    label_dropout: float = field(
        default=0.1, metadata={"help": "How often labels are dropped, so that guidance works; 0: never."}
    )
    single_label_dropout: float = field(
        default=0.0,
        metadata={
            "help": "How often each label of a set is dropped by itself, so that sets smaller than those of the "
            "pictures can be asked for."
        },
    )
    timestep_sampling: Literal["uniform", "stratified", "logit_normal"] = field(
        default="stratified",
        metadata={"help": "Timesteps of a batch: independent, spread evenly, or so with more in the middle."},
    )
    snr_gamma: Optional[float] = field(default=None, metadata={"help": "min-SNR weighting (5.0 is usual)."})
    stable_targets: int = field(
        default=0,
        metadata={
            "help": "Train on the mean of what a noisy sample may come from, over at most so many pictures of its "
            "labels (mirrored ones count, too), such as 8192: the same minimum by gradients with less noise. 0: on "
            "what it was made of."
        },
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Recommended by the saved pipeline."})
    guidance_interval: list[float] = field(
        default_factory=ALL_STEPS.copy,
        metadata={"help": "The part of the steps that is guided, so recommended: its start and stop, in 0 to 1."},
    )
    guidance_unet_at: float = field(
        default=0.0,
        metadata={
            "help": "Autoguidance: the weights (averaged with --use_ema) after this part of the run, such as 0.06, "
            "are saved along as guidance_unet, away from which guidance_scale leads then; better with "
            "--label_dropout 0. 0: none."
        },
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Recommended by the saved pipeline."})


@dataclass
class LatentDiffusionArguments(DiffusionArguments):
    """Flags of train_ldm.py."""

    vqvae: Optional[str] = field(
        default=None,
        metadata={
            "aliases": ["--vae"],
            "help": "A trained VQModel, AutoencoderKL or AutoencoderTiny: a folder or a Hub id. Default: train the "
            "first stage first.",
        },
    )
    latent_scaling: Literal["measured", "config"] = field(
        default="measured",
        metadata={"help": "Scale (and shift) latents by what these pictures give, or as the autoencoder says."},
    )


@dataclass
class ClassifierArguments(TrainingArguments):
    """Flags of train_classifier.py."""

    num_train_epochs: Optional[int] = field(default=20, metadata={"help": "Epochs, if no steps are given."})
    train_batch_size: int = field(default=128, metadata={"help": "Pictures a step, process and micro-batch."})
    learning_rate: float = field(default=3e-3, metadata={"help": "The highest learning rate."})
    # averaged weights would not fit the statistics of batch normalisation, which are not averaged
    use_ema: bool = field(default=False, metadata={"help": "Save and sample an average of the weights."})
    label_smoothing: float = field(default=0.0, metadata={"help": "As in cross-entropy; 0: none."})
    pretext: Literal["none", "rotation", "auto"] = field(
        default="auto",
        metadata={
            "help": "rotation: learn by how many quarters a picture was turned, which needs no labels. Default: that "
            "where there are fewer than two classes."
        },
    )
    random_shift: float = field(
        default=0.07, metadata={"help": "Largest random shift, as a share of the picture; latents aren't moved."}
    )
    random_rotation: float = field(default=10.0, metadata={"help": "Largest random rotation in degrees."})
    random_scale: float = field(default=0.1, metadata={"help": "Largest random change of size, as a share."})
    noise_aware: bool = field(
        default=False,
        metadata={"help": "Learn on noisy pictures and be told the noise level, in one more channel: for guidance."},
    )
    vqvae: Optional[str] = field(
        default=None,
        metadata={
            "aliases": ["--vae"],
            "help": "With --noise_aware: learn on the latents of this autoencoder, a folder or Hub id.",
        },
    )


@dataclass
class WGANArguments(JudgedArguments):
    """Flags of train_wgan.py. A step is one of the critic; `--max_train_steps` counts these."""

    preset: str = field(default="digits-wgan", metadata={"help": "The name of a preset, or the path of a YAML file."})
    critic_steps: int = field(
        default=5, metadata={"help": "Steps of the critic for each of the generator, which is trained at the last."}
    )
    gradient_penalty_weight: float = field(default=10.0, metadata={"help": "The λ of the gradient penalty."})
    critic_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "The critic's highest learning rate. Default: that of the generator."}
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "The highest learning rate."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.0, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.9, metadata={"help": "AdamW's second beta."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(
        default=float("inf"), metadata={"help": "Gradients are clipped to this norm. Default: not at all."}
    )


@dataclass
class DistillationArguments(UNetArguments):
    """Flags of train_distill.py."""

    preset: Optional[str] = field(
        default=None,
        metadata={"help": "What pictures, as a preset or a run's config.yaml says. Default: the teacher's."},
    )
    teacher: Optional[str] = field(default=None, metadata={"help": "A run folder or Hub id: what is distilled."})
    teacher_guidance_scale: Optional[float] = field(
        default=None, metadata={"help": "The guidance that is distilled along. Default: what the teacher recommends."}
    )
    teacher_guidance_interval: Optional[list[float]] = field(
        default=None,
        metadata={
            "help": "The part of the steps that is guided: its start and stop, in 0 to 1. Default: what the teacher "
            "recommends, if --teacher_guidance_scale is left to it, too, else 0 1."
        },
    )
    num_ddim_timesteps: int = field(
        default=10,
        metadata={
            "help": "A step of the teacher's spans one in so many of the timesteps: few teach soonest, more, such as "
            "50, are more exact and need a longer training."
        },
    )
    num_inference_steps: int = field(default=4, metadata={"help": "Recommended by the saved pipeline."})

    max_train_steps: Optional[int] = field(
        default=None, metadata={"help": "Optimizer steps; or give epochs. Default: 1000."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "The highest learning rate."})


SCRIPTS = {
    "train_vqgan": VQGANArguments,
    "train_ddpm": DiffusionArguments,
    "train_ldm": LatentDiffusionArguments,
    "train_distill": DistillationArguments,
    "train_wgan": WGANArguments,
    "train_classifier": ClassifierArguments,
}


CHUNK = 250  # samples of an evaluation that are drawn and kept together
SAMPLERS = ("ddpm", "ddim", "dpmpp", "dpmpp_sde", "unipc", "euler", "euler_ancestral", "heun", "langevin")
METRICS = ("labels", "distances", "manifold", "memorisation", "cas")


@dataclass
class EvaluationArguments:
    """Flags of `hwdiffusion evaluate`."""

    run: Optional[str] = field(default=None, metadata={"help": "A run folder or Hub id; or give --images."})
    images: Optional[str] = field(
        default=None, metadata={"help": "Judge these instead of samples of a run: a folder, parquet files or an .npz."}
    )
    reference: Optional[str] = field(
        default=None,
        metadata={
            "help": "The real side: a folder of pictures or parquet files, an .npz, a data set of the Hub, `digits`. "
            "Default: what the run was trained on."
        },
    )
    train_data_dir: Optional[str] = field(
        default=None, metadata={"help": "Where the pictures that the run was trained on are now, if they have moved."}
    )
    num_samples: int = field(
        default=10_000,
        metadata={"help": "How many to draw, in turn of every label, or of the held-out pictures' sets of labels."},
    )
    label_frequencies: Literal["equal", "held_out"] = field(
        default="equal",
        metadata={
            "help": "How often a model of single labels draws each: all alike, or as the held-out pictures have them, "
            "so that distances compare what is alike in that, too."
        },
    )
    label_sets: Optional[str] = field(
        default=None,
        metadata={
            "help": 'A JSON file with sets of labels to draw instead, such as i-CLEVR\'s test.json: [["red cube", '
            '"cyan sphere"], ...]. Then the labels alone are judged, unless --metrics says more.'
        },
    )
    num_seeds: int = field(
        default=10, metadata={"help": "How often each of --label_sets is drawn, by other seeds, for an interval."}
    )
    batch_size: int = field(default=250, metadata={"help": "How many are drawn at once, at most 250."})
    seed: int = field(default=0, metadata={"help": "Sample i is drawn by the seed `seed` + i."})
    guidance_scale: Optional[float] = field(default=None, metadata={"help": "Default: the pipeline's own."})
    num_inference_steps: Optional[int] = field(default=None, metadata={"help": "Default: the pipeline's own."})
    guidance_interval: Optional[list[float]] = field(default=None, metadata=_INTERVAL_OF_A_CALL)
    truncation: Optional[float] = field(default=None, metadata=_TRUNCATION)
    guide: Optional[str] = field(
        default=None,
        metadata={"help": "A folder of train_classifier.py --noise_aware, which guides by its gradient, too."},
    )
    classifier_guidance_scale: Optional[float] = field(
        default=None, metadata={"help": "With --guide: how much, at least 0. Default: 1."}
    )
    scheduler: Optional[str] = field(
        default=None, metadata={"help": f"One of {', '.join(SAMPLERS)}. Default: the pipeline's own."}
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What is drawn in; half precision pays where the device has it."}
    )
    extractor: Literal["classifier", "inception", "dinov2"] = field(
        default="classifier", metadata={"help": "What pictures are compared by."}
    )
    classifier: Optional[str] = field(
        default=None, metadata={"help": "A folder of train_classifier.py. Default: one is trained on the real side."}
    )
    extractor_weights: Optional[str] = field(
        default=None, metadata={"help": "A file with Inception's weights, or a folder or Hub id of a DINOv2."}
    )
    metrics: Optional[list[str]] = field(
        default=None, metadata={"help": "labels, distances, manifold, memorisation, cas. Default: all but cas."}
    )
    save_images: Literal["none", "png", "npz"] = field(default="none", metadata={"help": "Keep the samples."})
    resolution: Optional[list[int]] = field(
        default=None, metadata={"help": "With --images: the size at which both sides are compared."}
    )
    image_mode: Literal["L", "RGB"] = field(default="RGB", metadata={"help": "With --images: gray or colour."})
    skip_bad_images: bool = field(default=False, metadata={"help": "Skip and count unreadable pictures."})
    output_dir: Optional[str] = field(
        default=None, metadata={"help": "Default: RUN/evaluation or RUN/sweep, else runs/NAME-evaluation."}
    )
    device: Optional[str] = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    json: bool = field(
        default=False, metadata={"help": "Print one JSON object to stdout and nothing else; the rest goes to stderr."}
    )


@dataclass
class SweepArguments(EvaluationArguments):
    """Flags of `hwdiffusion sweep`: those of evaluate, some with many values."""

    num_samples: int = field(default=1000, metadata={"help": "How many to draw for every combination."})
    guidance_scale: Optional[list[float]] = field(default=None, metadata={"help": "Default: the pipeline's own."})
    num_inference_steps: Optional[list[int]] = field(default=None, metadata={"help": "Default: the pipeline's own."})
    scheduler: Optional[list[str]] = field(
        default=None, metadata={"help": f"Some of {', '.join(SAMPLERS)}. Default: the pipeline's own."}
    )

    def swept(self) -> dict[str, Optional[list]]:
        """What is combined, the slowest first."""
        return {key: getattr(self, key) for key in ("scheduler", "num_inference_steps", "guidance_scale")}


@dataclass
class CompareArguments(EvaluationArguments):
    """Flags of `hwdiffusion compare`: those of evaluate, for runs that have no evaluation yet that compares."""

    runs: list[str] = field(default_factory=list, init=False)  # named before all flags
    given: list[str] = field(default_factory=list, init=False)  # the flags that are not left to their defaults

    num_samples: int = field(
        default=2000,
        metadata={"help": "How many to draw of each run. Default: as many as saved evaluations have, else 2000."},
    )
    columns: int = field(default=4, metadata={"help": "Pictures of each label and run in compare.png."})


@dataclass
class DrawingArguments:
    """Flags of the commands that draw pictures of a pipeline."""

    run: Optional[str] = field(default=None, metadata={"help": "A run folder or Hub id."})
    output: Optional[str] = field(default=None, metadata={"help": "The picture's file. Default: COMMAND.png."})
    labels: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Names or ids; of a model of sets some with commas; '' is no label. Default: all in turn."},
    )
    seed: int = field(default=0, metadata={"help": "The pictures are drawn by this seed and those after it."})
    guidance_scale: Optional[float] = field(default=None, metadata={"help": "Default: the pipeline's own."})
    guidance_interval: Optional[list[float]] = field(default=None, metadata=_INTERVAL_OF_A_CALL)
    num_inference_steps: Optional[int] = field(
        default=None, metadata={"aliases": ["--steps"], "help": "Default: the pipeline's own."}
    )
    scheduler: Optional[str] = field(
        default=None, metadata={"help": f"One of {', '.join(SAMPLERS)}. Default: the pipeline's own."}
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What is drawn in; half precision pays where the device has it."}
    )
    device: Optional[str] = field(default=None, metadata={"help": "Default: a GPU if there is one."})


@dataclass
class SampleArguments(DrawingArguments):
    """Flags of `hwdiffusion sample`."""

    output: Optional[str] = field(
        default=None,
        metadata={
            "help": "A new folder, of which `train_ldm.py` could train; with --grid a picture. Default: samples."
        },
    )
    num: int = field(default=10, metadata={"help": "Pictures of each label."})
    grid: bool = field(default=False, metadata={"help": "One picture, a row a label, in place of a folder."})
    batch_size: int = field(default=64, metadata={"help": "Pictures that are drawn together."})
    truncation: Optional[float] = field(default=None, metadata=_TRUNCATION)


@dataclass
class TrajectoryArguments(DrawingArguments):
    """Flags of `hwdiffusion trajectory`."""

    rows: int = field(default=8, metadata={"help": "How many samples."})
    columns: int = field(default=8, metadata={"help": "How many moments of each."})
    predicted: bool = field(default=False, metadata={"help": "Show the clean pictures as predicted at each moment."})
    animation: Optional[str] = field(default=None, metadata={"help": "A .gif or .webp of all steps besides."})


@dataclass
class VaryArguments(DrawingArguments):
    """Flags of `hwdiffusion vary`."""

    image: Optional[str] = field(default=None, metadata={"help": "A picture. Default: one that the pipeline draws."})
    source_label: Optional[str] = field(default=None, metadata={"help": "Of what, in that case. Default: the first."})
    strength: Optional[list[float]] = field(
        default=None, metadata={"help": "How far it is noised, in 0 to 1. Default: 0.2 0.4 0.6 0.8 1."}
    )


@dataclass
class InpaintArguments(DrawingArguments):
    """Flags of `hwdiffusion inpaint`."""

    image: Optional[str] = field(default=None, metadata={"help": "A picture. Default: one that the pipeline draws."})
    source_label: Optional[str] = field(default=None, metadata={"help": "Of what, in that case. Default: the first."})
    mask: Optional[str] = field(default=None, metadata={"help": "A picture that is white where to draw anew."})
    region: Literal["left", "right", "top", "bottom", "center", "centre"] = field(
        default="bottom", metadata={"help": "What is drawn anew, without a --mask."}
    )
    columns: int = field(default=6, metadata={"help": "How many pictures of each label."})


@dataclass
class InterpolateArguments(DrawingArguments):
    """Flags of `hwdiffusion interpolate`."""

    columns: int = field(default=8, metadata={"help": "How many pictures, with both ends."})


DRAWINGS = {
    "sample": SampleArguments,
    "trajectory": TrajectoryArguments,
    "vary": VaryArguments,
    "inpaint": InpaintArguments,
    "interpolate": InterpolateArguments,
}


# One for every command: `--help` shows it.
EXAMPLES = {
    "train_vqgan.py": "accelerate launch train_scripts/train_vqgan.py --preset mnist-ldm --output_dir runs/vqvae",
    "train_ldm.py": "accelerate launch train_scripts/train_ldm.py --preset mnist-ldm --train_data_dir PICTURES",
    "train_ddpm.py": "accelerate launch train_scripts/train_ddpm.py --preset mnist-ddpm --train_data_dir PICTURES",
    "train_distill.py": "accelerate launch train_scripts/train_distill.py --teacher runs/mnist-ldm",
    "train_wgan.py": "accelerate launch train_scripts/train_wgan.py --preset mnist-wgan --train_data_dir PICTURES",
    "train_classifier.py": "accelerate launch train_scripts/train_classifier.py --preset mnist-classifier",
    "hwdiffusion evaluate": "hwdiffusion evaluate runs/mnist-ldm --classifier runs/mnist-classifier",
    "hwdiffusion sweep": "hwdiffusion sweep runs/mnist-ldm --scheduler ddim dpmpp --num_inference_steps 10 20",
    "hwdiffusion compare": "hwdiffusion compare runs/mnist-ldm runs/mnist-wgan --classifier runs/mnist-classifier",
    "hwdiffusion sample": 'hwdiffusion sample runs/shapes-ldm --labels "red cube,cyan sphere" --num 4 --grid',
    "hwdiffusion trajectory": "hwdiffusion trajectory runs/mnist-ldm --labels 3 8 --animation trajectory.gif",
    "hwdiffusion vary": "hwdiffusion vary runs/mnist-ldm --source_label 3 --labels 3 8",
    "hwdiffusion inpaint": "hwdiffusion inpaint runs/mnist-ldm --source_label 3 --region bottom",
    "hwdiffusion interpolate": "hwdiffusion interpolate runs/mnist-ldm --labels 3 8",
}


EVALUATIONS = {"evaluate": EvaluationArguments, "sweep": SweepArguments, "compare": CompareArguments}
