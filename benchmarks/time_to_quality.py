#!/usr/bin/env python
"""What does a time budget buy? MNIST from raw pictures, every row in the same time on the same machine.

    python benchmarks/time_to_quality.py --budget 600 --train_data_dir MNIST --classifier runs/mnist-classifier \\
        --output time-to-quality

`ours` trains both stages by one command (`train_ldm.py --preset mnist-fast`); the time is the command's, from its
start to its end, everything inside. `ours, pixels` is `train_ddpm.py --preset mnist-ddpm`. `plain pixels` and `plain
latents` are loops by diffusers alone (`peers.py`). Ours draw as the saved pipeline does unless told otherwise, both in
20 steps of DDIM, the loops in 20 of DPM-Solver++; all of them the labels of the test digits, since a distance also
tells other frequencies of labels. Pixel models draw slowly, so fewer of their samples are judged. Every row's samples
are judged by the same classifier: label accuracy, Fréchet distance, coverage, copies; beside them the floors, as many
real held-out digits and their reconstructions by the row's own autoencoder. Distances are larger of fewer samples, so
they compare at equal n alone. Rows that are in OUTPUT.json already are kept, if they were made in the same way. The
table is `OUTPUT.md`.

All rows are of a CPU; on a machine with a GPU, set ACCELERATE_USE_CPU=true.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate.utils import parse_flag_from_env

from hwdiffusion.arguments import EvaluationArguments
from hwdiffusion.config import load_preset
from hwdiffusion.data import load_data
from hwdiffusion.evaluation import evaluate
from hwdiffusion.extractors import load_extractor
from hwdiffusion.failures import exit_code
from hwdiffusion.figures import read_metrics
from hwdiffusion.models import load_autoencoder
from hwdiffusion.precision import multiplies_bf16
from hwdiffusion.reconstruction import reconstruct
from hwdiffusion.reference import data_arguments
from hwdiffusion.samples import save_npz
from hwdiffusion.train_scripts import train_classifier


ROOT = Path(__file__).resolve().parents[1]
ROWS = ["ours", "ours, pixels", "plain latents", "plain pixels"]
FIRST_STAGE = 0.22  # of the budget but for RESERVE
DRAWN = {"label_frequencies": "held_out"}
BF16 = multiplies_bf16(torch.device("cpu"))
RESERVE = 32  # seconds of a command that are no training: imports, reading, saving, the sample grid


def train_ours(args, run: Path) -> float:
    training = args.budget - RESERVE
    first = FIRST_STAGE * training
    return timed(
        [
            str(ROOT / "train_scripts" / "train_ldm.py"),
            *["--preset", args.preset, "--train_data_dir", args.train_data_dir, "--output_dir", str(run)],
            *["--train_vqgan.max_train_seconds", f"{first:.0f}", "--max_train_seconds", f"{training - first:.0f}"],
            *["--checkpointing_steps", "1000000", "--overwrite_output_dir"],
        ]
    )[0]


def train_pixels(args, run: Path) -> float:
    return timed(
        [
            str(ROOT / "train_scripts" / "train_ddpm.py"),
            *["--preset", "mnist-ddpm", "--train_data_dir", args.train_data_dir, "--output_dir", str(run)],
            *["--max_train_seconds", f"{args.budget - RESERVE:.0f}", "--lr_warmup_steps", "50"],
            *["--mixed_precision", "auto", "--num_inference_steps", "20"],
            *["--checkpointing_steps", "1000000", "--overwrite_output_dir"],
        ]
    )[0]


def train_peer(args, which: str, output: Path) -> dict:
    flags = ["--budget", str(args.budget), "--train_data_dir", args.train_data_dir, "--output", str(output)]
    flags += ["--bf16"] if BF16 else []  # as ours, by `--mixed_precision auto`
    count = args.num_samples if which == "latent" else args.num_pixel_samples
    peer = [str(ROOT / "benchmarks" / "peers.py"), which, *flags, "--num_samples", str(count)]
    return json.loads(timed(peer)[1].strip().splitlines()[-1])


def timed(command: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    said = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - began, said


def images_seen(run: Path) -> int:
    """Of both stages."""
    seen = 0
    for stage in (run / "first-stage", run):
        if (stage / "metrics.jsonl").is_file():
            config = yaml.safe_load((stage / "config.yaml").read_text())
            seen += read_metrics(stage / "metrics.jsonl")[-1]["step"] * config[config["script"]]["train_batch_size"]
    return seen


def judged(args, folder: Path, name: str, count: int, **what) -> dict:
    return evaluate(
        EvaluationArguments(
            num_samples=count,
            classifier=args.classifier,
            train_data_dir=None if "images" in what else args.train_data_dir,
            output_dir=str(folder / f"{name}-evaluation"),
            **what,
        ),
        train_classifier.train,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of a row")
    parser.add_argument("--preset", default="mnist-fast")
    parser.add_argument("--train_data_dir", required=True, help="MNIST's parquet files")
    parser.add_argument("--classifier", required=True, help="a folder of train_classifier.py")
    parser.add_argument("--num_samples", type=int, default=10_000, help="of latent models")
    parser.add_argument("--num_pixel_samples", type=int, default=1000)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--output", type=Path, default=Path("time-to-quality"))
    args = parser.parse_args()
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        parser.error("the plain loops are of a CPU; set ACCELERATE_USE_CPU=true, so that ours are, too")

    # what is wrong is said before anything is trained
    if args.budget <= RESERVE:
        parser.error(f"--budget must be more than the {RESERVE} seconds that aren't training, not {args.budget:g}")
    load_preset(args.preset)
    load_data(data_arguments(args.train_data_dir, [28, 28], "L"))
    load_extractor("classifier", args.classifier)
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output.with_suffix(".json")
    rows = json.loads(kept.read_text()) if kept.is_file() else {}
    of_mnist = {"reference": args.train_data_dir, "resolution": [28, 28], "image_mode": "L"}
    for name in args.rows:
        key = f"{name} ({args.budget:g} s)"
        folder = args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{args.budget:g}s"
        count = args.num_pixel_samples if "pixels" in name else args.num_samples
        how = {"classifier": args.classifier, "n": count, "data": args.train_data_dir, "bf16": BF16, **DRAWN}
        if name.startswith("plain"):
            how["peers"] = hashlib.sha256((ROOT / "benchmarks" / "peers.py").read_bytes()).hexdigest()
        else:
            how |= {"preset": load_preset(args.preset if name == "ours" else "mnist-ddpm"), "reserve": RESERVE}
            how |= {"first_stage": FIRST_STAGE} if name == "ours" else {}
        if key in rows and rows[key]["how"] == how:
            pass
        elif name.startswith("ours"):
            seconds = (train_ours if name == "ours" else train_pixels)(args, folder)
            report = judged(args, args.output, folder.name, count, run=str(folder), **DRAWN)
            rows[key] = {"how": how, "seconds": seconds, "images_seen": images_seen(folder), "report": report}
        else:
            images = folder.with_suffix(".npz")
            said = train_peer(args, name.removeprefix("plain ").removesuffix("s"), images)
            report = judged(args, args.output, folder.name, count, images=str(images), **of_mnist)
            seen = said["images_seen"]
            rows[key] = {"how": how, "seconds": said["seconds"], "images_seen": seen, "report": report}
        ceiling = f"{key}, reconstructions"
        if name == "ours" and rows.get(ceiling, {}).get("how") != how:
            kept.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
            images = args.output / f"{folder.name}-reconstructions.npz"
            save_reconstructions(args, folder, images)
            floor = judged(args, args.output, f"{folder.name}-reconstructions", count, images=str(images), **of_mnist)
            rows[ceiling] = {"how": how, "seconds": None, "images_seen": None, "report": floor}
        kept.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        args.output.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def table(rows: dict) -> str:
    lines = []
    for name, row in rows.items():
        trained = row["seconds"] is not None
        cells = {"row": name, "seconds": f"{row['seconds']:.0f}" if trained else ""}
        cells |= {"pictures seen": f"{row['images_seen']:,}" if trained else ""}
        cells |= columns(row["report"])
        if not lines:
            lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def columns(report: dict) -> dict[str, str]:
    labels, floor = report["labels"], report["floor"]
    real, copies = floor["labels"], report["memorisation"]
    return {
        "n": f"{report['n']:,}",
        "label accuracy (95 %), real": "{:.4f} ({:.4f}–{:.4f}), {:.4f}".format(
            labels["accuracy"], *labels["accuracy_95"], real["accuracy"]
        ),
        "worst class": f"{labels['worst_class']:.3f}",
        "Fréchet distance, real": "{:.3f}, {:.3f}".format(
            *(side["distances"]["frechet_distance"] for side in (report, floor))
        ),
        "coverage, real": "{:.3f}, {:.3f}".format(*(side["manifold"]["coverage"] for side in (report, floor))),
        "copies": ", ".join(f"{scores['share_of_copies']:.3f} ({space})" for space, scores in copies.items()),
    }


@torch.no_grad()
def save_reconstructions(args, run: Path, output: Path):
    """The first training digits, by a run's autoencoder: what its samples would be, had the second stage no flaw."""
    data = load_data(data_arguments(args.train_data_dir, [28, 28], "L"))
    vqvae = load_autoencoder(str(run), 1, (28, 28)).eval()

    def batches():
        for start in range(0, args.num_samples, 250):
            images, labels = data.train[range(start, min(start + 250, args.num_samples))]
            yield reconstruct(vqvae, images)[0], labels

    save_npz(output, batches(), data.train.class_names)


if __name__ == "__main__":
    sys.exit(exit_code("time_to_quality.py", main))
