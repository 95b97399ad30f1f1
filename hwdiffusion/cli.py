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
        "trajectory": drawing.draw_trajectory,
        "vary": drawing.draw_variations,
        "inpaint": drawing.draw_inpainting,
        "interpolate": drawing.draw_interpolation,
    }[command](args)


COMMANDS = {
    "evaluate": evaluate,
    "sweep": sweep,
    "trajectory": trajectory,
    "vary": vary,
    "inpaint": inpaint,
    "interpolate": interpolate,
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
    command = parser.parse_args(argv[:1]).command

    from hwdiffusion.failures import exit_code

    return exit_code(f"hwdiffusion {command}", lambda: COMMANDS[command](argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
