"""Presets and command lines to typed arguments. Nothing else in the project parses.

A preset is a YAML file; with `base: NAME` it is laid on top of another. Its sections `vqvae`, `unet`,
`noise_scheduler` and `classifier` are passed verbatim to the class of diffusers or transformers, `generator` and
`critic` to those of a GAN. Its other keys are flags of the scripts (see `arguments.py`), and a section named after a
script (`train_vqgan`, `train_ldm`, `train_ddpm`, `train_wgan`, `train_classifier`) holds the flags of that script
alone. On the command line, `--flag value` overrides a flag and `--section.key value` an entry of a section, for
example `--unet.block_out_channels "[64, 128]"` or `--train_vqgan.max_train_steps 500`.
"""

import copy
import difflib
import importlib.util
import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hwdiffusion import InputError
from hwdiffusion.arguments import (
    CHUNK,
    COMPILATIONS,
    DRAWINGS,
    EVALUATIONS,
    EXAMPLES,
    LR_SCHEDULERS,
    METRICS,
    PRECISIONS,
    SAMPLERS,
    SCRIPTS,
    ClassifierArguments,
    CompareArguments,
    DataArguments,
    DiffusionArguments,
    DistillationArguments,
    DrawingArguments,
    EvaluationArguments,
    JudgedArguments,
    LatentDiffusionArguments,
    MachineArguments,
    TrainingArguments,
    UNetArguments,
    VQGANArguments,
    WGANArguments,
)
from hwdiffusion.checkpoints import write_file
from hwdiffusion.failures import exit_code
from hwdiffusion.places import file_of, is_here


MODEL_SECTIONS = ("vqvae", "unet", "noise_scheduler", "classifier", "generator", "critic")
LENGTHS = ("max_train_steps", "num_train_epochs", "max_train_seconds")  # how long a run is: one of them says it

A_PART = "two numbers, start and stop, with 0 <= start <= stop <= 1"  # of all steps
REPOSITORY = r"[\w\-.]{1,96}/[\w\-.]{1,96}"  # USER/NAME on the Hub

# What may differ between the runs of one folder without changing its result.
_NOT_IN_RESULT = {"report_to", "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "sample_steps",
                  "sample_epochs", "image_memory_gb", "dataloader_num_workers", "evaluation_steps",
                  "evaluation_samples", "evaluation_classifier", "best_metric", "gradient_checkpointing",
                  "torch_compile", "data_license"}  # fmt: skip
_SECTIONS_OF = {
    "train_vqgan": ["vqvae"],
    "train_ddpm": ["unet", "noise_scheduler"],
    "train_ldm": ["vqvae", "unet", "noise_scheduler"],
    "train_distill": [],
    "train_wgan": ["generator", "critic"],
    "train_classifier": ["classifier", "noise_scheduler"],
}
# What both stages of a latent diffusion have in common.
_SHARED = {item.name for cls in (DataArguments, MachineArguments) for item in fields(cls)}
_OF_THE_DATA = {"dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column",
                "data_license"}  # fmt: skip
# What belongs to one start of a script and not to the configuration.
_OF_ONE_START = {"preset", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "push_to_hub",
                 "hub_model_id", "hub_private"}  # fmt: skip


