"""The embedded pictures with sets of labels: one to three shaded cubes, spheres and cylinders in eight colours.

They stand in for i-CLEVR (El-Nouby et al. 2019), whose 24 names and label statistics they have: 6,003 scenes, each
seen with its first object, its first two and all three, no object twice. A scene is rendered by casting rays: a ground
plane in perspective, light, shadow, occlusion; sizes, places, turns, materials and light vary. Every picture is a
function of (split, scene, number of objects, size): only exactly rounded operations are used, so it is the same on
every machine.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock


COLOURS = {
    "gray": (0.34, 0.34, 0.34),
    "red": (0.68, 0.14, 0.14),
    "blue": (0.16, 0.29, 0.84),
    "green": (0.11, 0.41, 0.08),
    "brown": (0.51, 0.29, 0.10),
    "purple": (0.51, 0.15, 0.75),
    "cyan": (0.16, 0.82, 0.82),
    "yellow": (1.00, 0.93, 0.20),
}
SHAPES = ("cube", "sphere", "cylinder")
NAMES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]  # in i-CLEVR's order
SPLITS = {"train": 6003, "test": 667}  # scenes
MOST = 3  # objects of a picture
VERSION = 1  # of the pictures: to be raised when they change
LEAST_VISIBLE = 0.4  # of an object, where others stand before it

_SUPERSAMPLING = 2
_GROUND, _SKY = np.array([0.46, 0.46, 0.45]), np.array([0.62, 0.63, 0.64])
_CAMERA, _TARGET, _FIELD = (0.0, -8.0, 4.8), (0.0, 0.0, 0.45), 0.30  # half the width of the picture at distance 1
_FILL = (0.55, -0.75, 0.37)


@dataclass(frozen=True)
class Placed:
    """An object where it stands: half its height is its radius, and it touches the ground."""

    label: int
    x: float
    y: float
    radius: float
    cos: float  # of its turn about the vertical
    sin: float
    shine: float

    @property
    def shape(self) -> str:
        return SHAPES[self.label // len(COLOURS)]


@dataclass(frozen=True)
class Scene:
    """Three objects in the order in which they are put, and where the light comes from."""

    objects: tuple[Placed, ...]
    light: tuple[float, float, float]


def label_set(split: str, index: int) -> list[int]:
    """The ids of the objects in picture `index` of a split: of scene `index // 3`, the first `index % 3 + 1`."""
    return _labels(split, index // MOST)[: index % MOST + 1]


def render(split: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Picture `index` of a split, uint8 `(H, W, 3)`."""
    scene = make_scene(split, index // MOST)
    return draw(scene.objects[: index % MOST + 1], scene.light, size)


def render_all(split: str, size: tuple[int, int]) -> np.ndarray:
    """All pictures of a split, uint8 `(N, H, W, 3)`, by all cores."""
    indices = range(SPLITS[split] * MOST)
    # fresh processes: a fork of one that has threads may never wake
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return np.stack(list(pool.map(partial(render, split, size=size), indices, chunksize=96)))


def cached(split: str, size: tuple[int, int]) -> np.ndarray:
    """As `render_all`, but rendered once on a machine: kept as `.npy` in the folder that `HWDIFFUSION_CACHE` names, or
    in `~/.cache/hwdiffusion`, and read from there as it is needed."""
    folder = Path(os.environ.get("HWDIFFUSION_CACHE") or Path.home() / ".cache" / "hwdiffusion")
    path = folder / f"shapes-{VERSION}-{split}-{size[0]}x{size[1]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of several processes one renders
            if not path.is_file():
                part = path.with_suffix(".part")
                with open(part, "wb") as file:
                    np.save(file, render_all(split, size))
                part.replace(path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def _random(split: str, scene: int, what: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[list(SPLITS).index(split) * 2**32 + what, scene]))


def _labels(split: str, scene: int) -> list[int]:
    """Three different objects: a shape is drawn, then a colour that the shape doesn't have yet."""
    random, labels = _random(split, scene, 0), []
    while len(labels) < MOST:
        shape = int(random.integers(len(SHAPES)))
        of_shape = range(shape * len(COLOURS), (shape + 1) * len(COLOURS))
        free = [label for label in of_shape if label not in labels]
        labels.append(free[int(random.integers(len(free)))])
    return labels


@lru_cache(maxsize=4)
def make_scene(split: str, scene: int) -> Scene:
    """A scene whose objects stand apart, and can all be seen."""
    random, labels = _random(split, scene, 1), _labels(split, scene)
    light = _unit((_rounded(random.uniform(-1.0, -0.2)), _rounded(random.uniform(-0.8, 0.1)), 1.1))
    objects: list[Placed] = []
    while len(objects) < MOST:
        turn = random.uniform(0, 2 * math.pi)
        added = Placed(
            label=labels[len(objects)],
            x=_rounded(random.uniform(-1.75, 1.75)),
            y=_rounded(random.uniform(-1.8, 2.0)),
            radius=_rounded(random.uniform(0.48, 0.80)),
            cos=_rounded(math.cos(turn)),
            sin=_rounded(math.sin(turn)),
            shine=float(random.integers(2)),
        )
        apart = all(
            (added.x - other.x) ** 2 + (added.y - other.y) ** 2 > (1.1 * (added.radius + other.radius)) ** 2
            for other in objects
        )
        if apart and min(visible_shares([*objects, added])) >= LEAST_VISIBLE:
            objects.append(added)
    return Scene(tuple(objects), light)


def visible_shares(objects: list[Placed], side: int = 32) -> list[float]:
    """Which part of each object, as it would be seen alone, others leave visible."""
    origin, rays = _rays((side, side))
    depths = [_intersect(placed, origin, rays)[0] for placed in objects]
    nearest = np.minimum.reduce(depths)
    return [
        float(((depth == nearest) & np.isfinite(depth)).sum() / max(1, np.isfinite(depth).sum())) for depth in depths
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rays: arrays of x, y and z, so that no product is fused or reordered
# ---------------------------------------------------------------------------------------------------------------------


def draw(objects, light, size: tuple[int, int]) -> np.ndarray:
    """Objects under a light, uint8 `(H, W, 3)`."""
    height, width = (side * _SUPERSAMPLING for side in size)
    origin, rays = _rays((height, width))
    depth = np.where(rays[2] < 0, -origin[2] / np.minimum(rays[2], -1e-9), np.inf)  # of the ground
    normal = [np.zeros_like(depth), np.zeros_like(depth), np.ones_like(depth)]
    far = np.minimum(depth, 60.0) / 60.0
    colour = [(1 - far) * ground + far * sky for ground, sky in zip(_GROUND, _SKY)]
    shine = np.zeros_like(depth)
    for placed in objects:
        at, facing = _intersect(placed, origin, rays)
        nearer = at < depth
        depth = np.where(nearer, at, depth)
        normal = [np.where(nearer, ours, theirs) for ours, theirs in zip(facing, normal)]
        own = list(COLOURS.values())[placed.label % len(COLOURS)]
        colour = [np.where(nearer, ours, theirs) for ours, theirs in zip(own, colour)]
        shine = np.where(nearer, placed.shine, shine)

    hit = depth < 60.0
    reach = np.where(hit, depth, 0.0)
    points = [start + reach * ray + 1e-3 * out for start, ray, out in zip(origin, rays, normal)]
    lit = np.maximum(_dot(normal, light), 0.0)
    for placed in objects:
        lit = np.where(np.isfinite(_intersect(placed, points, light)[0]), 0.0, lit)
    filled = np.maximum(_dot(normal, _FILL), 0.0)
    half = _unit_rows([towards - ray for towards, ray in zip(light, rays)])
    gloss = np.maximum(_dot(normal, half), 0.0)
    for _ in range(5):
        gloss = gloss * gloss  # to the power of 32
    gloss = np.where(lit > 0, gloss * (0.12 + 0.6 * shine), 0.0)
    brightness = np.where(hit, 0.30 + 0.75 * lit + 0.22 * filled, 1.0)
    image = np.stack([np.sqrt(np.clip(part * brightness + gloss, 0.0, 1.0)) for part in colour], axis=-1)
    image = image.reshape(size[0], _SUPERSAMPLING, size[1], _SUPERSAMPLING, 3)
    mean = (image[:, 0, :, 0] + image[:, 1, :, 0] + image[:, 0, :, 1] + image[:, 1, :, 1]) / 4
    return np.floor(mean * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=4)
def _rays(size: tuple[int, int]):
    """Where the camera is, and the direction `(H·W,)` of each pixel's ray, in x, y and z."""
    height, width = size
    forward = _unit(tuple(target - start for target, start in zip(_TARGET, _CAMERA)))
    right = _unit((forward[1], -forward[0], 0.0))
    up = (
        right[1] * forward[2] - right[2] * forward[1],
        right[2] * forward[0] - right[0] * forward[2],
        right[0] * forward[1] - right[1] * forward[0],
    )
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    across = ((columns.reshape(-1) + 0.5) / width * 2 - 1) * _FIELD * (width / max(width, height))
    down = ((rows.reshape(-1) + 0.5) / height * 2 - 1) * _FIELD * (height / max(width, height))
    rays = [forward[axis] + across * right[axis] - down * up[axis] for axis in range(3)]
    return _CAMERA, _unit_rows(rays)


def _intersect(placed: Placed, origin, rays):
    """The distance `(N,)` along each ray to an object, infinite where it is missed, and the normal there."""
    return {"cube": _cube, "sphere": _sphere, "cylinder": _cylinder}[placed.shape](placed, origin, rays)


def _sphere(placed: Placed, origin, rays):
    offset = [origin[0] - placed.x, origin[1] - placed.y, origin[2] - placed.radius]
    along, beyond = _dot(offset, rays), _dot(offset, offset) - placed.radius**2
    discriminant = along * along - beyond
    at = -along - np.sqrt(np.maximum(discriminant, 0.0))
    at = np.where((discriminant > 0) & (at > 1e-4), at, np.inf)
    reach = np.where(np.isfinite(at), at, 0.0)
    return at, [(start + reach * ray) / placed.radius for start, ray in zip(offset, rays)]


def _cylinder(placed: Placed, origin, rays):
    x, y, top = origin[0] - placed.x, origin[1] - placed.y, 2 * placed.radius
    a = np.maximum(rays[0] * rays[0] + rays[1] * rays[1], 1e-12)
    b, c = x * rays[0] + y * rays[1], x * x + y * y - placed.radius**2
    discriminant = b * b - a * c
    side = (-b - np.sqrt(np.maximum(discriminant, 0.0))) / a
    z = origin[2] + side * rays[2]
    side = np.where((discriminant > 0) & (side > 1e-4) & (z > 0) & (z < top), side, np.inf)
    steep = np.where(np.abs(rays[2]) > 1e-9, rays[2], 1e-9)
    lid = (top - origin[2]) / steep
    within = (x + lid * rays[0]) ** 2 + (y + lid * rays[1]) ** 2 < placed.radius**2
    lid = np.where((lid > 1e-4) & within, lid, np.inf)
    at, on_lid = np.minimum(side, lid), lid < side
    reach = np.where(np.isfinite(at), at, 0.0)
    sides = ((x, rays[0]), (y, rays[1]))
    normal = [np.where(on_lid, 0.0, (start + reach * ray) / placed.radius) for start, ray in sides]
    return at, [*normal, np.where(on_lid, 1.0, 0.0)]


def _cube(placed: Placed, origin, rays):
    # a cube of the same room as the others have: its half side is less than the radius of what it turns in
    half = placed.radius * 0.86
    turned = []
    for x, y, z in ((origin[0] - placed.x, origin[1] - placed.y, origin[2] - half), rays):
        turned.append((placed.cos * x + placed.sin * y, placed.cos * y - placed.sin * x, z))
    enter, leave, axis = -np.inf, np.inf, 0
    for place in range(3):
        start, ray = turned[0][place], turned[1][place]
        ray = np.where(np.abs(ray) > 1e-9, ray, 1e-9)
        first, second = (-half - start) / ray, (half - start) / ray
        near = np.minimum(first, second)
        axis = np.where(near > enter, place, axis)
        enter, leave = np.maximum(enter, near), np.minimum(leave, np.maximum(first, second))
    at = np.where((enter < leave) & (enter > 1e-4), enter, np.inf)
    signs = [np.where(axis == place, np.where(turned[1][place] > 0, -1.0, 1.0), 0.0) for place in range(3)]
    normal = [placed.cos * signs[0] - placed.sin * signs[1], placed.sin * signs[0] + placed.cos * signs[1], signs[2]]
    return at, normal


def _dot(one, other):
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


def _unit(vector):
    length = math.sqrt(_dot(vector, vector))
    return tuple(part / length for part in vector)


def _unit_rows(vectors):
    length = np.sqrt(_dot(vectors, vectors))
    return [part / length for part in vectors]


def _rounded(number: float) -> float:
    return round(number, 6)  # what a library's sine leaves in the last bits must not reach a picture
