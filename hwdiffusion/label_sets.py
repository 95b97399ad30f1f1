"""Which labels the samples of an evaluation are asked for: sets of ids `(S, T)`, padded with -1.

Sample i is drawn of set i mod S. A model of single labels draws every label in turn; one of sets draws the sets of
held-out pictures, so that samples compare with these, or those of a file.
"""

import json
from pathlib import Path

import torch

from hwdiffusion import InputError
from hwdiffusion.data import ImageDataset
from hwdiffusion.pipelines import label_ids


def labels_in_turn(sets: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """The ids `(stop - start, T)` of samples `start` to `stop`; `None` without labels."""
    return None if sets is None else sets[torch.arange(start, stop) % len(sets)]


def every_label(pipe) -> torch.Tensor | None:
    """The sets `(K, 1)` of a single label; `None` for a pipeline without labels."""
    return torch.arange(len(pipe.id2label))[:, None] if pipe.id2label else None


def sets_to_draw(pipe, held_out: ImageDataset) -> torch.Tensor | None:
    """Every label for a model of single ones, for one of sets those of the held-out pictures, mixed; `None` without.

    A held-out picture without labels, or with some that the model doesn't know, is left out.
    """
    if pipe.config.max_labels == 1 or not pipe.id2label:
        return every_label(pipe)
    known = {name: index for index, name in pipe.id2label.items()}
    ids = torch.tensor([known.get(name, -2) for name in held_out.class_names] + [-1])  # the last one pads
    sets = ids[held_out.labels] if held_out.class_names else held_out.labels[:0]
    sets = sets[(sets >= 0).any(dim=1) & (sets > -2).all(dim=1)] if sets.ndim == 2 else sets
    if not len(sets) or sets.shape[1] > pipe.config.max_labels:
        return every_label(pipe)
    return sets[torch.randperm(len(sets), generator=torch.Generator().manual_seed(0))]


def read_label_sets(path: str, pipe) -> torch.Tensor:
    """The sets `(S, T)` of a JSON file that lists them, each a list of names or one name, as i-CLEVR's `test.json`.

    Raises:
        InputError: it can't be read, or a set is none, is empty, or holds what the model doesn't know.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--label_sets {path} can't be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if not pipe.id2label:
        raise InputError(f"--label_sets {path} needs a pipeline with labels, which this one isn't")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--label_sets {path} must hold a list of sets, each a list of names")
    sets = [[entry] if isinstance(entry, str) else entry for entry in entries]
    for place, names in enumerate(sets):
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            said = json.dumps(names, ensure_ascii=False)[:80]
            raise InputError(f"set {place} of --label_sets {path} must be a list of at least one name, not {said}")
    try:
        return label_ids(sets, pipe.id2label, pipe.config.max_labels)
    except ValueError as error:  # it says which: labels[3] …
        raise InputError(f"--label_sets {path}: {error}") from error


def names_of(ids: torch.Tensor, class_names: list[str]) -> list[str]:
    """The names in one set `(T,)`."""
    return [class_names[index] for index in ids.tolist() if index >= 0]
