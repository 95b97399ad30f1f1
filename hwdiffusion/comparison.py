"""Features of two sides, generated and real, and every figure that comes of comparing them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from hwdiffusion import figures
from hwdiffusion.data import ImageDataset
from hwdiffusion.extractors import as_channels
from hwdiffusion.metrics import (
    MANIFOLD_PICTURES,
    FeatureStatistics,
    attribute_confusions,
    frechet_distance,
    interval_over_repetitions,
    kernel_distance,
    label_scores,
    labels_found,
    manifold_scores,
    memorisation,
    nearest_neighbours,
)
from hwdiffusion.samples import CHUNK, Samples


PIXELS = 32  # the largest side at which pictures are compared as they are


@dataclass
class Features:
    """What is kept of pictures: features `(N, D)`, pixels `(N, P)`, probabilities `(N, K)` and labels `(N, T)`."""

    features: torch.Tensor
    pixels: torch.Tensor
    probabilities: torch.Tensor | None
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, places) -> "Features":
        return Features(*(None if part is None else part[places] for part in vars(self).values()))

    @property
    def statistics(self) -> FeatureStatistics:
        gathered = FeatureStatistics(self.features.shape[1])
        for batch in self.features.split(1000):
            gathered.update(batch)
        return gathered


@dataclass
class Pictures:
    """Pictures in memory, as a data set: uint8 `(N, C, H, W)` and ids `(N, T)` or `None`."""

    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, places) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.as_tensor(places)
        none = torch.zeros(len(places), 0, dtype=torch.long)
        return self.images[places], none if self.labels is None else self.labels[places]


def batches_of(pictures) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """uint8 `(B, C, H, W)` and ids `(B, T)`, padded with -1, of samples or of a data set."""
    if isinstance(pictures, Samples):
        yield from pictures.batches()
        return
    for start in range(0, len(pictures), CHUNK):
        images, labels = pictures[range(start, min(start + CHUNK, len(pictures)))]
        yield images, labels if labels.shape[1] else None


def extract(extractor, pictures, what: str) -> Features:
    """Features of all pictures; no more than a batch of pictures is in memory at a time."""
    parts, names = [], extractor.class_names
    known = names is not None and set(pictures.class_names) <= set(names)
    ids = places_among(names, pictures.class_names) if known else None
    for images, labels in tqdm(batches_of(pictures), total=-(-len(pictures) // CHUNK), desc=what, leave=False):
        features, probabilities = extractor(images)
        # by the ids of the classifier, which may know more classes
        parts.append(
            (features, small_pixels(images), probabilities, ids[labels] if labels is not None and known else None)
        )
    features = Features(*(None if part[0] is None else torch.cat(part) for part in zip(*parts)))
    if features.labels is not None and not (features.labels >= 0).any():
        features.labels = None
    return features


def places_among(names: list[str], class_names: list[str]) -> torch.Tensor:
    """The ids, among `names`, of `class_names` and of the padding, -1, which comes last."""
    return torch.tensor([*map(names.index, class_names), -1])


def small_pixels(images: torch.Tensor) -> torch.Tensor:
    """Pictures as rows, in [0, 1], of at most `PIXELS` a side: `(B, P)`."""
    images = images.float() / 255
    if max(images.shape[-2:]) > PIXELS:
        images = F.interpolate(images, size=[min(side, PIXELS) for side in images.shape[-2:]], mode="area")
    return images.flatten(1)


def measure(
    ours: Features,
    held_out: Features,
    training: Features | None,
    wanted: set[str],
    class_names: list[str] | None,
    seed: int,
) -> dict:
    """All measures of generated pictures against held-out real ones, and the floor: the same of real pictures.

    The floor is of as many training pictures as there are generated ones, or as there are; where the training pictures
    aren't known, of one half of the held-out ones against the other.
    """
    generator = torch.Generator().manual_seed(seed)  # folders come sorted by class
    held_out = held_out[torch.randperm(len(held_out), generator=generator)]
    ours = ours[torch.randperm(len(ours), generator=generator)]
    if wanted <= {"labels"}:
        real, against = held_out, held_out  # whose labels are all the floor there is
    elif training is not None:
        real, against = training[torch.randperm(len(training), generator=generator)[: len(ours)]], held_out
    else:
        half = len(held_out) // 2
        real, against = held_out[:half], held_out[half:]
    of = "held-out" if wanted <= {"labels"} else "training" if training is not None else "one half"
    report: dict = {"floor": {"n": len(real), "of": of}}
    if "labels" in wanted:
        report["labels"] = named_label_scores(ours, class_names)
        if held_out.labels is not None:
            report["floor"]["labels"] = named_label_scores(held_out, class_names)
    least = {"distances": ours.features.shape[1] + 1, "manifold": MANIFOLD_PICTURES}
    for name, function in (("distances", distances), ("manifold", manifold)):
        if name in wanted and min(len(ours), len(held_out)) >= least[name]:
            report[name] = function(held_out, ours)
            if min(len(real), len(against)) >= least[name]:  # else there is no floor to tell
                report["floor"][name] = function(against, real)
    if "manifold" in wanted and "manifold" not in report:
        report["left_out"] = f"precision, recall, density and coverage, which need {MANIFOLD_PICTURES} pictures a side"
    if "memorisation" in wanted and training is not None:
        report["memorisation"] = {
            space: memorisation(*(getattr(side, space) for side in (ours, held_out, training)))
            for space in ("features", "pixels")
        }
    return report


def named_label_scores(of: Features, class_names: list[str]) -> dict:
    """[`label_scores`] of pictures with labels, with the names of classes, and what is taken for what."""
    scores = label_scores(of.probabilities, of.labels)
    scores["per_class"] = dict(zip(class_names, scores["per_class"]))
    attributes = attribute_confusions(of.probabilities, of.labels, class_names)
    return {**scores, **({"attributes": attributes} if attributes else {})}


def accuracy_of_repetitions(of: Features, repetitions: int) -> dict:
    """Label accuracy of samples of the same sets, drawn several times by other seeds, with an interval over these; for
    each size of a set, too."""
    known, found = of.labels >= 0, labels_found(of.probabilities, of.labels)  # (N, T)
    found, known = (side.view(repetitions, -1, side.shape[1]).double() for side in (found, known))  # (R, S, T)
    sizes = known[0].sum(dim=1)  # (S,)

    def over(chosen) -> dict:
        shares = found[:, chosen].sum(dim=(1, 2)) / known[:, chosen].sum(dim=(1, 2))
        scores = interval_over_repetitions(shares)
        return {**scores, "mean_95": [min(max(end, 0.0), 1.0) for end in scores["mean_95"]]}  # they are shares

    by_size = {int(size): over(sizes == size) for size in sizes.unique()}
    return {**over(sizes > 0), "by_size": by_size}


def distances(real: Features, ours: Features) -> dict:
    """Fréchet distance, and kernel distance with its standard deviation over subsets."""
    mean, deviation = kernel_distance(real.features, ours.features)
    return {
        "frechet_distance": frechet_distance(real.statistics, ours.statistics),
        "kernel_distance": mean,
        "kernel_distance_sd": deviation,
    }


def manifold(real: Features, ours: Features) -> dict:
    """Precision, recall, density and coverage of equal numbers of both sides, `n`."""
    count = min(len(real), len(ours))  # with equal numbers the figures compare
    return {"n": count, **manifold_scores(real.features[:count], ours.features[:count])}


def nearest_pairs(ours: Features, training: Features, generated, data: ImageDataset, pairs: int = 16) -> Image.Image:
    """The samples that are nearest to a training picture, each beside it."""
    nearest, which = nearest_neighbours(ours.features, training.features)
    closest = nearest.argsort()[:pairs]
    samples = generated.images(closest) if isinstance(generated, Samples) else generated[closest][0]
    real = data[which[closest]][0]
    channels = max(samples.shape[1], real.shape[1])
    both = torch.stack([as_channels(side.float(), channels) for side in (samples, real)], dim=1).flatten(0, 1)
    return figures.image_grid(figures.to_pil(both / 127.5 - 1), columns=8)
