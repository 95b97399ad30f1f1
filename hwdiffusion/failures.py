"""What a run can fail of that is neither its input's nor its own fault, in a sentence: disk, permission, memory."""

import errno
import re
import sys


_DISK = {
    errno.ENOSPC: "no space is left on the device; free some, or lower --checkpoints_total_limit",
    errno.EDQUOT: "the disk quota is used up; free some space, or lower --checkpoints_total_limit",
    errno.EROFS: "the file system is read-only; name another --output_dir",
    errno.EACCES: "permission is denied; change the permissions, or name another --output_dir",
    errno.EPERM: "the operation is not permitted; change the permissions, or name another --output_dir",
    errno.EIO: "the device reports an input/output error; name an --output_dir on another one",
}
_WHOLE = "what was saved before is whole, and the same command continues from the last checkpoint"


def sentence_of(error: BaseException) -> str | None:
    """What happened and what to change, where it is known; `None` for what may be an error of the program."""
    seen: BaseException | None = error
    while seen is not None:
        sentence = _of_disk(seen) or _of_memory(seen)
        if sentence is not None:
            return f"{sentence}; {_WHOLE}"
        seen = seen.__cause__ or seen.__context__
    return None


def _of_disk(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors has an error of its own, which says the number in its text
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said.group(1)) if said else None
    if number not in _DISK:
        return None
    path = getattr(error, "filename", None)
    return f"{path if path is not None else 'the output'} can't be written: {_DISK[number]}"


def _of_memory(error: BaseException) -> str | None:
    torch = sys.modules.get("torch")
    of_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    of_host = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not of_device and not of_host:
        return None
    return (
        f"the {'GPU' if of_device else 'machine'} has no memory left; halve --train_batch_size and double "
        "--gradient_accumulation_steps, which makes the same steps, and start with --resume_from_checkpoint latest"
        + (", or give --mixed_precision bf16" if of_device else "")
    )
