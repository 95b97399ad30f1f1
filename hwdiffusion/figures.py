"""Pictures of results: labelled grids of samples, their ways from noise, loss curves."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from hwdiffusion.label_sets import every_label, names_of


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures `(B, C, H, W)` in [-1, 1] as PIL images of mode L or RGB."""
    return VaeImageProcessor().postprocess(images.detach().float().cpu(), output_type="pil")


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    cell: int = 64,
    gap: int = 4,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """Pictures in rows on a white ground, each scaled to about `cell` pixels, with the names of rows at the left,
    those of columns above, and the lines of a caption under each."""
    scale = max(1, round(cell / max(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(12, height // 4))
    names = [str(name) for name in row_names or []]
    margin = max((round(font.getlength(name)) for name in names), default=0) + 2 * gap if names else gap
    top = gap + (round(font.size * 1.4) if column_names else 0)
    below = ImageFont.load_default(size=max(9, width // 9))
    line = round(below.size * 1.25)
    pitch = height + gap + (line * max(map(len, captions)) + gap if captions else 0)  # from row to row
    grid = Image.new("RGB", (margin + columns * (width + gap), top + rows * pitch), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        place = margin + index % columns * (width + gap), top + index // columns * pitch
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), place)
        for number, text in enumerate(captions[index] if captions else []):
            at = place[0] + width // 2, place[1] + height + number * line + gap // 2
            draw.text(at, text, "black", below, anchor="mt")
    for row, name in enumerate(names):
        draw.text((margin - gap, top + row * pitch + height // 2), name, "black", font, anchor="rm")
    for column, name in enumerate(column_names or []):
        place = margin + column * (width + gap) + width // 2, top // 2
        draw.text(place, str(name), "black", font, anchor="mm")
    return grid


def beside_each_other(pictures: Sequence[Image.Image], titles: Sequence[str], gap: int = 12) -> Image.Image:
    """Pictures in a row on a white ground, at the bottom, each with its title above its right end."""
    font = ImageFont.load_default(size=14)
    widths = [max(picture.width, round(font.getlength(title)) + gap) for picture, title in zip(pictures, titles)]
    top = 2 * font.size
    height = max(picture.height for picture in pictures)
    row = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), top + height), "white")
    draw = ImageDraw.Draw(row)
    right = -gap
    for picture, title, width in zip(pictures, titles, widths):
        right += gap + width
        row.paste(picture, (right - picture.width, top + height - picture.height))
        draw.text((right - gap // 3, top // 2), title, "black", font, anchor="rm")
    return row


def sample_grid(
    pipeline, seed: int, sets: torch.Tensor | None = None, rows: int = 10, columns: int = 8
) -> Image.Image:
    """Samples of a pipeline, a row a label; every picture has a seed of its own, so grids of two runs compare.

    All processes must call it; each draws its share, and all have the picture.

    Args:
        sets: of labels, `(S, T)`, padded with -1, the first of which are drawn; by default every label.
    """
    sets = every_label(pipeline) if sets is None else sets
    names = [] if sets is None else [", ".join(names_of(ids, pipeline.id2label)) for ids in sets[:rows]]
    count = columns * (len(names) or rows)
    pipeline.set_progress_bar_config(disable=True)
    processes = PartialState()
    mine = range(count)[processes.process_index :: processes.num_processes]
    drawn = []
    if mine:  # of few pictures some of many processes have none
        drawn = pipeline(
            labels=sets[[place // columns for place in mine]] if names else None,
            num_images_per_prompt=1 if names else len(mine),
            generator=[torch.Generator().manual_seed(seed + place) for place in mine],
        ).images
    pairs = list(zip(mine, drawn))
    if processes.num_processes > 1:
        pairs = sorted(gather_object(pairs), key=lambda pair: pair[0])
    return image_grid([image for _, image in pairs], columns, names)


def denoising(
    pipeline,
    moments: int | None = 8,
    predicted: bool = False,
    callback_on_step_end: Callable | None = None,
    **call,
) -> list[tuple[int, list[Image.Image]]]:
    """A pipeline's samples on their way from noise to pictures, decoded from latents where there are latents.

    Args:
        pipeline: a `ClassConditionalPipeline`.
        moments: how many, evenly from the first step to the last; `None` takes every step.
        predicted: the clean pictures as they are predicted at those moments, rather than the noisy ones.
        callback_on_step_end: is called after each step as a pipeline does it, without tensors.
        call: arguments of its call.

    Returns:
        For each moment, how many steps are done, and the pictures after them.
    """
    seen = []
    tensor = "pred_original_sample" if predicted else "latents"

    def remember(pipe, step, timestep, tensors):
        seen.append(tensors[tensor].detach())
        return callback_on_step_end(pipe, step, timestep, {}) if callback_on_step_end is not None else {}

    pipeline(
        **call,
        output_type="latent",
        callback_on_step_end=remember,
        callback_on_step_end_tensor_inputs=[tensor],
    )
    with torch.no_grad():
        return [
            (step, to_pil(pipeline.decode_latents(latents)))
            for step, latents in evenly(list(enumerate(seen, 1)), moments)
        ]


def trajectory_strip(moments: list[tuple[int, list[Image.Image]]], names: Sequence[str] | None = None) -> Image.Image:
    """What [`denoising`] gives as one picture: a row a sample, with its name, a column a moment."""
    images = [pictures[row] for row in range(len(moments[0][1])) for _, pictures in moments]
    columns = [f"step {step}" if step == 1 else str(step) for step, _ in moments]
    return image_grid(images, len(moments), names, columns)


def trajectory_frames(moments: list[tuple[int, list[Image.Image]]]) -> list[Image.Image]:
    """What [`denoising`] gives as frames of an animation: at each moment all samples, about as wide as high."""
    side = max(1, round(len(moments[0][1]) ** 0.5))
    return [image_grid(pictures, side) for _, pictures in moments]


def evenly(items: Sequence, count: int | None) -> list:
    """`count` of the items, or all, from the first to the last at equal distances."""
    count = len(items) if count is None else min(count, len(items))
    return [items[round(place * (len(items) - 1) / max(count - 1, 1))] for place in range(count)]


def write_animation(path: Path, frames: Sequence[Image.Image], seconds: float = 3.0, hold: float = 1.5):
    """Write frames as an animated GIF or WebP, by the suffix, as [`animated`] makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(animated(frames, path.suffix[1:], seconds, hold))


def animated(frames: Sequence[Image.Image], kind: str, seconds: float = 3.0, hold: float = 1.5) -> bytes:
    """The bytes of an animation that runs over and over and holds on its last frame.

    Args:
        kind: `"gif"` or `"webp"`.
        seconds: how long the frames take together.
        hold: how long the last one stays.
    """
    durations = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    durations[-1] = round(1000 * hold)
    lossless = {"lossless": True} if kind == "webp" else {}
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, **lossless)
    return file.getvalue()


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


def confusion_plot(attributes: list[dict], output: Path):
    """What was seen in place of what was asked for, a panel an attribute (`metrics.attribute_confusions`), as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    sizes = [len(of["values"]) for of in attributes]
    figure, all_axes = plt.subplots(
        1,
        len(attributes),
        figsize=(1.6 * len(sizes) + 0.55 * sum(sizes), 1.4 + 0.55 * max(sizes)),
        width_ratios=sizes,
        constrained_layout=True,
    )
    for axes, of in zip(np.atleast_1d(all_axes), attributes):
        counts = np.array(of["confusion"])
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(of["values"])), of["values"], rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(of["values"])), of["values"])
        axes.set_xlabel("seen")
        axes.set_ylabel("asked for")
        axes.set_title(f"{100 * of['accuracy']:.1f} % right", fontsize=9)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def sweep_plots(rows: list[dict], output: Path):
    """Label accuracy against Fréchet distance, and against images a second: a line for each scheduler and number of
    steps, a point for each guidance. Written as `output`.png and .svg, readable in black and white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    axes_of = {
        "Fréchet distance": lambda row: row["distances"]["frechet_distance"] if "distances" in row else None,
        "images a second": lambda row: row["images_per_second"],
    }
    labelled = "labels" in rows[0]
    lines: dict[str, list[dict]] = {}
    for row in rows:
        name = "{scheduler}, {num_inference_steps} steps".format(**row["sampling"]).replace("Scheduler", "")
        lines.setdefault(name, []).append(row)
    panels = [name for name, value in axes_of.items() if value(rows[0]) is not None]
    if not labelled:
        panels = ["images a second"] if len(panels) > 1 else []  # the distance is what is plotted against it
    if not panels:
        return
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True)
    for axes, panel in zip([all_axes] if len(panels) == 1 else all_axes, panels):
        for index, (name, points) in enumerate(lines.items()):
            x = [axes_of[panel](row) for row in points]
            y = [row["labels"]["accuracy"] if labelled else axes_of["Fréchet distance"](row) for row in points]
            style = {"marker": "osD^vP*X"[index % 8], "linestyle": ("-", "--", ":", "-.")[index % 4]}
            axes.plot(x, y, markersize=5, linewidth=1, label=name, **style)
            for a, b, row in zip(x, y, points):
                note = f"{row['sampling']['guidance_scale']:g}"
                axes.annotate(note, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel(panel)
        axes.set_ylabel("label accuracy" if labelled else "Fréchet distance")
        axes.grid(alpha=0.3)
        if panel == "images a second":
            axes.set_xscale("log")
            for axis_ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis_ticks(matplotlib.ticker.FormatStrFormatter("%g"))
    (all_axes if len(panels) == 1 else all_axes[0]).legend(fontsize=7, title="numbers: guidance", title_fontsize=7)
    for suffix in (".png", ".svg"):
        figure.savefig(output.with_suffix(suffix), dpi=130)
    plt.close(figure)
