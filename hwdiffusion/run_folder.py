"""The run folder: whether a run may start or continue in it, and the processes that share it."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_bf16_available, parse_flag_from_env
from filelock import FileLock, Timeout
from huggingface_hub import get_token

from hwdiffusion import InputError
from hwdiffusion.arguments import SCRIPTS, DiffusionArguments, UNetArguments, VQGANArguments
from hwdiffusion.autoguidance import check_continues
from hwdiffusion.checkpoints import CHECKPOINT, COMPONENTS, STATE_FILE, checkpoint_to_resume, clear_unfinished
from hwdiffusion.compilation import check_compilation
from hwdiffusion.config import LENGTHS, Config


RUN_FILES = ("config.yaml", "training.json", "metrics.jsonl", "loss.png", "samples.png", "samples", "hwdiffusion",
             "README.md", f"{CHECKPOINT}*", "best", "best.*", "artefact.part", "latents.safetensors*", "first-stage",
             "model_index.json", "pipeline_*.py", *COMPONENTS,
             "config.json", "diffusion_pytorch_model*", "model*.safetensors*", "evaluation", "evaluation.json",
             "evaluation-*", "sweep", "classifier-*")  # fmt: skip
LOCK_FILE = ".lock"
_locks: list[FileLock] = []


def check_run(config: Config):
    """See whether a run can start or continue in its folder; nothing is written.

    Raises:
        InputError: the folder holds something else, or a run with other settings; the tracker isn't installed.
    """
    folder, args = Path(config.args.output_dir), config.args
    check_processes()
    _check_strategy()
    processes = current_processes()
    if args.mixed_precision == "fp16" and processes.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU; use no or bf16")
    if args.mixed_precision == "bf16" and not is_bf16_available():
        raise InputError("--mixed_precision bf16 is not supported by this device; use no or fp16")
    if isinstance(args, UNetArguments):
        check_compilation(args.torch_compile)
    trackers = sorted(tracker.value for tracker in get_available_trackers())
    if args.report_to is not None and args.report_to not in trackers:
        raise InputError(
            f"--report_to {args.report_to} is not a tracker that is installed ({', '.join(trackers) or 'none is'}); "
            "install it, or leave the flag out: metrics.jsonl is always written"
        )
    if args.push_to_hub and get_token() is None:
        raise InputError("--push_to_hub needs you to be logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file; name a folder")
    if not args.dry_run:
        _check_writable(folder)
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise InputError("--overwrite_output_dir deletes what --resume_from_checkpoint asks for; give one of them")
    checkpoint = None if args.overwrite_output_dir else checkpoint_to_resume(args)
    state = None
    if checkpoint is not None:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        if state["script"] != config.script:
            raise InputError(f"{checkpoint} is a checkpoint of {state['script']}, not of {config.script}")
        if args.max_train_steps is not None and args.max_train_steps < state["step"]:
            raise InputError(
                f"{checkpoint} has done more than --max_train_steps {args.max_train_steps}; name another "
                "--output_dir, or an earlier checkpoint by --resume_from_checkpoint"
            )
        if isinstance(args, DiffusionArguments):
            check_continues(checkpoint, state["states"], args.guidance_unet_at)
    if folder.is_dir() and any(path.name != LOCK_FILE and path.suffix != ".part" for path in folder.iterdir()):
        _check_same_run(folder, config, state)
    processes.wait_for_everyone()  # all have looked before one of them writes


def _check_writable(folder: Path):
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"--output_dir {folder} can't be made or written to ({error.strerror}); name a folder that can"
        ) from error


def _check_same_run(folder: Path, config: Config, state: dict | None):
    args, saved = config.args, {}
    if (folder / "config.yaml").is_file():
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or saved.get("script") not in SCRIPTS:
        raise InputError(f"--output_dir {folder} is not empty and not a run folder; name a new folder")
    if args.overwrite_output_dir:
        return
    if saved.get("script") != config.script:
        raise InputError(
            f"--output_dir {folder} holds a run of {saved.get('script')}; name another folder, or give "
            "--overwrite_output_dir to delete it"
        )
    if args.resume_from_checkpoint is not None:
        return
    changes, why = config.changes(saved), ""
    if set(changes) & set(LENGTHS):
        depends = _what_depends_on_the_end(config, state)
        if depends is None:
            changes = [key for key in changes if key not in LENGTHS]
        else:
            why = f"; {depends}, which would be stretched over the new length"
    if changes:
        raise InputError(
            f"--output_dir {folder} holds a run with other settings ({', '.join(changes)}){why}; name another folder, "
            "give --overwrite_output_dir to start anew, or --resume_from_checkpoint latest to continue with these "
            "settings"
        )


def _what_depends_on_the_end(config: Config, state: dict | None) -> str | None:
    """What of a run would have been another from its start on, had it been told another number of steps."""
    args = config.args
    if args.lr_scheduler in ("linear", "cosine"):
        return f"its {args.lr_scheduler} learning-rate schedule spans the whole run"
    if isinstance(args, VQGANArguments) and (args.discriminator_weight or args.codebook_restart_steps):
        return "--discriminator_start and --codebook_restart_until are parts of the whole run"
    if isinstance(args, DiffusionArguments) and args.guidance_unet_at > 0:
        return "--guidance_unet_at is a part of the whole run"
    if args.max_train_seconds is not None:
        return "its steps are fitted to the time"
    lengths = [args.max_train_steps, None if state is None else state["max_steps"]]
    shortest = min(filter(None, lengths), default=0) // getattr(args, "critic_steps", 1)  # of a generator its own
    if args.lr_scheduler == "constant_with_warmup" and shortest < 2 * args.lr_warmup_steps:
        return "its warm-up takes at most half of the run"
    return None


def prepare_output_dir(config: Config):
    """Make the run folder and write the configuration into it; with --overwrite_output_dir delete the run there."""
    if config.args.dry_run:
        return
    folder, processes = Path(config.args.output_dir), current_processes()
    if processes.is_main_process:
        make_folder(folder)
        _lock(folder)
        if config.args.overwrite_output_dir:
            _delete_run(folder)
        clear_unfinished(folder)
        if not (folder / "config.yaml").is_file():  # other settings are written when a checkpoint has taken them
            config.save(folder / "config.yaml")
    processes.wait_for_everyone()


def _lock(folder: Path):
    # Kept until the process ends, by whichever death; a second start would delete what the first is writing.
    lock = FileLock(folder / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=0)
        _locks.append(lock)
    except Timeout as error:
        raise InputError(
            f"--output_dir {folder} is being trained in by another process; wait for its end, or name another"
        ) from error


def current_processes() -> PartialState:
    """The processes that were launched together, and their device."""
    # Told of the CPU, because the first state that is made decides for all: without it, processes that were launched
    # on CPUs would not know of each other, and each would train alone.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def make_folder(folder: Path):
    """Make a folder for output, with those above it; raise InputError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder} can't be made: {error.strerror}") from error


def check_processes():
    """Raise InputError where processes were launched together that don't know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != current_processes().num_processes:
        raise InputError(
            f"{launched} processes were launched, but they don't know of each other; on CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )


def _check_strategy():
    strategies = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
                  "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # fmt: skip
    for variable, name in strategies.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"launched with {name}, which cuts a model in pieces, but checkpoints are made of whole models; "
                "launch with --multi_gpu, and where memory is short lower --train_batch_size and raise "
                "--gradient_accumulation_steps, or give --mixed_precision bf16"
            )


def _delete_run(folder: Path):
    # Only what a run writes: whatever else somebody put there stays.
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
