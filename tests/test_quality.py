"""What the presets promise: full trainings, judged from outside. Slow; run by `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hwdiffusion.train_scripts import train_ldm


ROOT = Path(__file__).resolve().parents[1]


def judge(run: Path, output: Path, *argv) -> dict:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "sample_quality.py"),
        str(run),
        "--output",
        str(output),
        *argv,
    ]
    subprocess.run(command, check=True)
    (result,) = json.loads(output.read_text())
    return result


@pytest.mark.slow
def test_the_demo_draws_digits_that_obey_cover_and_do_not_copy(tmp_path):
    """An SVM on scikit-learn's digits names 500 samples at the pipeline's own settings."""
    assert train_ldm.main(["--preset", "digits", "--output_dir", str(tmp_path / "run")]) == 0
    result = judge(tmp_path / "run", tmp_path / "result.json")
    assert result["n"] == 500
    assert result["label_accuracy"] >= 0.97
    assert result["coverage"] >= 0.9 * result["coverage_of_real"]
    assert result["nearest_neighbour_ratio"] >= 0.8


@pytest.mark.slow
def test_mnist_from_raw_pictures(real_data, tmp_path):
    argv = [
        "--preset",
        "mnist-ldm",
        "--train_data_dir",
        str(real_data / "mnist"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert train_ldm.main(argv) == 0
    result = judge(tmp_path / "run", tmp_path / "result.json")
    assert result["label_accuracy"] >= 0.97
    assert result["coverage"] >= 0.9 * result["coverage_of_real"]
    assert result["nearest_neighbour_ratio"] >= 0.8
