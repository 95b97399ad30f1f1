"""How a command ends: with which exit code, and with which sentence where it fails, of its input, disk or memory."""

import errno
import os
import re
import sys
from collections.abc import Callable

from hwdiffusion import InputError, Interrupted, RunError


# What can only come of writing, and what may come of reading too.
_DISK = {
    errno.ENOSPC: "{} can't be written: no space is left on the device; free some, or keep fewer checkpoints",
    errno.EDQUOT: "{} can't be written: the disk quota is used up; free some, or keep fewer checkpoints",
    errno.EROFS: "{} can't be written: the file system is read-only; name another --output_dir",
    errno.EACCES: "permission is denied for {}; change its permissions, or name another",
    errno.EPERM: "permission is denied for {}; change its permissions, or name another",
    errno.EIO: "the device reports an input/output error at {}; see to it, or go on on another one",
}
_WHOLE = "what was saved before is whole, and can be continued from"


def exit_code(name: str, work: Callable[[], object]) -> int:
    """Do the work of a command and return its exit code, with one sentence on what went wrong: 2 where the input can't
    be used, 1 where the work can't go on, 128 and the signal's number where it was told to stop. Where nobody reads
    its output any more, it ends without a word."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes the rest when it ends
        return 141  # 128 and the number of SIGPIPE, which not every system has
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # all processes stop; one says so
            print(f"{name}: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print(f"{name}: stopped; what was saved before is whole", file=sys.stderr)
        return 130
    except Exception as error:
        of_all_processes = isinstance(error, RunError)
        sentence = str(error) if of_all_processes else sentence_of(error)
        if sentence is None:
            raise
        if not of_all_processes or os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {sentence}", file=sys.stderr)
        return 1
    finally:
        distributed = sys.modules.get("torch.distributed")  # not imported if the input was wrong
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def sentence_of(error: BaseException) -> str | None:
    """What happened and what to change, where it is known; `None` for what may be an error of the program."""
    seen: BaseException | None = error
    while seen is not None:
        sentence = _of_disk(seen) or _of_memory(seen)
        if sentence is not None:
            return f"{sentence}; {_WHOLE}"
        # torch reports the state of its writer, and has the cause only as its context
        seen = seen.__context__ if "inline_container" in str(seen) else seen.__cause__
    return None


def _of_disk(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors has an error of its own, which says the number in its text
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said.group(1)) if said else None
    if number not in _DISK:
        return None
    path = getattr(error, "filename", None)
    return _DISK[number].format("a file of the run" if path is None else path)


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
