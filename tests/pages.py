"""The pages of the documentation: their blocks of code, checked quickly or run as they are written.

A comment of HTML before a block says where it is not run as it stands:

    <!-- test: skip, REASON -->             it is checked, and not run
    <!-- test: without COMMAND, REASON -->  it is run without the lines that begin with that command
    <!-- test: file NAME -->                it is written to that file
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {"bash", "python"}  # the languages of blocks that are run; other words for them would hide a block
LANGUAGES = RUN | {"", "json", "yaml"}
MODELS = {"unet": ["UNet2DConditionModel"], "vqvae": ["VQModel"],
          "noise_scheduler": ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"]}  # fmt: skip


@dataclass
class Block:
    page: str
    line: int  # of its first line of code
    language: str
    code: str
    skipped: bool = False
    without: str | None = None
    file: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.skipped and self.file is None

    @property
    def to_run(self) -> str:
        """Its code, without the lines that are left out."""
        lines = self.code.splitlines(keepends=True)
        return "".join(line for line in lines if self.without is None or not line.startswith(self.without))


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: a comment for this test that isn't understood, or before no block; a language that isn't known.
    """
    blocks, block, said = [], None, None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.fullmatch(r"```(\w*)", line.strip()) if line.startswith("```") else None
        if block is not None:
            if fence:
                blocks.append(block)
                block = None
            else:
                block.code += f"{line}\n"
        elif fence:
            if fence[1] not in LANGUAGES:
                raise ValueError(f"{page}, line {number}: the language of a block must be one of {sorted(LANGUAGES)}")
            block, said = Block(page, number + 1, fence[1], "", **(said or {})), None
        elif said is not None:
            raise ValueError(f"{page}, line {number}: a block must follow the comment for the test")
        elif line.startswith("<!-- test:"):
            said = _directive(line, f"{page}, line {number}")
    return blocks


def _directive(line: str, where: str) -> dict:
    said = re.fullmatch(r"<!-- test: (skip|without|file)(?: ([\w ./-]+))?(?:, (.+))? -->", line)
    kind, what, reason = said.groups() if said else (None, None, None)
    if kind == "skip" and what is None and reason:
        return {"skipped": True}
    if kind == "without" and what and reason:
        return {"without": what}
    if kind == "file" and what and reason is None:
        return {"file": what}
    raise ValueError(f"{where}: not understood: {line}")


def all_blocks() -> dict[Path, list[Block]]:
    return {page: blocks_of(page.read_text(), page.relative_to(ROOT).as_posix()) for page in PAGES}


# ---------------------------------------------------------------------------------------------------------------------
# Checking without running
# ---------------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A command line has been parsed without a complaint; nothing is run."""


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell script, each as its words, without assignments before it and comments."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if ">" in words:
            words = words[: words.index(">")]
        while "&&" in words:
            place = words.index("&&")
            commands.append(words[:place])
            words = words[place + 1 :]
        if words:
            commands.append(words)
    return commands


def check_command(words: list[str], files: dict[str, str]):
    """Parse a command line by the parser of what it starts.

    Args:
        files: the pages' own files, their text by their names.

    Raises:
        Exception: whatever the parser has to say, or that nothing here parses such a command.
    """
    program, *argv = words
    if program == "hwdiffusion":
        _check_hwdiffusion(argv)
    elif program == "accelerate" and argv[:1] == ["launch"]:
        from accelerate.commands.launch import launch_command_parser

        with _parsers_that_raise():
            launched = launch_command_parser().parse_args(argv[1:])
        _check_script(launched.training_script, launched.training_script_args, files)
    elif program == "python" and argv and argv[0].endswith(".py"):
        _check_script(argv[0], argv[1:], files)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        if not set(argv) <= set(targets):
            raise ValueError(f"the Makefile has no {argv}")
    elif program in ("source", "eval") and (inner := re.search(r"[<$]\((.+)\)", " ".join(argv))):
        check_command(inner[1].split(), files)
    elif program not in ("source", "cd", "pip", "hf", "mkdir"):
        raise ValueError(f"nothing is known that would parse {program!r}")


