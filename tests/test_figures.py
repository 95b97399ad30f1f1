import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hwdiffusion.data import to_model_range
from hwdiffusion.figures import (
    denoising,
    image_grid,
    loss_curve,
    read_metrics,
    sample_grid,
    to_pil,
    write_animation,
)


def pictures(count: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> list[Image.Image]:
    shape = (count, size[1], size[0], *((3,) if mode == "RGB" else ()))
    return [Image.fromarray(values) for values in np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)]


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_pictures_survive_the_way_to_the_models_range_and_back(mode, channels):
    images = torch.arange(256 * channels).reshape(1, channels, 16, 16).to(torch.uint8)
    (image,) = to_pil(to_model_range(images))
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).reshape(16, 16, channels), images[0].permute(1, 2, 0).numpy())


def test_values_outside_of_the_models_range_are_clipped():
    assert np.asarray(to_pil(torch.tensor([[[[-3.0, 3.0], [0.0, 1.1]]]]))[0]).tolist() == [[0, 255], [128, 255]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("count, columns, size, cell, scale", [(6, 3, (8, 8), 8, 1), (5, 2, (6, 4), 24, 4)])
def test_a_grid_is_its_pictures_in_rows_on_white(mode, count, columns, size, cell, scale):
    images, gap = pictures(count, size, mode), 3
    grid = np.asarray(image_grid(images, columns, cell=cell, gap=gap)).copy()
    width, height = size[0] * scale, size[1] * scale
    rows = -(-count // columns)
    assert grid.shape == (gap + rows * (height + gap), gap + columns * (width + gap), 3)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        place = grid[top : top + height, left : left + width]
        expected = np.asarray(image.convert("RGB")).repeat(scale, axis=0).repeat(scale, axis=1)
        assert np.array_equal(place, expected)
        place[:] = 255
    assert (grid == 255).all()


def test_names_of_rows_stand_left_of_them_and_move_the_pictures_only():
    images = pictures(6, (16, 16))
    bare = image_grid(images, 3, cell=16)
    named = image_grid(images, 3, ["cat", ""], cell=16)
    margin = named.width - bare.width
    assert np.array_equal(np.asarray(named)[:, margin + 4 :], np.asarray(bare)[:, 4:])
    left = np.asarray(named.crop((0, 0, margin, named.height)))
    assert left[:20].min() < 128 and left[24:].min() == 255


def test_captions_stand_under_their_pictures_and_move_the_rows_below_only():
    images = pictures(3, (32, 32))
    bare = image_grid(images, 2, cell=96)
    grid = np.asarray(image_grid(images, 2, cell=96, captions=[["red", "cube"], ["one"], ["blue"]]))
    under = (grid.shape[0] - bare.height) // 2  # for each of the two rows
    assert under > 20 and grid.shape[1] == bare.width
    assert np.array_equal(grid[4:100], np.asarray(bare)[4:100])
    assert np.array_equal(grid[104 + under : 200 + under], np.asarray(bare)[104:200])
    below = grid[100 : 100 + under]
    assert below[:, 4:100].min() < 128 and below[: under // 2, 104:200].min() < 128
    assert (below[under // 2 + 2 :, 104:200] == 255).all()  # the second has one line


class Pipeline:
    """Pictures that tell their label and their generator's seed."""

    def __init__(self, names):
        self.id2label = dict(enumerate(names))
        self.calls = []

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, labels, num_images_per_prompt, generator):
        self.calls.append((labels, num_images_per_prompt, [each.initial_seed() for each in generator]))
        labels = [0] * num_images_per_prompt if labels is None else labels
        assert len(labels) == len(generator)
        # of a set its first label counts tenfold
        codes = [
            int(each[0]) if len(each) == 1 else 10 * int(each[0]) + int(each[1]) for each in map(np.atleast_1d, labels)
        ]
        colors = [(code, each.initial_seed() % 256, 7) for code, each in zip(codes, generator)]
        return SimpleNamespace(images=[Image.new("RGB", (64, 64), color) for color in colors])


def cells(grid: Image.Image, rows: int, columns: int) -> list[list[tuple]]:
    left = grid.width - columns * 68
    return [
        [grid.getpixel((left + column * 68 + 32, 4 + row * 68 + 32)) for column in range(columns)]
        for row in range(rows)
    ]


def test_a_sample_grid_has_a_row_for_each_label_and_a_seed_for_each_picture():
    pipeline = Pipeline(["a", "b", "c"])
    grid = sample_grid(pipeline, seed=40, columns=4)
    assert grid.height == 4 + 3 * 68
    assert cells(grid, 3, 4) == [[(row, 40 + 4 * row + column, 7) for column in range(4)] for row in range(3)]
    assert sample_grid(pipeline, seed=40, columns=4).tobytes() == grid.tobytes()


def test_a_sample_grid_has_a_row_for_each_of_the_sets_it_is_given():
    pipeline = Pipeline(["a", "b", "c"])
    sets = torch.tensor([[2, 0], [1, -1], [0, 1]])
    grid = sample_grid(pipeline, seed=7, sets=sets, rows=2, columns=3)
    ((labels, _, seeds),) = pipeline.calls
    assert labels.tolist() == [[2, 0]] * 3 + [[1, -1]] * 3 and seeds == list(range(7, 13))
    assert cells(grid, 2, 3) == [
        [(code, 7 + 3 * row + column, 7) for column in range(3)] for row, code in [(0, 20), (1, 9)]
    ]


def test_a_sample_grid_shows_the_first_labels_of_many():
    pipeline = Pipeline([f"class {index}" for index in range(50)])
    grid = sample_grid(pipeline, seed=0, rows=2, columns=3)
    assert cells(grid, 2, 3) == [[(row, 3 * row + column, 7) for column in range(3)] for row in range(2)]


def test_a_sample_grid_without_labels_asks_for_as_many_pictures():
    pipeline = Pipeline([])
    grid = sample_grid(pipeline, seed=5, rows=2, columns=3)
    assert pipeline.calls == [(None, 6, [5, 6, 7, 8, 9, 10])]
    assert cells(grid, 2, 3) == [[(0, 5 + 3 * row + column, 7) for column in range(3)] for row in range(2)]


def test_metrics_are_read_up_to_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / (step + 1)} for step in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text)
    assert read_metrics(path) == lines
    whole_lines = len(json.dumps(lines[0])) + len(json.dumps(lines[1])) + 2
    for end in range(whole_lines, len(text) - 2):
        path.write_text(text[:end])
        assert read_metrics(path) == lines[:2]


def test_without_a_file_there_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def draw(folder, lines: list[dict]) -> np.ndarray:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss_curve(folder / "metrics.jsonl", folder / "loss.png")
    with Image.open(folder / "loss.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_loss_curve_shows_the_losses_and_nothing_else(tmp_path):
    falling = [{"step": step, "loss": 1 / (step + 1), "lr": 1e-3} for step in range(100)]
    plain = draw(tmp_path, falling)
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) > 10
    assert np.array_equal(draw(tmp_path, [{**line, "lr": 0.5, "usage": 1.0} for line in falling]), plain)
    assert not np.array_equal(draw(tmp_path, [{**line, "loss": 1.0} for line in falling]), plain)


def test_losses_that_set_in_late_or_are_negative_are_drawn(tmp_path):
    lines = [{"step": step, "mse_loss": 0.1} for step in range(20)]
    plain = draw(tmp_path, lines)
    late = draw(tmp_path, [*lines, {"step": 20, "mse_loss": 0.1, "generator_loss": -0.5}])
    assert not np.array_equal(late, plain)


def test_no_losses_give_no_curve(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "codebook_usage": 1.0}\n')
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


# -- denoising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_the_last_moment_of_denoising_is_the_picture(kind):
    from tiny import make_pipeline, seeds

    pipe = make_pipeline(kind)
    moments = denoising(pipe, 3, labels=[0, 1], generator=seeds(0, 1), num_inference_steps=6)
    assert [step for step, _ in moments] == [1, 3, 6]
    images = pipe(labels=[0, 1], generator=seeds(0, 1), num_inference_steps=6).images
    for ours, theirs in zip(moments[-1][1], images):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    every = denoising(pipe, None, labels=[0, 1], generator=seeds(0, 1), num_inference_steps=6)
    assert [step for step, _ in every] == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(np.asarray(every[2][1][0]), np.asarray(moments[1][1][0]))
    clean = denoising(pipe, 3, predicted=True, labels=[0, 1], generator=seeds(0, 1), num_inference_steps=6)
    assert not np.array_equal(np.asarray(clean[0][1][0]), np.asarray(moments[0][1][0]))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_runs_over_and_over_and_holds_on_its_end(suffix, tmp_path):
    frames = [Image.new("RGB", (16, 16), (index * 40, 0, 0)) for index in range(5)]
    path = tmp_path / "new" / f"animation{suffix}"
    write_animation(path, frames, seconds=1.0, hold=2.0)
    with Image.open(path) as moving:
        assert moving.n_frames == 5 and moving.info.get("loop") == 0
        durations = []
        for index in range(5):
            moving.seek(index)
            moving.load()
            durations.append(moving.info["duration"])
            assert abs(moving.convert("RGB").getpixel((3, 3))[0] - index * 40) <= 2
    assert durations == [200] * 4 + [2000]


def test_names_of_columns_stand_above_them_and_move_the_pictures_only():
    images = pictures(4, (16, 16))
    bare, named = image_grid(images, 2, cell=32), image_grid(images, 2, column_names=["a", ""], cell=32)
    top = named.height - bare.height
    assert top > 0 and named.width == bare.width
    assert np.array_equal(np.asarray(named)[top + 4 :], np.asarray(bare)[4:])
    above = np.asarray(named)[:top]
    assert above[:, : bare.width // 2].min() < 128 and above[:, bare.width // 2 :].min() == 255
