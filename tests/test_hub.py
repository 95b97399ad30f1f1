import re

import pytest
from PIL import Image
from tiny import make_pipeline

from hwdiffusion.config import parse
from hwdiffusion.hub import write_model_card


@pytest.mark.parametrize(
    "kind, options, example, row",
    [
        ("pixel", {}, "labels=['wild']", "one row a label,"),
        ("tokens", {"max_labels": 2}, "labels=[['cat', 'wild']]", "one row a set of labels,"),
        ("unconditional", {}, "", "one row a label,"),
    ],
)
def test_the_example_of_a_card_is_one_of_its_model_and_runs(kind, options, example, row, preset, tmp_path):
    pipe = make_pipeline(kind, **options)
    write_model_card(parse("train_ddpm", ["--preset", preset, "--output_dir", str(tmp_path)]), pipe, "Digits", 3)
    card = (tmp_path / "README.md").read_text()
    call = re.search(r"^image = pipe\((.*)\)\.images\[0\]$", card, re.MULTILINE).group(1)
    assert call == example and row in card
    assert ("in sets of at most 2" in card) == ("max_labels" in options)
    assert isinstance(eval(f"pipe({call})").images[0], Image.Image)
