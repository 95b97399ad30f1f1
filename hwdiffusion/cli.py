"""The command line `hwdiffusion …`; on several processes, `accelerate launch -m hwdiffusion.cli …`."""

import argparse
import sys


def evaluate(argv: list[str]):
    """Measure a run, or a folder of pictures, against real ones."""
    from hwdiffusion.config import parse_evaluation

    args = parse_evaluation("evaluate", argv)  # before the heavy imports
    from hwdiffusion import evaluation
    from hwdiffusion.train_scripts import train_classifier

    evaluation.evaluate(args, train_classifier.train)


def sweep(argv: list[str]):
    """Measure a run at every combination of samplers, steps and guidance scales."""
    from hwdiffusion.config import parse_evaluation

    args = parse_evaluation("sweep", argv)
    from hwdiffusion.sweep import sweep
    from hwdiffusion.train_scripts import train_classifier

    sweep(args, train_classifier.train)


COMMANDS = {"evaluate": evaluate, "sweep": sweep}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hwdiffusion",
        epilog="`hwdiffusion COMMAND --help` lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{name}: {command.__doc__}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    command = parser.parse_args(argv[:1]).command

    from hwdiffusion.failures import exit_code

    return exit_code(f"hwdiffusion {command}", lambda: COMMANDS[command](argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