@dataclass
class Config:
    """A script's resolved arguments, and the sections of its preset."""

    script: str
    args: Any
    sections: dict[str, dict]  # of the models, as given to their classes
    other_scripts: dict[str, dict] = field(default_factory=dict)  # flags of the other scripts, from the preset
    command: list[str] = field(default_factory=list)  # by which it was asked for: a script and its flags

    def to_dict(self) -> dict:
        """The configuration in the form of a preset, which it can serve as."""
        names = [item.name for item in fields(self.args) if item.name not in _OF_ONE_START]
        flags = {name: getattr(self.args, name) for name in names}
        used = {name: section for name, section in self.sections.items() if section}
        return copy.deepcopy({"script": self.script, self.script: flags, **used, **self.other_scripts})

    def save(self, path: Path):
        write_file(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    def changes(self, saved: dict) -> list[str]:
        """The keys that alter the result and differ from those of a saved configuration."""
        now = _flattened(yaml.safe_load(yaml.safe_dump(self.to_dict())))
        saved = _flattened(saved)
        for item in fields(self.args):  # flags that didn't exist yet did what their defaults do
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if default is not MISSING and item.name not in _OF_ONE_START:
                saved.setdefault(f"{self.script}.{item.name}", default)
        keys = [key for key in {**saved, **now} if key.split(".")[-1] not in _NOT_IN_RESULT]
        return [key.removeprefix(f"{self.script}.") for key in keys if saved.get(key) != now.get(key)]

    def first_stage(self, output_dir: Path) -> "Config":
        """The configuration by which train_ldm.py trains its autoencoder: same preset, same data, same machine."""
        args = _parse("train_vqgan", _as_argv(self.other_scripts.get("train_vqgan", {}), "train_vqgan"))
        for name in _SHARED:
            setattr(args, name, getattr(self.args, name))
        args.preset, args.output_dir, args.dry_run = self.args.preset, str(output_dir), self.args.dry_run
        args.resume_from_checkpoint = None if self.args.resume_from_checkpoint is None else "latest"
        _validate(args)
        return Config("train_vqgan", args, {"vqvae": self.sections["vqvae"]}, command=self.command)


def _without_lengths(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key not in LENGTHS}


def _flattened(settings: dict) -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat.update(
            {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def preset_names() -> list[str]:
    files = resources.files("hwdiffusion").joinpath("presets").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def load_preset(name: str, derived: tuple[str, ...] = ()) -> dict:
    """The content of a preset, by its name or the path of a YAML file, on top of what its `base` names.

    Args:
        derived: the presets that this one is the base of.

    Raises:
        InputError: there is none, it isn't a YAML mapping, or it is its own base.
    """
    if name in preset_names():
        text = resources.files("hwdiffusion").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"there is no preset file {name}")
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise InputError(
            f"unknown preset {name!r}{_nearest(name, preset_names())}; there are {', '.join(preset_names())}, "
            "or give the path of a .yaml file"
        )
    try:
        preset = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"preset {name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(preset, dict):
        raise InputError(f"preset {name} must be a mapping of flags and sections, not {type(preset).__name__}")
    preset.pop("score", None)  # what is known of it, see `preset_table.py`: of itself alone, and no setting
    base = preset.pop("base", None)
    if base is None:
        return preset
    if not isinstance(base, str):
        raise InputError(f"base of preset {name} must be the name or the path of another preset, not {base!r}")
    if base.endswith((".yaml", ".yml")) and name not in preset_names():
        base = str(Path(name).parent / base)  # beside the preset that names it
    if base in (name, *derived):
        raise InputError(f"preset {name} stands on itself; its base must be another one")
    return _derived(load_preset(base, (name, *derived)), preset)


def _derived(base: dict, preset: dict) -> dict:
    """A preset on top of another: what it says counts, for all scripts or for one, and in sections key by key."""
    displaced = {key for key, value in preset.items() if not isinstance(value, dict)}
    for together in (set(LENGTHS), _OF_THE_DATA & {"dataset_name", "train_data_dir"}):
        if displaced & together:  # another length, other data
            displaced |= _OF_THE_DATA if "train_data_dir" in together else together
    merged = {key: value for key, value in base.items() if key not in displaced}
    for script in {*SCRIPTS} & {*merged}:
        section = _as_section(merged[script], script, "base")
        merged[script] = {key: value for key, value in section.items() if key not in displaced}
    for key, value in preset.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _derived(merged[key], value) if both else value
    return merged


def parse(script: str, argv: list[str] | None = None) -> Config:
    """The command line of a script, on top of its preset, to a configuration.

    Raises:
        InputError: an unknown preset, flag or key (the nearest known one is named), or a value that is not allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        _parse(script, ["--help"])
    flags, overrides = _split_overrides(argv, script)
    words = {word.split("=")[0] for word in flags}
    name = _chosen_preset(script, flags)
    preset = load_preset(name) if name is not None else {}
    if script == "train_distill" and (preset.get("script", script) != script or "--preset" not in words):
        preset = _pictures_of(preset)  # of the run that made the teacher
    preset.pop("script", None)  # a run's config.yaml serves as a preset
    sections = {section: _as_section(preset.pop(section, {}), section, name) for section in MODEL_SECTIONS}
    scripts = {other: _as_section(preset.pop(other, {}), other, name) for other in SCRIPTS}
    for section in {section for section, key in overrides if section in scripts and key in LENGTHS}:
        scripts[section] = _without_lengths(scripts[section])
    for (section, key), value in overrides.items():
        if section in sections and section not in _SECTIONS_OF[script]:
            raise InputError(f"--{section}.{key} is nothing that {script} takes; leave it out")
        if script == "train_ldm" and section == "train_vqgan" and key in _SHARED:
            raise InputError(f"--{section}.{key} can't differ between the stages; give --{key}")
        (sections if section in sections else scripts)[section][key] = value
    for other, section in scripts.items():
        known = [item.name for item in fields(SCRIPTS[other]) if item.name not in _OF_ONE_START]
        for key in section:
            if key not in known and (other, key) in overrides:
                raise InputError(f"unknown flag --{other}.{key}{_nearest(key, known)}")
            if key not in known:
                raise InputError(f"section {other} of preset {name} has an unknown flag {key!r}{_nearest(key, known)}")
    known_anywhere = {item.name for cls in SCRIPTS.values() for item in fields(cls)}
    for key in preset:
        if key not in known_anywhere:
            known = sorted({*known_anywhere, *MODEL_SECTIONS, *SCRIPTS})
            raise InputError(f"preset {name} has an unknown key {key!r}{_nearest(key, known)}")
    given = _given(flags)
    if {"vae", "vqvae"} <= given:
        raise InputError("--vae is another name of --vqvae; give one of them")
    of_first_stage = [f"--{section}.{key}" for section, key in overrides if section in ("vqvae", "train_vqgan")]
    if script == "train_ldm" and (typed := given & {"vae", "vqvae"}) and of_first_stage:
        raise InputError(
            f"{of_first_stage[0]} is for the first stage, whose place --{typed.pop()} takes; give one of them"
        )
    displaced = set()
    if given & {"train_data_dir", "dataset_name"}:
        # the user's own data takes the place of the preset's, columns and all
        displaced = _OF_THE_DATA
    for key in displaced:
        for settings in (preset, *scripts.values()):
            settings.pop(key, None)
    if given & set(LENGTHS):  # the user's takes the place of the preset's, whichever that gives
        scripts[script] = _without_lengths(scripts[script])

    def flags_of(other: str, section: dict) -> dict:
        known_here = {item.name for item in fields(SCRIPTS[other])}
        of_its_own = set(section) | (given if other == script else set())
        general = _without_lengths(preset) if of_its_own & set(LENGTHS) else preset
        return {**{key: value for key, value in general.items() if key in known_here}, **section}

    args = _parse(script, [*_as_argv(flags_of(script, scripts[script]), name), *flags])
    meant_for = sorted(other for other, section in scripts.items() if section)
    if (
        meant_for
        and script not in (*meant_for, "train_distill")
        and all(getattr(args, key) is None for key in LENGTHS)
    ):
        raise InputError(
            f"preset {name} is for {' and '.join(meant_for)}, not for {script}; use another, or say how long to train "
            "by --max_train_steps, --num_train_epochs or --max_train_seconds"
        )
    if script == "train_distill" and all(getattr(args, key) is None for key in LENGTHS):
        args.max_train_steps = 1000
    if args.output_dir is None:
        teacher = getattr(args, "teacher", None)
        args.output_dir = str(Path("runs", Path(args.preset).stem if teacher is None else f"{Path(teacher).name}-lcm"))
    _validate(args)
    used = _SECTIONS_OF[script]
    first = {
        key: value for key, value in flags_of("train_vqgan", scripts["train_vqgan"]).items() if key not in _SHARED
    }
    stages = {"train_vqgan": first} if script == "train_ldm" else {}
    config = Config(script, args, {section: sections[section] for section in used}, stages, [script, *argv])
    if script == "train_ldm" and args.vqvae is None:
        try:  # a mistake in its flags must not surface later
            config.first_stage(Path(args.output_dir))
        except InputError as error:
            raise InputError(f"for the first stage, in section train_vqgan or as --train_vqgan.…: {error}") from error
    return config


def _is_part(interval: list[float]) -> bool:
    return len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1


def _requirement(args):
    """A function that raises InputError, naming a flag and what is allowed, where a condition doesn't hold."""

    def require(condition: bool, key: str, allowed: str):
        if not condition:
            raise InputError(f"--{key} must be {allowed}, not {getattr(args, key)}")

    return require


def parse_evaluation(command: str, argv: list[str]) -> EvaluationArguments:
    """The command line of `hwdiffusion evaluate` or `hwdiffusion sweep`: a run folder or Hub id, then flags.

    Raises:
        InputError: an unknown flag, or a value that is not allowed.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    args = _parse_flags(EVALUATIONS[command], f"hwdiffusion {command}", argv)

    require = _requirement(args)
    if command == "sweep" and args.run is None:
        raise InputError("name a run folder or Hub id to draw from")
    if command == "compare" and (args.run is None or args.images is not None or args.save_images != "none"):
        raise InputError(
            "compare takes run folders or Hub ids before all flags, and neither --images nor --save_images"
        )
    if (args.run is None) == (args.images is None):
        raise InputError("name a run folder or Hub id to draw from, or --images FOLDER to judge, and not both")
    if args.run is not None and args.resolution is not None:
        raise InputError("--resolution is for --images; samples of a run are compared at their own size")
    if args.images is not None and args.resolution is None:
        raise InputError("--images needs --resolution, the size at which both sides are compared")
    require(args.num_samples >= 1, "num_samples", "at least 1")
    require(args.num_seeds >= 2, "num_seeds", "at least 2")
    given = _given(argv)
    if args.label_sets is not None and "num_samples" in given:
        raise InputError("with --label_sets a run draws each of them --num_seeds times; leave --num_samples out")
    if args.label_sets is None and "num_seeds" in given:
        raise InputError("--num_seeds is how often each of --label_sets is drawn; without these give --num_samples")
    if args.label_sets is not None and args.run is None:
        raise InputError("--label_sets is what a run draws; with --images leave it out")
    if args.label_frequencies != "equal" and (args.label_sets is not None or args.run is None):
        raise InputError(
            "--label_frequencies is for what a run draws of single labels; with --label_sets or --images leave it out"
        )
    require(1 <= args.batch_size <= CHUNK, "batch_size", f"in 1 to {CHUNK}")
    require(0 <= args.seed < 2**32, "seed", "in 0 to 2^32 - 1")
    for scale in args.guidance_scale if isinstance(args.guidance_scale, list) else [args.guidance_scale]:
        require(scale is None or 0 <= scale < float("inf"), "guidance_scale", "at least 0")
    require(args.guidance_interval is None or _is_part(args.guidance_interval), "guidance_interval", A_PART)
    of_a_run = (args.guidance_interval, args.truncation, None if args.torch_dtype == "float32" else args.torch_dtype)
    if args.run is None and any(value is not None for value in of_a_run):
        raise InputError(
            "--guidance_interval, --truncation and --torch_dtype are for samples of a run; with --images leave them "
            "out"
        )
    if args.guide is not None and (args.run is None or command == "compare"):
        raise InputError("--guide is for the samples of one run, by `hwdiffusion evaluate` or `hwdiffusion sweep`")
    if args.guide is None and args.classifier_guidance_scale is not None:
        raise InputError("--classifier_guidance_scale needs --guide, a folder of train_classifier.py --noise_aware")
    if args.guide is not None and args.classifier_guidance_scale is None:
        args.classifier_guidance_scale = 1.0
    scale = args.classifier_guidance_scale
    require(scale is None or 0 <= scale < float("inf"), "classifier_guidance_scale", "at least 0")
    sizes = args.resolution or [1]
    require(1 <= len(sizes) <= 2 and min(sizes) > 0, "resolution", "one or two positive numbers")
    if command == "sweep" and args.save_images != "none":
        raise InputError("--save_images is for `hwdiffusion evaluate`; a sweep keeps no samples")
    schedulers = args.scheduler if isinstance(args.scheduler, list) else [args.scheduler]
    known = all(name is None or name in SAMPLERS for name in schedulers)
    require(known, "scheduler", f"one of {', '.join(SAMPLERS)}")
    for metric in args.metrics or []:
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}{_nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
    if command == "sweep" and args.metrics and "cas" in args.metrics:
        raise InputError("cas trains two classifiers for every combination; take it with `hwdiffusion evaluate`")
    if args.resolution is not None:
        args.resolution = [args.resolution[0], args.resolution[-1]]
    if args.output_dir is None:
        args.output_dir = str(output_folder(command, args))
    return args


def output_folder(command: str, args: EvaluationArguments) -> Path:
    """Where an evaluation or a sweep is kept: in its run's folder, if that is one."""
    beside = Path(args.run or args.images)
    inside = args.run is not None and beside.is_dir()
    name = f"{beside.name.removesuffix('.npz')}-{command}"
    # an evaluation of chosen sets is kept beside the run's own
    chosen = "" if args.label_sets is None else f"-{Path(args.label_sets).stem}"
    folder = beside / {"evaluate": "evaluation"}.get(command, command) if inside else Path("runs", name)
    return folder.with_name(f"{folder.name}{chosen}")


def parse_comparison(argv: list[str]) -> CompareArguments:
    """The command line of `hwdiffusion compare`: run folders or Hub ids, then flags.

    Raises:
        InputError: fewer than two runs, one of them twice, an unknown flag, or a value that is not allowed.
    """
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    runs, flags = argv[:count], argv[count:]
    if {"-h", "--help"} & {*flags}:
        _parse_flags(CompareArguments, "hwdiffusion compare", ["--help"])
    if len(runs) < 2:
        raise InputError("name at least two run folders or Hub ids to compare, before all flags")
    places = [os.path.abspath(run) if Path(run).exists() else run for run in runs]
    twice = next((run for run, place in zip(runs, places) if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is named twice; name each run once")
    args = parse_evaluation("compare", [*flags, "--run", runs[0]])
    require = _requirement(args)
    require(1 <= args.columns <= 100, "columns", "in 1 to 100")
    if args.metrics and "cas" in args.metrics:
        raise InputError("cas trains two classifiers for every run; take it with `hwdiffusion evaluate`")
    given = _given(flags)
    args.runs, args.given = runs, sorted(given)
    if "output_dir" not in given:
        args.output_dir = str(Path("runs", "compare"))
    return args


def parse_drawing(command: str, argv: list[str]) -> DrawingArguments:
    """The command line of a command that draws pictures, one of `DRAWINGS`: a run folder or Hub id, then flags.

    Raises:
        InputError: an unknown flag, or a value that is not allowed.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    args = _parse_flags(DRAWINGS[command], f"hwdiffusion {command}", argv)

    require = _requirement(args)
    if args.run is None:
        raise InputError("name a run folder or Hub id to draw from")
    folder = command == "sample" and not args.grid
    if args.output is None:
        args.output = "samples" if folder else f"{command}.png"
    if not folder:
        require(Path(args.output).suffix.lower() in (".png", ".jpg", ".webp"), "output", "a .png, .jpg or .webp")
    if command == "sample":
        require(
            Path(args.output).suffix.lower() not in (".png", ".jpg") or args.grid, "output", "a folder, or give --grid"
        )
        require(1 <= args.num <= 1_000_000, "num", "in 1 to 1,000,000")
        require(1 <= args.batch_size <= CHUNK, "batch_size", f"in 1 to {CHUNK}")
    require(0 <= args.seed < 2**32, "seed", "in 0 to 2^32 - 1")
    require(args.guidance_scale is None or 0 <= args.guidance_scale < float("inf"), "guidance_scale", "at least 0")
    require(args.guidance_interval is None or _is_part(args.guidance_interval), "guidance_interval", A_PART)
    require(args.scheduler is None or args.scheduler in SAMPLERS, "scheduler", f"one of {', '.join(SAMPLERS)}")
    for key, least in (("rows", 1), ("columns", 1 if command == "inpaint" else 2)):
        require(least <= getattr(args, key, least) <= 100, key, f"in {least} to 100")
    if command == "trajectory":
        suffix = None if args.animation is None else Path(args.animation).suffix.lower()
        require(suffix in (None, ".gif", ".webp"), "animation", "a .gif or .webp")
        require(args.animation != args.output, "animation", "another file than --output")
    if command == "vary":
        require(all(0 <= strength <= 1 for strength in args.strength or []), "strength", "in 0 to 1")
    if command in ("vary", "inpaint") and args.image is not None and args.source_label is not None:
        raise InputError("--source_label is what the pipeline draws to start from; with --image leave it out")
    return args


def _chosen_preset(script: str, flags: list[str]) -> str | None:
    """The preset that is named, else the script's own default; for a student what its teacher was trained by."""
    name = _value_of("--preset", flags)
    if name == "":
        raise InputError(f"--preset needs the name of a preset: {', '.join(preset_names())}, or a .yaml file")
    if name is not None or script != "train_distill":
        return name or SCRIPTS[script].preset
    teacher = _value_of("--teacher", flags)
    if not teacher:
        raise InputError("--teacher needs a run folder or Hub id, the pipeline to distil")
    try:
        config = run_config(teacher)
    except (OSError, ValueError):
        return None  # what is wrong with it is said when it is loaded
    return None if config is None else str(config)


def run_config(run: str) -> Path | None:
    """The config.yaml of a run folder or repository, or of the run whose checkpoint, or best pipeline, it is.

    Raises:
        InputError: one of the Hub names a module to import, as only the user may.
    """
    folder = Path(run)
    if is_here(run, "the run"):
        places = (folder / "config.yaml", folder.resolve().parent / "config.yaml")
        return next((path for path in places if path.is_file()), None)
    path = file_of(run, "config.yaml")
    if path is not None and _names_a_module(path):
        raise InputError(
            f"the config.yaml of {run} names a module, MODULE:NAME, as dataset_name, which is not imported for a "
            "repository; download it, look at it, and name its folder"
        )
    return path


def _names_a_module(path: Path) -> bool:
    """Whether a dataset_name, wherever it stands in a configuration, is a MODULE:NAME."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return False  # which is said where it is used
    sections = [saved] if isinstance(saved, dict) else []
    for section in sections:  # which grows by those inside
        sections += [value for value in section.values() if isinstance(value, dict)]
    return any(":" in str(section.get("dataset_name", "")) for section in sections)


def _value_of(flag: str, flags: list[str]) -> str | None:
    """The last value that a command line gives a flag; empty where it gives none."""
    value = None
    for place, word in enumerate(flags):
        if word == flag:
            value = flags[place + 1] if place + 1 < len(flags) else ""
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _pictures_of(preset: dict) -> dict:
    """What the preset of another script says of pictures alone."""
    of_script = _as_section(preset.get(preset.get("script", "train_ldm")), "train_ldm", "the teacher")
    pictures = {item.name for item in fields(DataArguments)} | {"seed"}  # by which pictures are held out
    return {key: value for key, value in {**preset, **of_script}.items() if key in pictures}


def run_script(script: str, train, argv: list[str] | None = None) -> int:
    """Parse, train, and return the exit code: 2 with one sentence where the input can't be used."""
    return exit_code(f"{script}.py", lambda: train(parse(script, argv)))


def _validate(args: TrainingArguments):
    require = _requirement(args)
    require(1 <= len(args.resolution) <= 2 and min(args.resolution) > 0, "resolution", "one or two positive numbers")
    for key in ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "checkpoints_total_limit"):
        require(getattr(args, key) >= 1, key, "at least 1")
    for key in ("max_train_steps", "num_train_epochs", "checkpointing_steps", "max_train_samples"):
        require(getattr(args, key) is None or getattr(args, key) >= 1, key, "at least 1")
    require(args.mixed_precision in PRECISIONS, "mixed_precision", f"one of {', '.join(PRECISIONS)}")
    require(args.learning_rate > 0, "learning_rate", "positive")
    require(0 <= args.seed < 2**32, "seed", "in 0 to 2^32 - 1")
    require(0 < args.validation_fraction < 1, "validation_fraction", "between 0 and 1")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError('--use_8bit_adam needs `pip install "hwdiffusion[8bit]"`')
    require(0 <= args.class_balance <= 1, "class_balance", "in 0 to 1")
    if args.class_balance > 0 and args.streaming:
        raise InputError("--class_balance must know all labels beforehand, and --streaming doesn't; give it 0")
    require(args.lr_scheduler in LR_SCHEDULERS, "lr_scheduler", f"one of {', '.join(LR_SCHEDULERS)}")
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("--push_to_hub needs --hub_model_id USER/NAME")
    if args.hub_model_id is not None and not re.fullmatch(REPOSITORY, args.hub_model_id):
        raise InputError(f"--hub_model_id must be USER/NAME of letters, digits, - _ and ., not {args.hub_model_id!r}")
    require(args.dataloader_num_workers >= 0, "dataloader_num_workers", "at least 0")
    require(args.shuffle_buffer_size >= 1, "shuffle_buffer_size", "at least 1")
    if all(getattr(args, key) is None for key in LENGTHS):
        raise InputError("give --max_train_steps, --num_train_epochs or --max_train_seconds")
    require(args.max_train_seconds is None or 0 < args.max_train_seconds < 1e9, "max_train_seconds", "positive")
    if args.max_train_seconds is not None and args.max_train_steps is not None:
        raise InputError("give either --max_train_steps or --max_train_seconds, not both")
    if args.dataset_name is None and args.train_data_dir is None:
        raise InputError("give --train_data_dir FOLDER or --dataset_name NAME (`digits` is embedded)")
    if args.dataset_name is not None and args.train_data_dir is not None:
        raise InputError("give either --train_data_dir or --dataset_name, not both")
    if isinstance(args, UNetArguments):
        require(args.num_inference_steps >= 1, "num_inference_steps", "at least 1")
        require(args.torch_compile in COMPILATIONS, "torch_compile", f"one of {', '.join(COMPILATIONS)}")
    if isinstance(args, JudgedArguments):
        require(args.evaluation_steps is None or args.evaluation_steps >= 1, "evaluation_steps", "at least 1")
        if args.evaluation_steps is not None and args.evaluation_classifier is None:
            raise InputError("--evaluation_steps needs --evaluation_classifier, a folder of train_classifier.py")
    if isinstance(args, WGANArguments):
        require(args.critic_steps >= 1, "critic_steps", "at least 1")
        least = f"at least --critic_steps, {args.critic_steps}, or the generator would not be trained"
        require(args.max_train_steps is None or args.max_train_steps >= args.critic_steps, "max_train_steps", least)
        require(0 <= args.gradient_penalty_weight < float("inf"), "gradient_penalty_weight", "at least 0")
        require(args.critic_learning_rate is None or args.critic_learning_rate > 0, "critic_learning_rate", "positive")
    if isinstance(args, DistillationArguments):
        if not args.teacher:
            raise InputError("--teacher needs a run folder or Hub id, the pipeline to distil")
        scale = args.teacher_guidance_scale
        require(scale is None or 1 <= scale < float("inf"), "teacher_guidance_scale", "at least 1")
        interval = args.teacher_guidance_interval
        require(interval is None or _is_part(interval), "teacher_guidance_interval", A_PART)
        require(2 <= args.num_ddim_timesteps <= 1000, "num_ddim_timesteps", "in 2 to 1000")
        require(
            args.num_inference_steps <= args.num_ddim_timesteps, "num_inference_steps", "--num_ddim_timesteps at most"
        )
    if isinstance(args, DiffusionArguments):
        require(0 <= args.label_dropout < 1, "label_dropout", "at least 0 and less than 1")
        require(0 <= args.single_label_dropout < 1, "single_label_dropout", "at least 0 and less than 1")
        require(args.snr_gamma is None or args.snr_gamma > 0, "snr_gamma", "positive")
        require(args.stable_targets >= 0, "stable_targets", "at least 0")
        if args.stable_targets > 0 and args.streaming:
            raise InputError(
                f"--stable_targets {args.stable_targets} needs all pictures at hand, which --streaming hasn't; give "
                "--stable_targets 0 or leave out --streaming"
            )
        require(args.guidance_scale >= 1, "guidance_scale", "at least 1")
        require(_is_part(args.guidance_interval), "guidance_interval", A_PART)
        at = args.guidance_unet_at
        require(0 <= at < 1, "guidance_unet_at", "at least 0 and less than 1")
        if at > 0 and args.single_label_dropout > 0:
            raise InputError(
                f"--single_label_dropout {args.single_label_dropout} is for guidance by the labels, but "
                f"--guidance_unet_at {at:g} asks for guidance by early weights; leave out one of them"
            )
        if args.guidance_scale > 1 and args.label_dropout == 0 and at == 0:
            raise InputError(
                f"--guidance_scale {args.guidance_scale} needs a model trained with label dropout, but "
                "--label_dropout is 0; give --guidance_scale 1, a --label_dropout such as 0.1 or a --guidance_unet_at "
                "such as 0.06"
            )
    if isinstance(args, ClassifierArguments):
        require(0 <= args.label_smoothing < 1, "label_smoothing", "at least 0 and less than 1")
        for key in ("random_shift", "random_rotation", "random_scale"):
            require(getattr(args, key) >= 0, key, "at least 0")
        require(args.random_scale < 1, "random_scale", "less than 1")
        if args.vqvae is not None and not args.noise_aware:
            raise InputError("an autoencoder is for --noise_aware classifiers, which guide; a clean one sees pictures")
    if isinstance(args, LatentDiffusionArguments) and args.latent_scaling == "config" and args.vqvae is None:
        raise InputError("--latent_scaling config is for an autoencoder that is given by --vqvae")
    if isinstance(args, VQGANArguments):
        require(0 <= args.discriminator_start < 1, "discriminator_start", "at least 0 and less than 1")
        require(0 <= args.codebook_restart_until <= 1, "codebook_restart_until", "in 0 to 1")
        require(args.codebook_restart_steps >= 0, "codebook_restart_steps", "at least 0")
        require(args.discriminator_layers >= 1, "discriminator_layers", "at least 1")
        require(0 <= args.discriminator_warmup <= 1, "discriminator_warmup", "in 0 to 1")
        require(args.adaptive_weight_max > 0, "adaptive_weight_max", "positive")
        require(0 < args.codebook_ema_decay < 1, "codebook_ema_decay", "between 0 and 1")
        require(args.evaluation_steps is None or args.evaluation_steps >= 1, "evaluation_steps", "at least 1")
        channels = args.discriminator_channels
        require(channels > 0 and channels % 8 == 0, "discriminator_channels", "a positive multiple of 8")
        weights = ("mse_weight", "l1_weight", "perceptual_weight", "codebook_weight", "discriminator_weight",
                   "entropy_weight")  # fmt: skip
        for key in (*weights, "commitment_beta"):
            require(0 <= getattr(args, key) < float("inf"), key, "at least 0")
        if not any(getattr(args, key) for key in weights[:3]):
            raise InputError(f"one of {', '.join(f'--{key}' for key in weights[:3])} must be positive")
        if args.discriminator_weight > 0 and min(args.resolution) >> args.discriminator_layers == 0:
            most = min(args.resolution).bit_length() - 1
            raise InputError(
                f"--discriminator_layers {args.discriminator_layers} halves pictures of {min(args.resolution)} pixels "
                f"too often; give at most {most}"
            )


def _parse(script: str, argv: list[str]) -> TrainingArguments:
    args = _parse_flags(SCRIPTS[script], f"{script}.py", argv)
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision == "auto":
        from hwdiffusion.precision import precision_here  # imports torch

        args.mixed_precision = precision_here()  # so that a run's configuration tells which
    if isinstance(args, UNetArguments) and args.torch_compile is None:
        args.torch_compile = "no"
        if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
            from accelerate.utils import parse_flag_from_env

            regional = parse_flag_from_env("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
            args.torch_compile = "regional" if regional else "full"
    return args


def _parse_flags(cls: type, prog: str, argv: list[str]):
    from transformers import HfArgumentParser  # takes a second to import

    class Parser(HfArgumentParser):
        def error(self, message):  # argparse would print the whole usage and leave
            raise InputError(message)

    example = f"example: {EXAMPLES[prog]}" if prog in EXAMPLES else None
    parser = Parser(cls, prog=prog, allow_abbrev=False, description=cls.__doc__, epilog=example)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = [f"--{item.name}" for item in fields(cls)]
        flag = unknown[0].split("=")[0]
        if cls is LatentDiffusionArguments and flag[2:] in {item.name for item in fields(VQGANArguments)}:
            raise InputError(f"unknown flag {flag}; for the first stage give --train_vqgan.{flag[2:]}")
        if not flag.startswith("-"):
            raise InputError(f"{flag!r} belongs to no flag; a flag that takes one value was given more")
        raise InputError(f"unknown flag {flag}{_nearest(flag, known)}; --help lists them")
    return args


def _split_overrides(argv: list[str], script: str) -> tuple[list[str], dict[tuple[str, str], Any]]:
    flags, overrides = [], {}
    words = iter(argv)
    for word in words:
        match = re.fullmatch(r"--([a-z_]+)\.([A-Za-z0-9_]+)(?:=(.*))?", word, flags=re.DOTALL)
        if match is None:
            flags.append(word)
            continue
        section, key, value = match.groups()
        sections = (*MODEL_SECTIONS, *SCRIPTS)
        if section not in sections:
            raise InputError(f"unknown section in {word.split('=')[0]}{_nearest(section, sections)}")
        if value is None:
            value = next(words, None)
            if value is None:
                raise InputError(f"{word} needs a value")
        try:
            overrides[section, key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"the value of {word} is not valid YAML: {value}") from None
    return flags, overrides


def _as_section(section: Any, key: str, preset: str) -> dict:
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"section {key!r} of preset {preset} must be a mapping, not {section!r}")
    return dict(section)


def _as_argv(flags: dict, preset: str) -> list[str]:
    # A preset's flags go through the same parser as the command line's, and so through the same checks.
    argv = []
    for key, value in flags.items():
        if value is None:
            continue
        if isinstance(value, dict):
            raise InputError(f"flag {key!r} of preset {preset} must be a value, not a mapping")
        if key in ("mixed_precision", "torch_compile") and value is False:
            value = "no"  # which YAML takes for a boolean
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(str(item) for item in values)]
    return argv


def _given(words: list[str]) -> set[str]:
    """The flags that are typed on a command line, as fields are named."""
    return {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


def _nearest(word: str, known) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