def _check_hwdiffusion(argv: list[str]):
    from hwdiffusion import cli, config
    from hwdiffusion.arguments import DRAWINGS

    command, *argv = argv[1:] if argv[:1] == ["--debug"] else argv
    if command not in cli.COMMANDS:
        raise ValueError(f"hwdiffusion has no command {command!r}")
    if command == "train":
        _check_sections(config.parse(f"train_{argv[0]}", argv[1:]), argv[1:])
    elif command in ("evaluate", "sweep"):
        config.parse_evaluation(command, argv)
    elif command == "compare":
        config.parse_comparison(argv)
    elif command in DRAWINGS:
        config.parse_drawing(command, argv)
    else:  # those that parse by argparse
        with _parsers_that_stop() as left_over, contextlib.suppress(Parsed):
            cli.COMMANDS[command](argv)
            raise ValueError(f"hwdiffusion {command} parsed nothing")
        if left_over:
            raise ValueError(f"hwdiffusion {command} takes no {left_over}")


def _check_script(script: str, argv: list[str], files: dict[str, str]):
    from hwdiffusion.config import parse

    place, name = ROOT / script, Path(script).stem
    if script in files:  # a script that the page tells to write names the one whose flags it has
        name = re.search(r'run_script\("(\w+)"', files[script])[1]
    elif not place.is_file():
        raise ValueError(f"there is no {script}")
    if name.startswith("train_"):
        _check_sections(parse(name, argv), argv)
        return
    beside = [str(place.parent), *sys.path]
    with _parsers_that_stop() as left_over, mock.patch.object(sys, "path", beside), contextlib.suppress(Parsed):
        with mock.patch.object(sys, "argv", [script, *argv]):
            runpy.run_path(str(place), run_name="__main__")
        raise ValueError(f"{script} parsed nothing")
    if left_over:  # flags that a benchmark hands to a training script
        _check_sections(parse("train_ldm", ["--preset", "shapes-ldm", *left_over]), left_over)


def _check_sections(config, argv: list[str]):
    """The keys that a command line sets in a section are arguments of the class that the section is for."""
    import diffusers

    for section, key in re.findall(r"--(\w+)\.(\w+)", " ".join(argv)):
        classes = [getattr(diffusers, name) for name in MODELS.get(section, [])]
        if classes and not any(key in inspect.signature(cls.__init__).parameters for cls in classes):
            raise ValueError(f"section {section} has no {key}")


@contextlib.contextmanager
def _parsers_that_raise():
    """Within it, argparse raises what it else prints."""

    def error(self, message):
        raise ValueError(message)

    with mock.patch.object(argparse.ArgumentParser, "error", error):
        yield


@contextlib.contextmanager
def _parsers_that_stop():
    """Within it, `parse_args` raises `Parsed` where it would return; yields the flags that a parser left over."""
    left_over, real = [], argparse.ArgumentParser.parse_known_args

    def parse_args(self, args=None, namespace=None):
        unknown = real(self, args, namespace)[1]
        if unknown:
            self.error(f"unrecognized arguments: {unknown}")
        raise Parsed

    def parse_known_args(self, args=None, namespace=None):
        left_over.extend(real(self, args, namespace)[1])
        raise Parsed

    with (
        _parsers_that_raise(),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
    ):
        yield left_over


def check_python(code: str):
    """Python that compiles, and what it imports of the package is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hwdiffusion":
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name) and not find_spec(f"{node.module}.{name.name}"):
                    raise ImportError(f"{node.module} has no {name.name}")


def known_flags() -> set[str]:
    """All flags of the scripts and commands of the package."""
    from hwdiffusion.arguments import DRAWINGS, EVALUATIONS, SCRIPTS

    classes = (*SCRIPTS.values(), *EVALUATIONS.values(), *DRAWINGS.values())
    return {f"--{field.name}" for cls in classes for field in fields(cls)}


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def make_place(folder: Path) -> Path:
    """A checkout as a reader has it, by links, with the pictures that the pages speak of."""
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "train_scripts", "benchmarks", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".installed").touch()  # so that `make` finds nothing to install

    random = np.random.default_rng(0)

    def picture(index: int, size: int = 40) -> Image.Image:  # of three kinds, told apart by their colours
        mean = np.roll([200, 90, 40], index % 3)
        return Image.fromarray((mean + random.integers(-40, 40, (size, size, 3))).clip(0, 255).astype(np.uint8))

    for index in range(1500):  # a tenth, which is held out, suffices for a Fréchet distance
        path = folder / "pictures" / ("cat", "dog", "wild")[index % 3] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    (folder / "AFHQ").symlink_to("pictures")
    (folder / "unlabelled").mkdir()
    (folder / "labelled-sets").mkdir()
    lines = []
    for index in range(60):
        picture(index).save(folder / "unlabelled" / f"{index}.png")
        picture(index).save(folder / "labelled-sets" / f"{index}.png")
        objects = ["red cube", "cyan sphere", "gray cube"][: 1 + index % 3]
        lines.append(json.dumps({"file_name": f"{index}.png", "objects": objects}))
    (folder / "labelled-sets" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "test.json").write_text('[["red cube", "cyan sphere"], ["gray cube"]]')
    _write_mnist(folder / "MNIST")
    return folder


def _write_mnist(folder: Path):
    """scikit-learn's digits in the form of MNIST's two parquet files."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    folder.mkdir()
    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    for split, places in (("train", range(1000)), ("test", range(1000, 1300))):
        images = [Image.fromarray(pictures[place]).resize((28, 28)) for place in places]
        columns = {"image": images, "label": [int(digits.target[place]) for place in places]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def environment(folder: Path, endpoint: str, token: str) -> dict[str, str]:
    """Of a reader who has logged in to the Hub, which is that of an endpoint, and whose trainings are small."""
    without = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in without}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests" / "miniature"),
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / ".hf"),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # which the loopback Hub doesn't speak
    }


