"""Pictures of results: labelled grids of samples, loss curves."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures `(B, C, H, W)` in [-1, 1] as PIL images of mode L or RGB."""
    return VaeImageProcessor().postprocess(images.detach().float().cpu(), output_type="pil")


def image_grid(
    images: Sequence[Image.Image], columns: int, row_names: Sequence[str] | None = None, cell: int = 64, gap: int = 4
) -> Image.Image:
    """Pictures in rows on a white ground, each scaled to about `cell` pixels, with the rows' names at the left."""
    scale = max(1, round(cell / max(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(12, height // 4))
    names = [str(name) for name in row_names or []]
    margin = max((round(font.getlength(name)) for name in names), default=0) + 2 * gap if names else gap
    grid = Image.new("RGB", (margin + columns * (width + gap), gap + rows * (height + gap)), "white")
    for index, image in enumerate(images):
        place = margin + index % columns * (width + gap), gap + index // columns * (height + gap)
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), place)
    draw = ImageDraw.Draw(grid)
    for row, name in enumerate(names):
        draw.text((margin - gap, gap + row * (height + gap) + height // 2), name, "black", font, anchor="rm")
    return grid


def sample_grid(pipeline, seed: int, rows: int = 10, columns: int = 8) -> Image.Image:
    """Samples of a pipeline, a row a label; every picture has a seed of its own, so grids of two runs compare."""
    names = [pipeline.id2label[index] for index in sorted(pipeline.id2label)[:rows]]
    count = columns * (len(names) or rows)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        labels=[index for index in range(len(names)) for _ in range(columns)] if names else None,
        num_images_per_prompt=1 if names else count,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(count)],
    ).images
    return image_grid(images, columns, names)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def loss_curve(metrics: Path, output: Path, smoothing: int = 50):
    """Draw every loss of a metrics.jsonl against the step, with its mean over `smoothing` steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lines = read_metrics(metrics)
    names = sorted({key for line in lines for key in line if key.endswith("loss")})
    if not names:
        return
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name in names:
        steps, values = np.array([(line["step"], line[name]) for line in lines if name in line]).T
        (faint,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
        window = min(smoothing, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=faint.get_color(), label=f"{name} (mean of {window} steps)")
    if all(line[name] > 0 for line in lines for name in names if name in line):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)
