"""The commands that draw pictures of a pipeline, through their command line, on a tiny one."""

import numpy as np
import pytest
from PIL import Image
from tiny import make_pipeline, seeds

from hwdiffusion.cli import main
from hwdiffusion.pipelines import ClassConditionalPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    make_pipeline("latent", default_guidance_scale=1.5, default_guidance_interval=(0.0, 0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "unconditional"
    make_pipeline("unconditional").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def of_sets(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "of_sets"
    make_pipeline("tokens", max_labels=2).save_pretrained(folder)
    return str(folder)


def cells(path, rows: int, columns: int, cell: int = 64, gap: int = 4, names: bool = True) -> np.ndarray:
    """The pictures of a grid, `(rows, columns, cell, cell, 3)`; those of columns without a name above included."""
    grid = np.asarray(Image.open(path))
    top = grid.shape[0] - rows * (cell + gap)
    left = grid.shape[1] - columns * (cell + gap)
    assert top >= gap and left >= gap
    places = [
        [(top + row * (cell + gap), left + column * (cell + gap)) for column in range(columns)] for row in range(rows)
    ]
    return np.array([[grid[y : y + cell, x : x + cell] for y, x in line] for line in places]).astype(int)


def test_a_trajectory_ends_in_the_pictures_of_a_plain_call(run, tmp_path):
    output, animation = tmp_path / "deep" / "trajectory.png", tmp_path / "trajectory.gif"
    options = ["--rows", "4", "--columns", "3", "--seed", "5", "--output", str(output), "--animation", str(animation)]
    assert main(["trajectory", run, *options]) == 0
    drawn = cells(output, 4, 3)
    pipe = ClassConditionalPipeline.from_pretrained(run)
    images = pipe(labels=[0, 1, 2, 0], generator=seeds(5, 6, 7, 8)).images
    for row, image in enumerate(images):
        expected = np.asarray(image.convert("RGB")).repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(drawn[row, -1], expected)
        assert not np.array_equal(drawn[row, 0], expected)
    with Image.open(animation) as moving:
        assert moving.n_frames == 4 and moving.info["loop"] == 0  # every step, over and over
    assert main(["trajectory", run, "--predicted", *options]) == 0
    predicted = cells(output, 4, 3)
    assert not np.array_equal(predicted[:, 0], drawn[:, 0])
    assert main(["trajectory", run, "--guidance_interval", "0", "1", *options]) == 0  # its own is the first half
    images = pipe(labels=[0, 1, 2, 0], guidance_interval=(0, 1), generator=seeds(5, 6, 7, 8)).images
    for row, image in enumerate(images):
        expected = np.asarray(image.convert("RGB")).repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(cells(output, 4, 3)[row, -1], expected)
    assert not np.array_equal(cells(output, 4, 3)[:, -1], drawn[:, -1])


def test_an_empty_word_is_the_null_label(run, of_sets, tmp_path):
    output = tmp_path / "trajectory.png"
    for kind, words in ((run, ["", "dog"]), (of_sets, [" ", "dog, cat"])):
        options = ["--rows", "2", "--columns", "2", "--output", str(output)]
        assert main(["trajectory", kind, "--labels", *words, *options]) == 0
        pipe = ClassConditionalPipeline.from_pretrained(kind)
        images = pipe(labels=[None, words[1].split(", ") if kind == of_sets else "dog"], generator=seeds(0, 1)).images
        scale = 64 // images[0].width
        for row, image in enumerate(images):
            expected = np.asarray(image.convert("RGB")).repeat(scale, axis=0).repeat(scale, axis=1)
            assert np.array_equal(cells(output, 2, 2)[row, -1], expected)


def test_variations_go_from_the_picture_to_another(run, tmp_path):
    picture, output = tmp_path / "picture.png", tmp_path / "variations.png"
    values = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(values).save(picture)
    options = ["--labels", "dog", "2", "--strength", "0", "0.5", "1", "--output", str(output)]
    assert main(["vary", run, "--image", str(picture), *options]) == 0
    drawn = cells(output, 2, 4)
    for row in range(2):
        assert np.abs(drawn[row, 0, ::4, ::4, 0] - values).max() <= 1  # the picture itself
    assert np.array_equal(drawn[0, 1], drawn[1, 1])  # strength 0: whatever the label
    assert not np.array_equal(drawn[0, 3], drawn[1, 3])
    assert main(["vary", run, "--source_label", "wild", *options]) == 0  # of one that the pipeline draws


def test_inpainting_keeps_what_is_outside_of_the_region(run, tmp_path):
    output = tmp_path / "inpainting.png"
    assert main(["inpaint", run, "--region", "left", "--columns", "2", "--output", str(output)]) == 0
    drawn = cells(output, 3, 4)
    given = drawn[0, 0]
    assert (np.abs(drawn[:, 1:, :, 32:] - given[:, 32:]) <= 1).all()
    assert (drawn[:, 1, :, :32] == 128).all()
    assert all(np.abs(drawn[row, column, :, :32] - given[:, :32]).max() > 10 for row in range(3) for column in (2, 3))
    mask = tmp_path / "mask.png"
    Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 16, axis=0).astype(np.uint8)).save(mask)
    large = [str(tmp_path / name) for name in ("large.png", "large_mask.png")]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(large[0])
    Image.open(mask).resize((64, 64), Image.Resampling.NEAREST).save(large[1])
    files = ["--image", large[0], "--mask", large[1], "--columns", "2", "--output", str(output)]
    assert main(["inpaint", run, *files]) == 0
    halves = cells(output, 3, 4)
    assert (np.abs(halves[:, 1:, :, 32:] - halves[:, :1, :, 32:]) <= 1).all()
    again = tmp_path / "again.png"
    assert main(["inpaint", run, "--mask", str(mask), "--columns", "2", "--output", str(again)]) == 0
    assert np.array_equal(cells(again, 3, 4), drawn)


def test_ways_between_labels_and_seeds(run, unconditional, tmp_path):
    output = tmp_path / "ways.png"
    assert main(["interpolate", run, "--labels", "cat", "wild", "--columns", "4", "--output", str(output)]) == 0
    labels, between_seeds, both = cells(output, 3, 4)
    assert np.array_equal(labels[0], between_seeds[0]) and np.array_equal(labels[0], both[0])
    assert not np.array_equal(labels[3], both[3]) and not np.array_equal(between_seeds[3], both[3])
    assert main(["interpolate", unconditional, "--columns", "4", "--output", str(output)]) == 0
    assert cells(output, 1, 4).shape[0] == 1


def test_models_without_labels_draw_too(unconditional, tmp_path):
    for command, rows in (("trajectory", 8), ("vary", 1), ("inpaint", 1)):
        output = tmp_path / f"{command}.png"
        assert main([command, unconditional, "--output", str(output)]) == 0
        assert cells(output, rows, 3).size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trajectory"], "name a run folder or Hub id"),
        (["trajectory", "nowhere"], "neither a run folder nor a pipeline of the Hub"),
        (["trajectory", "RUN", "--labels", "catt"], "the nearest known one is 'cat'"),
        (["trajectory", "RUN", "--labels", "7"], "label 7 is out of range"),
        (["trajectory", "SETS", "--labels", "cat, wid"], "unknown label 'wid'; the nearest known one is 'wild'"),
        (
            ["trajectory", "SETS", "--labels", "cat,"],
            "the labels 'cat,' lack a name beside a comma; the empty set is ''",
        ),
        (["trajectory", "UNNULLED", "--labels", ""], "trained without label dropout, so every picture needs a label"),
        (["trajectory", "RUN", "--rows", "0"], "--rows must be in 1 to 100, not 0"),
        (["trajectory", "RUN", "--animation", "moving.mp4"], "--animation must be a .gif or .webp"),
        (["trajectory", "RUN", "--output", "small.png/picture.png"], "can't be written"),
        (["trajectory", "RUN", "--animation", "small.png/moving.gif"], "can't be written"),
        (["trajectory", "RUN", "--device", "magic"], "--device magic is not there"),
        (["trajectory", "RUN", "--output", "picture.txt"], "--output must be a .png"),
        (["trajectory", "RUN", "--num_inference_steps", "0"], "num_inference_steps must be a whole number from 1"),
        (["trajectory", "RUN", "--scheduler", "magic"], "--scheduler must be one of ddpm"),
        (["trajectory", "UNCONDITIONAL", "--labels", "cat"], "knows no labels; leave --labels out"),
        (["trajectory", "UNCONDITIONAL", "--guidance_scale", "2"], "needs labels or a guidance_unet"),
        (["trajectory", "RUN", "--guidance_interval", "1", "0"], "--guidance_interval must be two numbers"),
        (["vary", "RUN", "--strength", "1.5"], "--strength must be in 0 to 1"),
        (["vary", "RUN", "--strength", "0.1"], "less than one step"),
        (["vary", "RUN", "--image", "none.png"], "--image none.png is not there"),
        (["vary", "RUN", "--image", "TEXT"], "can't be read as a picture"),
        (["vary", "RUN", "--image", "TEXT", "--source_label", "cat"], "with --image leave it out"),
        (["inpaint", "RUN", "--mask", "SMALL"], "make them alike"),
        (["inpaint", "RUN", "--region", "corner"], "invalid choice"),
        (["interpolate", "RUN", "--labels", "cat", "dog", "wild"], "takes two to go between, not 3"),
        (["interpolate", "RUN", "--strenght", "1"], "unknown flag --strenght"),
    ],
)
def test_wrong_commands_are_refused_and_write_nothing(
    run, unconditional, of_sets, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text, small = tmp_path / "text.png", tmp_path / "small.png"
    text.write_text("no picture")
    Image.new("L", (5, 5)).save(small)
    names = {"RUN": run, "UNCONDITIONAL": unconditional, "SETS": of_sets, "TEXT": str(text), "SMALL": str(small)}
    if "UNNULLED" in arguments:
        make_pipeline("pixel", has_null_label=False).save_pretrained(tmp_path / "UNNULLED")
    before = set(tmp_path.iterdir())
    assert main([names.get(word, word) for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
