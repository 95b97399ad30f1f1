"""The commands that draw pictures of what a trained pipeline does: trajectories, variations, inpainting, ways between.

Every picture has a seed of its own, so the same command draws the same pictures.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from hwdiffusion import InputError
from hwdiffusion.arguments import (
    ALL_STEPS,
    DrawingArguments,
    InpaintArguments,
    InterpolateArguments,
    SampleArguments,
    TrajectoryArguments,
    VaryArguments,
)
from hwdiffusion.checkpoints import replace_folder
from hwdiffusion.evaluation import choose_scheduler
from hwdiffusion.figures import (
    denoising,
    evenly,
    image_grid,
    trajectory_frames,
    trajectory_strip,
    write_animation,
)
from hwdiffusion.host import prepare_host
from hwdiffusion.label_sets import labels_in_turn
from hwdiffusion.models import PIPELINES, load_pipeline
from hwdiffusion.pipelines import label_ids
from hwdiffusion.samples import as_picture, draw, sampling_options, save_pngs


def draw_samples(args: SampleArguments):
    """Pictures of labels, each with a seed of its own: a folder of them, or one picture with a row a label."""
    output = Path(args.output)
    if not args.grid and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} is there already; name a new folder")
    pipe = _pipeline(args)
    labels, names = _labels(args, pipe)
    sets = label_ids(labels, pipe.id2label, pipe.config.max_labels) if labels else None  # (S, T)
    count = args.num * max(1, len(labels))
    options = sampling_options(pipe, args)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        bar = tqdm(total=count, unit="img", desc="sampling")
        for start in range(0, count, args.batch_size):
            stop = min(start + args.batch_size, count)
            yield _drawn(draw, pipe, start, stop, args.seed, sets, **options), labels_in_turn(sets, start, stop)
            bar.update(stop - start)
        bar.close()

    if args.grid:
        images = torch.cat([images for images, _ in batches()])
        in_rows = images if sets is None else images.unflatten(0, (args.num, len(sets))).transpose(0, 1).flatten(0, 1)
        columns = min(args.num, 10) if sets is None else args.num
        _write(args.output, image_grid([as_picture(image) for image in in_rows], columns, names))
        return
    part = output.with_name(output.name + ".part")
    save_pngs(part, batches(), list(pipe.id2label.values()), pipe.config.max_labels > 1)
    replace_folder(part, output)
    print(output)


def draw_trajectory(args: TrajectoryArguments):
    """Rows of samples on their way from noise, as a picture, and as an animation if one was asked for."""
    pipe = _pipeline(args)
    labels, names = _labels(args, pipe)
    if labels:
        labels, names = ([values[row % len(values)] for row in range(args.rows)] for values in (labels, names))
    options = {"labels": labels or None, "num_images_per_prompt": 1 if labels else args.rows}
    moments = args.columns if args.animation is None else None
    every = _drawn(denoising, pipe, moments, args.predicted, generator=seeds(args.seed, args.rows), **options)
    _write(args.output, trajectory_strip(evenly(every, args.columns), names))
    if args.animation is not None:
        write_animation(Path(args.animation), trajectory_frames(every))
        print(args.animation)


def draw_variations(args: VaryArguments):
    """A picture, noised to each strength and denoised by each label, a row a label."""
    pipe = _pipeline(args)
    labels, names = _labels(args, pipe)
    steps = pipe.config.default_num_inference_steps
    strengths = args.strength or [strength for strength in (0.2, 0.4, 0.6, 0.8, 1.0) if strength * steps >= 1]
    for strength in strengths:
        _drawn(pipe.check_inputs, num_inference_steps=steps, strength=strength)
    image = _image(args, pipe)
    rows = []
    for row in range(max(len(labels), 1)):
        rows.append(image)
        for strength in strengths:  # the same noise in all columns: what differs is how much of it there is
            options = {"labels": [labels[row]] if labels else None, "generator": seeds(args.seed, 1)}
            rows += _drawn(pipe, image=image, strength=strength, **options).images
    columns = ["given", *(f"{strength:g}" for strength in strengths)]
    _write(args.output, image_grid(rows, len(columns), names, columns))


def draw_inpainting(args: InpaintArguments):
    """A picture, what is kept of it, and the rest drawn anew by each label, a row a label."""
    pipe = _pipeline(args)
    labels, names = _labels(args, pipe)
    mask = _half(pipe.image_size[::-1], args.region)
    if args.mask is not None:
        mask, size = _open(args.mask, "--mask").convert("L"), pipe.image_size[::-1]
        size = size if args.image is None else _open(args.image, "--image").size
        if mask.size != size:
            sizes = ("x".join(map(str, one)) for one in (mask.size, size))
            raise InputError("--mask {} is {} and the picture {} large; make them alike".format(args.mask, *sizes))
        mask = mask.resize(pipe.image_size[::-1], Image.Resampling.NEAREST)
    image = _image(args, pipe)
    kept = Image.composite(
        Image.new(image.mode, image.size, "gray"), image, mask.point(lambda value: 255 * (value > 127))
    )
    rows = []
    for row in range(max(len(labels), 1)):
        options = {"num_images_per_prompt": args.columns, "generator": seeds(args.seed, args.columns)}
        options["labels"] = [labels[row]] if labels else None
        drawn = _drawn(pipe, image=image, mask_image=mask, **options).images
        rows += [image, kept, *drawn]
    columns = ["given", "kept", *([""] * args.columns)]
    _write(args.output, image_grid(rows, len(columns), names, columns))


def draw_interpolation(args: InterpolateArguments):
    """The ways between two seeds, two labels, and both, a row each."""
    pipe = _pipeline(args)
    labels, names = _labels(args, pipe)
    if len(labels) > 2:
        labels, names = labels[:2], names[:2]
        if args.labels is not None:
            raise InputError(f"--labels takes two to go between, not {len(args.labels)}")
    ends = {"seeds": (labels[:1] or None, seeds(args.seed, 2))}
    if len(labels) == 2:
        ends = {"labels": (labels, seeds(args.seed, 1)), **ends, "both": (labels, seeds(args.seed, 2))}
    rows = []
    for ends_of_labels, generator in ends.values():
        options = {"labels": ends_of_labels, "generator": generator, "num_images": args.columns}
        rows += _drawn(pipe.interpolate, **options).images
    _write(args.output, image_grid(rows, args.columns, list(ends)))


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def _pipeline(args: DrawingArguments):
    for flag in ("output", "animation"):
        if getattr(args, flag, None) is not None:
            _check_writable(getattr(args, flag), flag, folder=isinstance(args, SampleArguments) and not args.grid)
    kinds = PIPELINES if isinstance(args, SampleArguments) else PIPELINES[:1]  # the others draw in steps
    pipe = load_on(args.run, args.device, kinds, args.torch_dtype)
    choose_scheduler(pipe, args.scheduler)
    options = sampling_options(pipe, args)
    _drawn(pipe.check_inputs, **options)
    for name, value in {"guidance_interval": ALL_STEPS, **options}.items():
        if f"default_{name}" in pipe.config:
            pipe.register_to_config(**{f"default_{name}": value})
    return pipe


def load_on(run: str, device: str | None, kinds: tuple[type, ...] = PIPELINES, dtype: str = "float32"):
    """The pipeline of a run, on a device by its name; by default on a GPU if there is one.

    Raises:
        InputError: there is no such run, or no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        prepare_host(torch.device(device))
        return load_pipeline(run, torch.device(device), kinds, dtype)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not there: {' '.join(str(error).split())[:100]}") from error


