"""Samples of a pipeline for an evaluation: drawn by all processes, kept chunk by chunk, each with a seed of its own.

Sample i has the seed `seed` + i and the i-th set of labels, in turn, so an interrupted evaluation continues where it
stopped.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from hwdiffusion import InputError
from hwdiffusion.arguments import ALL_STEPS, CHUNK, DrawingArguments, EvaluationArguments
from hwdiffusion.checkpoints import replace_folder
from hwdiffusion.label_sets import every_label, labels_in_turn, names_of, number_of_samples
from hwdiffusion.pipelines import guidance_of, label_tokens
from hwdiffusion.report import how_drawn
from hwdiffusion.sources import METADATA_FILE


def draw(
    pipe,
    start: int,
    stop: int,
    seed: int,
    sets: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Samples `start` to `stop` of a pipeline, uint8 `(B, C, H, W)`, of the sets of labels `(S, T)` in turn, by
    default every label; the options are those of a call, such as `num_inference_steps`."""
    images = pipe(
        labels=labels_in_turn(every_label(pipe) if sets is None else sets, start, stop),
        num_images_per_prompt=1 if pipe.id2label else stop - start,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(start, stop)],
        output_type="pt",
        **options,
    ).images
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


def scheduler_digest(pipe) -> str | None:
    """Some digits that differ between settings of a scheduler; `None` for a pipeline without."""
    if scheduler_name(pipe) is None:
        return None
    settings = json.dumps({key: str(value) for key, value in pipe.scheduler.config.items()}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def sets_digest(sets: torch.Tensor) -> str:
    """Some digits that differ between sets of labels `(S, T)`, or orders of them."""
    return hashlib.sha256(f"{sets.tolist()}".encode()).hexdigest()[:16]


class Samples:
    """Samples of a pipeline, kept in files of `CHUNK` until the evaluation is done; those that are there stay.

    Args:
        sets: the sets of labels `(S, T)` that are drawn in turn; `None` without labels.
        digest: of the weights that the pipeline has been saved with. Default: of those that it has.
    """

    def __init__(
        self,
        output_dir: Path,
        pipe,
        args: EvaluationArguments,
        sets: torch.Tensor | None,
        digest: str | None = None,
    ):
        self.sets, self.options = sets, sampling_options(pipe, args)
        self.settings = {
            "scheduler": scheduler_name(pipe),
            **self.options,
            "seed": args.seed,
            "weights_sha256": digest or weights_digest(pipe),
        }
        if getattr(pipe, "guidance_unet", None) is not None and self.options["guidance_scale"] != 1:
            self.settings["autoguidance"] = True
        if args.guide is not None:
            self.settings["guide"] = {"model": Path(args.guide).name, "weights_sha256": digest_of([pipe.classifier])}
        if pipe.dtype != torch.float32:
            self.settings["torch_dtype"] = str(pipe.dtype).removeprefix("torch.")
        self.repetitions = None if args.label_sets is None else args.num_seeds
        if sets is not None and (self.repetitions is not None or sets.shape[1] > 1):
            self.settings["label_sets"] = {
                "file": None if args.label_sets is None else Path(args.label_sets).name,
                "sets": len(sets),
                "seeds": self.repetitions,
                "sha256": sets_digest(sets),
            }
        elif sets is not None and args.label_frequencies != "equal":
            drawn = labels_in_turn(sets, 0, number_of_samples(args, sets)).flatten()
            frequencies = drawn.bincount(minlength=len(pipe.id2label)).tolist()
            self.settings["label_frequencies"] = dict(zip(pipe.id2label.values(), frequencies))
        if self.settings["scheduler"] is not None:
            self.settings["scheduler_sha256"] = scheduler_digest(pipe)
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.folder = output_dir / f"samples-{key[:12]}"
        self.count = number_of_samples(args, sets)
        self.batch_size, self.seed = args.batch_size, args.seed
        self.class_names = list(pipe.id2label.values())
        starts = range(0, self.count, CHUNK)
        self.chunks = [(start, min(start + CHUNK, self.count)) for start in starts]

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        """How they are drawn, in a few words."""
        return how_drawn(self.settings)

    def draw(self, pipe, processes: PartialState):
        """Draw what is not there yet; the processes share the work."""
        if processes.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob("*.part"):
                unfinished.unlink()
        processes.wait_for_everyone()
        missing = [chunk for chunk in self.chunks if not self._path(*chunk).is_file()]
        processes.wait_for_everyone()  # all have looked before one of them writes
        mine = missing[processes.process_index :: processes.num_processes]
        bar = tqdm(
            total=self.count,
            initial=self.count - sum(stop - start for start, stop in missing),
            unit="img",
            desc="sampling",
            disable=not processes.is_main_process,
        )
        for start, stop in mine:
            began = time.perf_counter()
            images = [
                draw(pipe, first, min(first + self.batch_size, stop), self.seed, self.sets, **self.options)
                for first in range(start, stop, self.batch_size)
            ]
            part = self._path(start, stop).with_suffix(".part")
            with open(part, "wb") as file:
                seconds = time.perf_counter() - began
                np.savez(file, images=torch.cat(images).numpy(), seconds=seconds)
            os.replace(part, self._path(start, stop))
            bar.update((stop - start) * processes.num_processes)
        bar.close()

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:07d}-{stop:07d}.npz"

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """uint8 `(B, C, H, W)` and ids `(B, T)`, in the order of their seeds."""
        for start, stop in self.chunks:
            with np.load(self._path(start, stop), allow_pickle=False) as file:
                yield torch.from_numpy(file["images"]), labels_in_turn(self.sets, start, stop)

    def images_per_second(self) -> float:
        """Of one process, as it was when they were drawn."""
        seconds = 0.0
        for chunk in self.chunks:
            with np.load(self._path(*chunk), allow_pickle=False) as file:
                seconds += float(file["seconds"])
        return self.count / seconds

    def images(self, places: torch.Tensor) -> torch.Tensor:
        """Some of them, uint8 `(B, C, H, W)`."""
        chosen = []
        for place in places.tolist():
            start, stop = self.chunks[place // CHUNK]
            with np.load(self._path(start, stop), allow_pickle=False) as file:
                chosen.append(torch.from_numpy(file["images"][place - start]))
        return torch.stack(chosen)

    def keep(self, how: str, output_dir: Path):
        """Turn the chunks into PNGs in `samples/`, in class folders or with a `metadata.jsonl` of their sets, or into
        one `samples.npz`, or delete them."""
        if how == "npz":
            save_npz(output_dir / "samples.npz", self.batches(), self.class_names)
        elif how == "png":
            part, of_sets = output_dir / "samples.part", self.sets is not None and self.sets.shape[1] > 1
            save_pngs(part, self.batches(), self.class_names, of_sets)
            replace_folder(part, output_dir / "samples")
        shutil.rmtree(self.folder)


def networks(pipe) -> list[torch.nn.Module]:
    """What of a pipeline has weights."""
    names = ("unet", "vqvae", "classifier", "guidance_unet", "generator")
    return [getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None]


def scheduler_name(pipe) -> str | None:
    """Of the class of its scheduler; `None` for a GAN, which has none."""
    return type(pipe.scheduler).__name__ if hasattr(pipe, "scheduler") else None


def weights_digest(pipe) -> str:
    """The first digits of the SHA-256 of a pipeline's weights."""
    return digest_of(networks(pipe))


def digest_of(models: Iterable[torch.nn.Module]) -> str:
    """The first digits of the SHA-256 of the weights of some models."""
    digest = hashlib.sha256()
    for component in models:
        for _, tensor in sorted(component.state_dict().items()):
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def as_picture(image: torch.Tensor) -> Image.Image:
    """A uint8 picture `(C, H, W)` as PIL has it."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def save_pngs(folder: Path, batches: Iterable, class_names: list[str], of_sets: bool):
    """Pictures as PNGs in a new folder: in class folders, or, where they have sets, with a `metadata.jsonl`.

    Args:
        batches: of uint8 `(B, C, H, W)` and ids `(B, T)`, padded with -1, or `None`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    index, lines = 0, []
    for images, labels in batches:
        for image, ids in zip(images, labels if labels is not None else [None] * len(images)):
            names = [] if ids is None else names_of(ids, class_names)
            if of_sets:
                lines.append(json.dumps({"file_name": f"{index:06d}.png", "labels": names}, ensure_ascii=False))
            # a name that is no folder's, "a/b" or "..", is written as in an address
            name = "" if of_sets or not names else quote(names[0], safe=" ")
            place = folder / name.replace("..", "%2E%2E")
            place.mkdir(parents=True, exist_ok=True)
            as_picture(image).save(place / f"{index:06d}.png")
            index += 1
    if of_sets:
        (folder / METADATA_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_npz(path: Path, batches: Iterable, class_names: list[str], count: int | None = None):
    """Pictures as an .npz that `--images`, `--reference` and `--train_data_dir` take.

    Args:
        batches: of uint8 `(B, C, H, W)` and ids `(B, T)`, padded with -1, or `None`.
        count: only the first of them.
    """
    images, labels = zip(*batches)
    arrays = {"images": torch.cat(images)[:count].permute(0, 2, 3, 1).numpy()}
    if labels[0] is not None:
        ids = torch.cat(labels)[:count]
        # of sets, which differ in size, rows of zeros and ones
        single = ids.shape[1] == 1 and bool((ids >= 0).all())
        kept = ids[:, 0] if single else label_tokens(ids, len(class_names)).sum(dim=1).to(torch.uint8)
        arrays |= {"labels": kept.numpy(), "class_names": np.array(class_names)}
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(part, path)


def sampling_options(pipe, args: EvaluationArguments | DrawingArguments) -> dict:
    """The options of a call that the arguments ask for: the number of steps and the guidance are the pipeline's own
    if they aren't given, and 1 of a GAN, and where only some of the steps are guided, which.

    Raises:
        InputError: some of the steps of a GAN, the truncation of what is none.
    """
    truncation = getattr(args, "truncation", None)
    if truncation is not None and scheduler_name(pipe) is not None:
        raise InputError("--truncation is for GANs; of a diffusion model --guidance_scale makes pictures more typical")
    if args.guidance_interval is not None and scheduler_name(pipe) is None:
        raise InputError("--guidance_interval is for diffusion models; a GAN draws in one pass")
    steps = args.num_inference_steps
    guidance, interval = guidance_of(pipe.config, args.guidance_scale, args.guidance_interval)
    options = {
        "num_inference_steps": pipe.config.get("default_num_inference_steps", 1) if steps is None else steps,
        "guidance_scale": guidance,
    }
    if list(interval) != ALL_STEPS:
        options["guidance_interval"] = list(interval)
    if getattr(args, "classifier_guidance_scale", None) is not None:
        options["classifier_guidance_scale"] = args.classifier_guidance_scale
    if truncation is not None:
        options["truncation"] = truncation
    return options


def image_mode_of(pipe) -> str:
    """`L` or `RGB`, by the channels of a pipeline's pictures."""
    return "L" if pipe.image_channels == 1 else "RGB"
