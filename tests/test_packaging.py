"""What people who install the wheel get."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_works_outside_of_the_checkout(tmp_path):
    tree = tmp_path / "tree"  # a build leaves things behind, which the next one would ship
    for name in ("hwdiffusion", "pipelines", "train_scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tree)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    presets = {f"hwdiffusion/presets/{path.name}" for path in (ROOT / "hwdiffusion" / "presets").glob("*.yaml")}
    assert presets <= names and "hwdiffusion/pipelines/class_conditional.py" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "pipelines/")) for name in names)

    command = [sys.executable, "-m", "hwdiffusion.train_scripts.train_ldm", "--dry_run", "--output_dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "s a step" in done.stdout

    where = "import hwdiffusion.pipelines as p; print(p.ClassConditionalPipeline.__module__, p.__file__)"
    said = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [
        "hwdiffusion.pipelines.class_conditional",
        str(tmp_path / "site/hwdiffusion/pipelines/__init__.py"),
    ]
