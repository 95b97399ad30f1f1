"""Shell completion: a script for bash or zsh that knows every command, flag and choice, and needs no Python to answer.

It is made by shtab from the parsers of the commands, once; so a key press costs nothing of what they import.
"""

import argparse
from collections.abc import Callable

from hwdiffusion import InputError
from hwdiffusion.arguments import (
    COMPILATIONS,
    DRAWINGS,
    EVALUATIONS,
    LR_SCHEDULERS,
    METRICS,
    PRECISIONS,
    SAMPLERS,
    SCRIPTS,
)


SHELLS = ("bash", "zsh")
_FOLDERS = {"run", "output_dir", "train_data_dir", "images", "reference", "classifier", "evaluation_classifier",
            "vqvae", "teacher", "resume_from_checkpoint", "guide"}  # fmt: skip
_FILES = {"image", "mask", "output", "animation", "label_sets", "extractor_weights"}
_CHOICES = {
    "scheduler": SAMPLERS,
    "metrics": METRICS,
    "lr_scheduler": LR_SCHEDULERS,
    "mixed_precision": PRECISIONS,
    "torch_compile": COMPILATIONS,
}


def completion_script(shell: str, commands: dict[str, Callable], parser_of: Callable) -> str:
    """The script that a shell reads to complete `hwdiffusion`.

    Args:
        shell: one of `SHELLS`.
        commands: by name; the docstring of each says what it does.
        parser_of: gives the parser of one that has no flags in `arguments.py`.

    Raises:
        InputError: shtab isn't installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError('completion needs `pip install "hwdiffusion[completion]"`') from error
    root = argparse.ArgumentParser(prog="hwdiffusion")
    root.add_argument("--debug", action="store_true", help="before the command: tracebacks of errors")
    subparsers = root.add_subparsers()
    for name, command in commands.items():
        about = (command.__doc__ or "").strip().splitlines()[0]
        if name == "train":
            kinds = subparsers.add_parser(name, help=about).add_subparsers()
            for script, cls in SCRIPTS.items():
                kind = script.removeprefix("train_")
                kinds.add_parser(kind, help=f"as {script}.py does", parents=[_parser_of_flags(cls)])
            continue
        flags = EVALUATIONS.get(name) or DRAWINGS.get(name)
        parent = parser_of(name) if flags is None else _parser_of_flags(flags)
        parser = subparsers.add_parser(name, help=about, parents=[parent], add_help=flags is not None)
        if flags is not None:
            parser.add_argument("runs" if name == "compare" else "folder", nargs="*", help="a run folder or Hub id")
    _complete_values(root, shtab)
    return shtab.complete(root, shell=shell)


def _parser_of_flags(cls: type) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser  # takes a second to import

    parser = HfArgumentParser(cls, add_help=False)
    for action in parser._actions:  # it takes each flag with hyphens too; one spelling is enough to be offered
        action.option_strings = [word for word in action.option_strings if "-" not in word[2:]]
    return parser


def _complete_values(parser: argparse.ArgumentParser, shtab):
    """Say of every argument what its value is: a folder, a file, or one of some words."""
    from hwdiffusion.config import preset_names

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_values(inner, shtab)
        elif action.dest == "preset" or (action.dest == "name" and "presets" in parser.prog):
            action.choices = preset_names()
        elif action.dest in _CHOICES and action.choices is None:
            action.choices = list(_CHOICES[action.dest])
        elif action.dest in _FOLDERS or not action.option_strings and action.dest in ("runs", "folder"):
            action.complete = shtab.DIRECTORY
        elif action.dest in _FILES:
            action.complete = shtab.FILE
