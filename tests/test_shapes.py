import collections
import hashlib
import itertools

import numpy as np
import pytest

from hwdiffusion import shapes
from hwdiffusion.arguments import DataArguments
from hwdiffusion.data import load_data


def test_pictures_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for split, index, size in itertools.product(("train", "test"), range(0, 60, 7), ((32, 32), (24, 40))):
        digest.update(shapes.render(split, index, size).tobytes())
    assert digest.hexdigest()[:16] == "da1584053e9a64ce"


def test_names_and_statistics_are_those_of_i_clevr():
    """Its train.json: 6,003 pictures of each size; 1,996 of 6,003 pairs share their shape, 478 their colour."""
    assert len(shapes.NAMES) == 24 and shapes.NAMES[:2] == ["gray cube", "red cube"]
    assert shapes.NAMES[8] == "gray sphere" and shapes.NAMES[-1] == "yellow cylinder"
    sets = [shapes.label_set("train", index) for index in range(18_009)]
    assert collections.Counter(map(len, sets)) == {1: 6003, 2: 6003, 3: 6003}
    assert all(len(set(ids)) == len(ids) for ids in sets)
    for first, second, third in zip(sets[::3], sets[1::3], sets[2::3]):
        assert third[:2] == second and second[:1] == first
    pairs = [[shapes.NAMES[label].split() for label in ids] for ids in sets[1::3]]
    assert sum(one[1] == other[1] for one, other in pairs) == pytest.approx(1996, abs=120)
    assert sum(one[0] == other[0] for one, other in pairs) == pytest.approx(478, abs=70)
    counts = collections.Counter(label for ids in sets for label in ids)
    assert len(counts) == 24 and min(counts.values()) > 1350 and max(counts.values()) < 1650


def test_a_scene_grows_by_an_object_and_the_others_stay():
    for scene in range(5):
        pictures = [shapes.render("train", 3 * scene + count, (32, 32)).astype(int) for count in range(3)]
        for before, after in itertools.pairwise(pictures):
            changed = np.abs(after - before).max(axis=2) > 8
            assert 0.002 < changed.mean() < 0.5  # the object and its shadow


def test_every_object_can_be_seen_and_none_stands_in_another():
    for scene in range(40):
        placed = shapes.make_scene("train", scene).objects
        assert min(shapes.visible_shares(list(placed))) >= shapes.LEAST_VISIBLE
        for one, other in itertools.combinations(placed, 2):
            assert (one.x - other.x) ** 2 + (one.y - other.y) ** 2 > (one.radius + other.radius) ** 2


@pytest.mark.parametrize("label", range(24))
def test_an_object_has_the_colour_that_its_name_says(label):
    placed = shapes.Placed(label, 0.0, 0.0, 0.8, 1.0, 0.0, 0.0)
    light = (-0.4, -0.5, 0.768)
    background = shapes.draw([], light, (32, 32)).astype(int)
    picture = shapes.draw([placed], light, (32, 32)).astype(int)
    own = picture[14:18, 15:17].reshape(-1, 3)
    assert np.abs(own - background[14:18, 15:17].reshape(-1, 3)).max() > 20
    colour = np.array(shapes.COLOURS[shapes.NAMES[label].split()[0]])
    seen = (own.mean(axis=0) / 255) ** 2  # the picture is the root of the light
    assert seen.std() < 0.01 if colour.std() == 0 else np.corrcoef(seen, colour)[0, 1] > 0.9  # of gray there is none


def test_scenes_of_the_held_out_split_are_others():
    assert [shapes.label_set("test", index) for index in range(90)] != [
        shapes.label_set("train", index) for index in range(90)
    ]


def test_the_shapes_are_a_data_set_of_their_own_rendered_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HWDIFFUSION_CACHE", str(tmp_path))
    args = DataArguments(dataset_name="shapes", resolution=[16], max_train_samples=30)
    args.seed = 0
    monkeypatch.setattr(shapes, "SPLITS", {"train": 200, "test": 5})
    few = load_data(args)
    assert len(few.train) == 30 and few.train.labels.shape == (30, 3) and not list(tmp_path.iterdir())
    args.max_train_samples = None
    data = load_data(args)
    assert len(data.train) == 600 and len(data.validation) == 15 and len(list(tmp_path.glob("*.npy"))) == 2
    for index in (0, 77):
        rendered = shapes.render("train", index, (16, 16)).transpose(2, 0, 1)
        assert np.array_equal(data.train.images[index].numpy(), rendered)
        assert [label for label in data.train.labels[index].tolist() if label >= 0] == shapes.label_set("train", index)
    monkeypatch.setattr(shapes, "render_all", lambda *_: pytest.fail("rendered again"))
    assert len(load_data(args).train) == 600
