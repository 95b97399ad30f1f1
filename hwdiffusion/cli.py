"""The command line `hwdiffusion …`; on several processes, `accelerate launch -m hwdiffusion.cli …`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable

from hwdiffusion import InputError


def evaluate(argv: list[str]):
    """Measure a run, or a folder of pictures, against real ones."""
    from hwdiffusion.config import parse_evaluation

    args = parse_evaluation("evaluate", argv)  # before the heavy imports
    from hwdiffusion import evaluation
    from hwdiffusion.train_scripts import train_classifier

    _answer(args.json, lambda: evaluation.evaluate(args, train_classifier.train))


def sweep(argv: list[str]):
    """Measure a run at every combination of samplers, steps and guidance scales."""
    from hwdiffusion.config import parse_evaluation

    args = parse_evaluation("sweep", argv)
    from hwdiffusion.sweep import sweep
    from hwdiffusion.train_scripts import train_classifier

    _answer(args.json, lambda: {"rows": sweep(args, train_classifier.train)})


def compare(argv: list[str]):
    """Put several runs side by side: one table and one picture."""
    from hwdiffusion.config import parse_comparison

    args = parse_comparison(argv)
    from hwdiffusion.compare import compare
    from hwdiffusion.train_scripts import train_classifier

    _answer(args.json, lambda: {"runs": compare(args, train_classifier.train)})


def _answer(as_json: bool, work: Callable[[], dict]):
    """Do the work, which prints what it finds; or, as JSON, print what it returns, and all else to stderr."""
    if not as_json:
        work()
        return
    with contextlib.redirect_stdout(sys.stderr):
        found = work()
    if os.environ.get("RANK", "0") == "0":  # of several processes one answers
        from hwdiffusion.report import as_json_text

        print(as_json_text(found))


def presets(argv: list[str]):
    """List the presets with their sizes and scores; `presets show NAME` prints one."""
    parser = _parser("presets", "hwdiffusion presets show mnist-ldm")
    parser.add_argument("show", nargs="?", choices=["show"])
    parser.add_argument("name", nargs="?", help="a preset, or a YAML file that stands on one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.show and not args.name:
        raise InputError("presets show needs the name of a preset; `hwdiffusion presets` lists them")
    from hwdiffusion.preset_table import print_preset, print_presets

    if args.show:
        print_preset(args.name, args.json)
    else:
        print_presets(args.json)


def train(argv: list[str]):
    """Train a model: `train ldm`, `ddpm`, `wgan`, `vqgan`, `distill` or `classifier`, with the flags of its script."""
    kinds = ("ldm", "ddpm", "wgan", "vqgan", "distill", "classifier")
    if not argv or argv[0] not in kinds:
        if argv in (["-h"], ["--help"]):
            print(
                f"usage: hwdiffusion train {{{','.join(kinds)}}} [flags]\n\n`hwdiffusion train KIND --help` lists the "
                "flags.\n\nexample: hwdiffusion train ldm --preset digits --output_dir runs/digits"
            )
            return
        raise InputError(f"name what to train, one of {', '.join(kinds)}; then its flags")
    script = f"train_{argv[0]}"
    from hwdiffusion.config import parse

    parse(script, argv[1:])  # what is wrong is said once, and not by every process
    from accelerate.commands.config.config_args import default_config_file
    from torch import accelerator

    command = [sys.executable, "-m", f"hwdiffusion.train_scripts.{script}"]
    if os.path.isfile(default_config_file) or accelerator.device_count() > 1:  # else there is nothing to launch
        command[2:2] = ["accelerate.commands.launch", "-m"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *argv[1:]])  # in place of this process: it is that one which is told to stop


def sample(argv: list[str]):
    """Draw pictures of labels, into a folder or as one picture."""
    _draw("sample", argv)


def demo(argv: list[str]):
    """Draw with a run in the browser, or with two side by side."""
    parser = _parser("demo", "hwdiffusion demo runs/digits")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one or two run folders or Hub ids")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 takes any that is free")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        raise InputError(f"demo shows one run, or two side by side, not {len(args.runs)}")
    from hwdiffusion.demo import serve

    serve(args.runs, args.host, args.port, args.device)


def push(argv: list[str]):
    """Upload a run to the Hub, with its card."""
    parser = _parser("push", "hwdiffusion push runs/digits me/digits --private")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("repo_id", help="USER/NAME on the Hub; it is made if it isn't there")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--space", action="store_true", help="besides, a Space of that name with the demo of it")
    args = parser.parse_args(argv)
    from hwdiffusion import hub

    if args.space:
        from hwdiffusion import space

        space.check_space(args.run)
    print(hub.push(args.run, args.repo_id, args.private))
    if args.space:
        print(space.push_space(args.run, args.repo_id, args.private))


def doctor(argv: list[str]):
    """Say what is installed, what the machine has, and what is missing for what."""
    parser = _parser("doctor", "hwdiffusion doctor --json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from hwdiffusion.doctor import print_examination

    print_examination(args.json)


def completion(argv: list[str]):
    """Print a script by which bash or zsh completes commands, flags and their values."""
    parser = _parser("completion", 'hwdiffusion completion bash; now: eval "$(hwdiffusion completion bash)"')
    parser.add_argument("shell", choices=("bash", "zsh"))
    args = parser.parse_args(argv)
    from hwdiffusion.completion import completion_script

    print(completion_script(args.shell, COMMANDS, _parser_of))


_DESCRIBE: list[str] = []  # what a command is called with to give its parser, and to do nothing


class _Described(Exception):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command that makes it by `_parser`."""
    try:
        COMMANDS[command](_DESCRIBE)
    except _Described as found:
        return found.parser
    raise AssertionError(f"the command {command} parses its flags by no `_parser`")


