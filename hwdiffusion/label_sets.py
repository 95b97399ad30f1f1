"""Which labels the samples of an evaluation are asked for: sets of ids `(S, T)`, padded with -1.

Sample i is drawn of set i mod S. A model of single labels draws every label in turn, or the labels of held-out
pictures; one of sets draws the sets of held-out pictures, so that samples compare with these, or those of a file.
"""

import json
from pathlib import Path

import torch

from hwdiffusion import InputError
from hwdiffusion.data import ImageDataset
from hwdiffusion.pipelines import label_ids
from hwdiffusion.sources import read_json


def labels_in_turn(sets: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """The ids `(stop - start, T)` of samples `start` to `stop`; `None` without labels."""
    return None if sets is None else sets[torch.arange(start, stop) % len(sets)]


def every_label(pipe) -> torch.Tensor | None:
    """The sets `(K, 1)` of a single label; `None` for a pipeline without labels."""
    return torch.arange(len(pipe.id2label))[:, None] if pipe.id2label else None


def sets_to_draw(pipe, held_out: ImageDataset, frequencies: str = "equal") -> torch.Tensor | None:
    """Every label for a model of single ones, for one of sets those of the held-out pictures, mixed; `None` without.

    With `frequencies="held_out"` a model of single labels, too, draws those of the held-out pictures. A held-out
    picture is left out that has no labels, more than the model takes, or some that it doesn't know. If that leaves
    none, every label is drawn.
    """
    if not pipe.id2label or (pipe.config.max_labels == 1 and frequencies == "equal"):
        return every_label(pipe)
    known = {name: index for index, name in pipe.id2label.items()}
    ids = torch.tensor([known.get(name, -2) for name in held_out.class_names] + [-1])  # the last one pads
    sets = ids[held_out.labels]  # (N, T)
    sizes = (sets >= 0).sum(dim=1)
    sets = sets[(sizes >= 1) & (sizes <= pipe.config.max_labels) & (sets > -2).all(dim=1)]
    if not len(sets):
        print("no held-out picture has a set of labels that the model can draw; every label is drawn by itself")
        return every_label(pipe)
    sets = sets.sort(dim=1, descending=True).values[:, : pipe.config.max_labels]  # the padding comes last
    return sets[torch.randperm(len(sets), generator=torch.Generator().manual_seed(0))]


def number_of_samples(args, sets: torch.Tensor | None) -> int:
    """How many samples an evaluation draws: of the sets of a file each by every seed."""
    return args.num_samples if args.label_sets is None else args.num_seeds * len(sets)


def read_listed_sets(path: str) -> list:
    """What such a file holds, as yet of any names."""
    return read_json(Path(path), [["red cube", "cyan sphere"], ["gray cube"]], called=f"--label_sets {path}")


def read_label_sets(path: str, pipe) -> torch.Tensor:
    """The sets `(S, T)` of a JSON file that lists them, each a list of names or one name, as i-CLEVR's `test.json`.

    Raises:
        InputError: it can't be read, or a set is none, is empty, or holds what the model doesn't know.
    """
    entries = read_listed_sets(path)
    if not pipe.id2label:
        raise InputError(f"--label_sets {path} needs a pipeline with labels, which this one isn't")
    if not entries:
        raise InputError(f"--label_sets {path} must list at least one set of names")
    sets = []
    for place, entry in enumerate(entries):
        names = [entry] if isinstance(entry, str) else entry
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            said = json.dumps(names, ensure_ascii=False)[:80]
            raise InputError(f"set {place} of --label_sets {path} must be a list of at least one name, not {said}")
        try:
            sets.append(label_ids([names], pipe.id2label, pipe.config.max_labels))
        except ValueError as error:
            said = str(error).replace("labels[0]", "it")
            raise InputError(f"set {place} of --label_sets {path}: {said}") from error
    return torch.cat(sets)


def names_of(ids: torch.Tensor, class_names: list[str] | dict[int, str]) -> list[str]:
    """The names in one set `(T,)`, by a list or table of all."""
    return [class_names[index] for index in ids.tolist() if index >= 0]
