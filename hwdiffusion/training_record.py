"""How a run came about: by which commands, on what, and in how much time. `training.json` in the run folder.

The model card tells it. It is of the run, not of one start: commands gather, seconds add up, the hardware is that of
the last start that trained.
"""

import json
import os
import platform
import re
import shlex
from pathlib import Path

import torch

from hwdiffusion import __version__
from hwdiffusion.checkpoints import write_file


RECORD_FILE = "training.json"
_CPUINFO = Path("/proc/cpuinfo")


def read_record(folder: Path) -> dict:
    """The record of a run; empty where there is none, as of runs of earlier versions, or none that can be read."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def note_start(folder: Path, command: list[str], device: torch.device, processes: int):
    """Note what a run is trained by, and on what; to be called where training is about to begin.

    Args:
        command: the script and its flags, as they were given; empty where nobody has typed one.
        device: of this process.
        processes: how many train together.
    """
    record = read_record(folder)
    commands = record.get("commands", [])
    if command and commands[-1:] != [command]:  # the same command again goes on with the run
        commands = [*commands, command]
    versions = {"hwdiffusion": __version__, "torch": torch.__version__, "python": platform.python_version()}
    hardware = describe_hardware(device, processes)
    _write(folder, {**record, "commands": commands, "hardware": hardware, "versions": versions})


def note_progress(folder: Path, step: int, seconds: float):
    """Note how far a run has come, and in how many seconds over all its starts."""
    _write(folder, {**read_record(folder), "step": step, "seconds": round(seconds, 3)})


def _write(folder: Path, record: dict):
    write_file(folder / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def describe_hardware(device: torch.device, processes: int) -> dict:
    """What training computes on: `device` (its type), `name` of the GPU or CPU, `processes`, of a CPU `threads`."""
    if device.type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device), "processes": processes}
    described = {"device": device.type, "name": cpu_name(), "processes": processes}
    return {**described, "threads": torch.get_num_threads()} if device.type == "cpu" else described


def cpu_name() -> str:
    """What the processor calls itself, or else its architecture."""
    if _CPUINFO.is_file():  # where `platform` knows the architecture alone
        named = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
        if named:
            return " ".join(named.group(1).split())
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# For reading
# ---------------------------------------------------------------------------------------------------------------------


def hardware_in_words(hardware: dict) -> str:
    """For example `2 threads of an AMD EPYC 7763`, or `4 x NVIDIA H100`."""
    count, name = hardware["processes"], hardware["name"]
    if hardware["device"] == "cuda":
        return f"{count} x {name}"
    threads = hardware.get("threads")
    of_each = name if threads is None else f"{threads} thread{'s'[: threads != 1]} of a CPU ({name})"
    return of_each if count == 1 else f"{count} processes, each on {of_each}"


def time_in_words(seconds: float) -> str:
    """For example `45 s`, `14 min` or `3 h 12 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def command_in_words(command: list[str], processes: int = 1, on_cpu: bool = False) -> str:
    """A command as it is typed, without anything that tells of the machine."""
    script, *flags = command
    head = ["hwdiffusion", "train", script.removeprefix("train_")]
    if processes > 1:
        head = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
        head += ["-m", f"hwdiffusion.train_scripts.{script}"]
    typed = shlex.join([*head, *map(_word_without_path, flags)])
    return f"ACCELERATE_USE_CPU=true {typed}" if processes > 1 and on_cpu else typed


def _word_without_path(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{without_path(value)}"


def without_path(value: str) -> str:
    """A path that tells of a machine by its last part, anything else as it is."""
    path = Path(value)
    absolute = path.is_absolute() or value.startswith("~") or re.match(r"[A-Za-z]:[\\/]", value) is not None
    if not absolute and ".." not in path.parts:
        return value
    return re.split(r"[\\/]", os.path.normpath(value).rstrip("\\/"))[-1] or "."