def run_bash(code: str, folder: Path, env: dict[str, str], where: str):
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", code],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{where} exits with {done.returncode}:\n{code}\n{done.stdout[-4000:]}"


SESSION = """
import json, sys

sys.path.insert(0, "")
namespace, said = {"__name__": "__main__"}, sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    block = json.loads(line)
    exec(compile("\\n" * (block["line"] - 1) + block["code"], block["page"], "exec"), namespace)
    print("done", file=said, flush=True)
"""


class PythonSession:
    """A Python in which the blocks of a page are run one after another, as a reader would in one."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.log = open(folder / "python.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", SESSION],
            cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def run(self, block: Block):
        sent = json.dumps({"page": block.page, "line": block.line, "code": block.to_run})
        with contextlib.suppress(BrokenPipeError):
            print(sent, file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != "done\n":
            self.process.wait()
            self.log.seek(0)
            raise AssertionError(f"{block.where}:\n{block.code}\n{self.log.read()[-4000:]}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Shelf:
    """Runs that a page uses and another page makes, made by that page's command when they are first asked for."""

    def __init__(self, folder: Path, env: dict[str, str], pages: dict[Path, list[Block]]):
        self.folder, self.env, self.commands = make_place(folder), env, {}
        for block in (block for blocks in pages.values() for block in blocks):
            for words in commands_of(block.to_run) if block.language == "bash" and block.runs else []:
                made = _made_by(words)
                if made is not None:
                    self.commands.setdefault(made, shlex.join(words))

    def fetch(self, run: str, folder: Path):
        if run in self.commands and not (folder / run).exists():
            self._make(run)
            shutil.copytree(self.folder / run, folder / run)

    def _make(self, run: str):
        if (self.folder / run).exists():
            return
        for needed in _runs_in(self.commands[run]):
            if needed != run and needed in self.commands:
                self._make(needed)
        run_bash(self.commands[run], self.folder, self.env, f"what makes {run}")


def _made_by(words: list[str]) -> str | None:
    made = words[words.index("--output_dir") + 1] if "--output_dir" in words else ""
    return made if re.fullmatch(r"runs/[\w-]+", made) and "--dry_run" not in words else None


def _runs_in(code: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"(?<![\w/])runs/[\w-]+", code)))


def _needed_by(block: Block) -> list[str]:
    """The runs that a block names and doesn't make."""
    if block.language == "python":
        return _runs_in(block.to_run)
    commands = commands_of(block.to_run)
    made = {_made_by(words) for words in commands}
    return [run for words in commands for run in _runs_in(" ".join(words)) if run not in made]


def run_blocks(blocks: list[Block], folder: Path, env: dict[str, str], shelf: Shelf | None = None):
    """Run the blocks of a page in their order, Python in one session.

    Raises:
        AssertionError: one fails; it says which, and what it printed.
    """
    session = PythonSession(folder, env)
    try:
        for block in blocks:
            if block.file is not None:
                (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.file).write_text(block.code)
            if not block.runs:
                continue
            if shelf is not None:
                for run in _needed_by(block):
                    shelf.fetch(run, folder)
            if block.language == "bash":
                run_bash(block.to_run, folder, env, block.where)
            else:
                session.run(block)
    finally:
        session.close()
