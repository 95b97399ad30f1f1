"""Imported by every Python that `test_docs.py` starts: makes what the pages' commands do small.

The commands themselves are run as they are written, and parsed by the real parsers. What comes out of these is cut
down here: a training has a few steps on a few pictures, an evaluation a few samples, each of a few steps. The
benchmarks have parsers of their own, so their commands are lengthened by flags, of which the last counts.
"""

import functools
import sys
from pathlib import Path

from hwdiffusion import arguments, config


STEPS, PICTURES, SAMPLES = 6, 150, 140  # a Fréchet distance of 128 features needs more than so many samples
FEWEST = 5  # steps of which a fifth, the strength of a weak variation, is still one
BENCHMARKS = {
    "codebook_health": "--max_train_steps 2 --codes 64",
    "guidances": f"--num_samples {SAMPLES} --num_inference_steps 2",
    "label_binding": "--max_train_steps 2 --num_seeds 2",
    "sample_quality": "--num_samples 60 --num_inference_steps 2",
    "samplers": "--num_samples 10 --num_inference_steps 5 --other_steps 5",
    "training_memory": "",
    "variations": f"--num_samples 10 --num_inference_steps {FEWEST} --num_refinements 1",
}


def cut_down(args):
    if isinstance(args, arguments.TrainingArguments):
        # where checkpoints are asked for by number, there is at least one
        often = args.checkpointing_steps if (args.checkpointing_steps or 1000) <= 50 else 0
        args.max_train_steps, args.max_train_seconds, args.num_train_epochs = often + STEPS, None, None
        args.train_batch_size = min(args.train_batch_size, 8)
        args.max_train_samples = min(args.max_train_samples or PICTURES, PICTURES)
        if hasattr(args, "num_inference_steps"):
            args.num_inference_steps = min(args.num_inference_steps, FEWEST)
        if hasattr(args, "evaluation_samples"):
            args.evaluation_samples = SAMPLES
    elif isinstance(args, arguments.EvaluationArguments):
        args.num_samples, args.num_seeds = min(args.num_samples, SAMPLES), 2
        steps = args.num_inference_steps
        if steps is not None:  # different ones stay different
            few = [2 * place for place in range(1, len(steps) + 1)] if isinstance(steps, list) else 2
            args.num_inference_steps = few
    elif isinstance(args, arguments.DrawingArguments):
        args.num_inference_steps = args.num_inference_steps and min(args.num_inference_steps, FEWEST)
        if hasattr(args, "num"):
            args.num = min(args.num, 2)
    return args


@functools.wraps(config._parse_flags)
def _parse_flags(*given, parse=config._parse_flags):
    return cut_down(parse(*given))


config._parse_flags = _parse_flags
if Path(sys.argv[0]).parent.name == "benchmarks":
    sys.argv += BENCHMARKS[Path(sys.argv[0]).stem].split()