def _drawn(call, *arguments, **options):
    """What a call returns; what it refuses is the command's bad input."""
    try:
        return call(*arguments, **options)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _labels(args: DrawingArguments, pipe) -> tuple[list, list[str]]:
    """The labels asked for, or all, as a call takes them, and what they are called; none without labels."""
    known = pipe.id2label
    if not known:
        if args.labels is not None:
            raise InputError(f"{args.run} knows no labels; leave --labels out")
        return [], []
    words = args.labels if args.labels is not None else list(known.values())
    labels: list = [_set_of_labels(word, known, pipe.config.max_labels) for word in words]
    _drawn(pipe.encode_labels, labels)
    return labels, [word if word.strip() else "no label" for word in words]


def _set_of_labels(word: str, known: dict[int, str], max_labels: int):
    """A label, or a set of them with commas; of an empty word the null label, which is the empty set."""
    if not word.strip() and word not in known.values():
        return None
    parts = word.split(",") if max_labels > 1 and word not in known.values() else [word]
    labels = [part.strip() for part in parts]
    if "" in labels and word not in known.values():
        raise InputError(f"the labels {word!r} lack a name beside a comma; the empty set is ''")
    labels = [int(part) if part not in known.values() and part.isdecimal() else part for part in labels]
    return labels if max_labels > 1 else labels[0]


def seeds(seed: int, count: int) -> list[torch.Generator]:
    """A generator for each of `count` pictures, by a seed and those after it."""
    return [torch.Generator().manual_seed(seed + place) for place in range(count)]


def _image(args: VaryArguments | InpaintArguments, pipe) -> Image.Image:
    """The picture to start from: the given one, at the pipeline's size, or one that the pipeline draws."""
    if args.image is None:
        word = args.source_label if args.source_label is not None else next(iter(pipe.id2label.values()), None)
        if word is not None and not pipe.id2label:
            raise InputError(f"{args.run} knows no labels; leave --source_label out")
        label = None if word is None else [_set_of_labels(word, pipe.id2label, pipe.config.max_labels)]
        return _drawn(pipe, labels=label, generator=seeds(args.seed + 1000, 1)).images[0]
    image = _open(args.image, "--image")
    tensor = _drawn(pipe.preprocess_image, image)
    return pipe.image_processor.postprocess(tensor, output_type="pil")[0]


def _open(path: str, flag: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{flag} {path} is not there") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise InputError(f"{flag} {path} can't be read as a picture ({type(error).__name__})") from error


def _half(size: Sequence[int], region: str) -> Image.Image:
    """A mask that is white in one part of a picture of width and height `size`."""
    width, height = size
    box = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
        "center": (width // 4, height // 4, width - width // 4, height - height // 4),
    }[region.replace("centre", "center")]
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


def _check_writable(path: str, flag: str, folder: bool):
    parent = next(parent for parent in Path(path).resolve().parents if parent.exists())
    refused = InputError(f"--{flag} {path} can't be written there; name one in a folder of yours")
    if Path(path).is_dir() and not folder:
        raise refused
    try:
        with tempfile.TemporaryFile(dir=parent):  # rights alone don't tell: not of /proc, not of a full disk
            pass
    except OSError as error:
        raise refused from error


def _write(path: str, picture: Image.Image):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(path)