def _parser(command: str, example: str) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def parse_args(self, args=None, namespace=None):
            if args is _DESCRIBE:
                raise _Described(self)
            return super().parse_args(args, namespace)

        def error(self, message):  # argparse would print the whole usage and leave
            raise InputError(message)

    return Parser(prog=f"hwdiffusion {command}", description=COMMANDS[command].__doc__, epilog=f"example: {example}")


def trajectory(argv: list[str]):
    """Draw samples on their way from noise, as a picture and as an animation."""
    _draw("trajectory", argv)


def vary(argv: list[str]):
    """Noise a picture to several strengths and denoise it by the same or another label."""
    _draw("vary", argv)


def inpaint(argv: list[str]):
    """Draw a part of a picture anew."""
    _draw("inpaint", argv)


def interpolate(argv: list[str]):
    """Draw the pictures between two seeds and between two labels."""
    _draw("interpolate", argv)


def _draw(command: str, argv: list[str]):
    from hwdiffusion.config import parse_drawing

    args = parse_drawing(command, argv)
    from hwdiffusion import drawing

    {
        "sample": drawing.draw_samples,
        "trajectory": drawing.draw_trajectory,
        "vary": drawing.draw_variations,
        "inpaint": drawing.draw_inpainting,
        "interpolate": drawing.draw_interpolation,
    }[command](args)


COMMANDS = {
    "presets": presets,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "sweep": sweep,
    "compare": compare,
    "trajectory": trajectory,
    "vary": vary,
    "inpaint": inpaint,
    "interpolate": interpolate,
    "demo": demo,
    "push": push,
    "doctor": doctor,
    "completion": completion,
}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hwdiffusion",
        epilog="`hwdiffusion COMMAND --help` lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{name}: {command.__doc__}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--debug", action="store_true", help="before the command: tracebacks of errors")
    first = 2 if argv[:1] == ["--debug"] else 1
    args = parser.parse_args(argv[:first])
    command, argv = args.command, argv[first - 1 :]
    if args.debug:
        COMMANDS[command](argv[1:])
        return 0

    from hwdiffusion.failures import exit_code

    return exit_code(f"hwdiffusion {command}", lambda: COMMANDS[command](argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
