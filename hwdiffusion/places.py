"""Where what the user names is: here, a file or a folder, in a repository of the Hub, or in a module of theirs."""

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from hwdiffusion import InputError


def is_here(name: str | os.PathLike, called: str) -> bool:
    """Whether there is a file or folder of that name; if not, it is to be looked for on the Hub.

    Args:
        called: what to call it in an error, such as its flag.

    Raises:
        InputError: there is none, and the name can't be an id of the Hub, or lies in a folder that is here.
    """
    path, text = Path(name), os.fspath(name)
    if path.exists():
        return True
    beside = "/" in text and path.parent.is_dir()
    if not beside and text.count("/") <= 1 and not text.startswith(("/", "./", "../", "~")):
        return False
    others = [other.name for other in path.parent.iterdir() if other.name[0] != "."] if beside else []
    near = difflib.get_close_matches(path.name, others, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise InputError(f"{called} {text} can't be loaded: there is no such file or folder{hint}")


def load_own(name: str) -> Any:
    """What `MODULE:NAME` names: an attribute of a module in the current folder, or of an installed one."""
    module, attribute = name.split(":", 1)
    sys.path.insert(0, "")  # where the command is given: a script's own path begins at the script
    try:
        return getattr(importlib.import_module(module), attribute)
    finally:
        sys.path.remove("")


def file_of(run: str, name: str) -> Path | None:
    """A file of a run folder, or of a repository of the Hub, which is asked for it; `None` where it has none.

    Raises:
        InputError: there is no such run here, and its name can't be an id of the Hub.
        OSError: the Hub can't be asked.
    """
    if is_here(run, "the run"):
        path = Path(run) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(run, name))
    except EntryNotFoundError:
        return None
