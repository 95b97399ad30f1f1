"""Checkpoints that are whole or not there: written beside, with checksums, and renamed into place; read with care."""

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from hwdiffusion import InputError


CHECKPOINT = "checkpoint-"
STATE_FILE = "training_state.pt"
COMPONENTS = ("unet", "guidance_unet", "vqvae", "scheduler", "generator")  # folders of a run's pipeline
CHECKSUMS = "checksums.json"


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_folder(final: Path, write: Callable[[Path], None]):
    """Write a folder beside and give it its name when it is whole and on the disk.

    A kill at any moment leaves what was there before; so does an error, a full disk for example.
    """
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part)
        sync_to_disk(part)
        replace_folder(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # its space may be what was missing
        raise


def write_into(folder: Path, write: Callable[[Path], None], last: tuple[str, ...]):
    """Write files and folders beside and move them into a folder one by one, those named `last` at the end."""
    part = folder / "artefact.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write(part)
        sync_to_disk(part)
        for path in sorted(part.iterdir(), key=lambda path: (path.name in last, path.name)):
            if path.is_dir():
                replace_folder(path, folder / path.name)
            else:
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_file(path: Path, text: str):
    """Write a text file beside and give it its name when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def replace_folder(part: Path, final: Path):
    """Give a finished folder its name; a kill in between leaves the old one as `.old`, for `clear_unfinished`."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_unfinished(folder: Path):
    """Tidy up after a kill: what was being written goes, what was being replaced gets its name back."""
    for old in folder.glob("*.old"):
        final = old.with_suffix("")
        if final.name == "best" or final.name.startswith(CHECKPOINT):
            shutil.rmtree(old) if final.exists() else os.replace(old, final)
    for pattern in (
        f"{CHECKPOINT}*.part",
        "best.part",
        "artefact.part",
        *(f"{name}.old" for name in COMPONENTS),
    ):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def sync_to_disk(folder: Path):
    """Wait until all files of a folder are on the disk, so that its new name can't come before its content."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checksums(checkpoint: Path):
    """Note size and SHA-256 of every file of a checkpoint; to be called last, for it marks it as complete."""
    noted = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(checkpoint).items()}
    (checkpoint / CHECKSUMS).write_text(json.dumps(noted, indent=1), encoding="utf-8")


def delete_other_checkpoints(folder: Path, step: int, limit: int):
    """Keep a whole new checkpoint and the newest before it, `limit` in all; later ones are of a course that the run
    has left."""
    found = find_checkpoints(folder)
    later = [path for path in found if step_of(path) > step]
    for path in later + found[len(later) + limit :]:
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, broken ones too, the newest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made, by its name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def checkpoint_to_resume(args) -> Path | None:
    """The checkpoint that a start continues from: the one that is named, or the newest whole one of the run folder.

    A broken one is skipped with a warning.

    Raises:
        InputError: the named one is none or broken; all of the run folder's are broken.
    """
    if args.resume_from_checkpoint not in (None, "latest"):
        path = Path(args.resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            raise InputError(f"--resume_from_checkpoint {path} is not a checkpoint")
        if flaw_of(path) is not None:
            raise InputError(f"--resume_from_checkpoint {path} is broken ({flaw_of(path)}); name another")
        return path
    found = find_checkpoints(Path(args.output_dir))
    for checkpoint in found:
        flaw = flaw_of(checkpoint)
        if flaw is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is broken ({flaw}); going back to the one before, if any")
    if found:
        raise InputError(
            f"every checkpoint in --output_dir {args.output_dir} is broken; give --overwrite_output_dir to start anew"
        )
    return None


def flaw_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: a file is missing, or not what was written."""
    stamps = tuple((name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in _files(checkpoint).items())
    return _flaw_of(checkpoint, stamps)


@functools.lru_cache(maxsize=64)  # a start looks at the same checkpoint several times
def _flaw_of(checkpoint: Path, _stamps: tuple) -> str | None:
    files = _files(checkpoint)
    try:
        noted = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        sizes = {name: (entry["size"], entry["sha256"]) for name, entry in noted.items()}
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} can't be read"
    for name, (size, sha256) in sizes.items():
        if name not in files:
            return f"{name} is missing"
        if files[name].stat().st_size != size:
            return f"{name} has {files[name].stat().st_size} bytes instead of {size}"
        if _sha256(files[name]) != sha256:
            return f"{name} is not what was written"
    return None if STATE_FILE in sizes else f"{STATE_FILE} is missing"


def _files(checkpoint: Path) -> dict[str, Path]:
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(checkpoint).as_posix(): path for path in found}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
