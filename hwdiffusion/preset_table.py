"""`hwdiffusion presets`: what comes with the package, with sizes and known scores."""

import json
from importlib import resources
from pathlib import Path

import yaml

from hwdiffusion import InputError
from hwdiffusion.config import load_preset, preset_names
from hwdiffusion.models import build_critic, build_generator, build_unet, build_vqvae, latent_shape


MADE_BY = {
    "train_ldm": "ldm",
    "train_ddpm": "ddpm",
    "train_wgan": "wgan",
    "train_vqgan": "vqgan",
    "train_classifier": "classifier",
}
NO_SCORE = "no score yet"


def describe_presets(names: list[str] | None = None) -> list[dict]:
    """Of each preset `name`, `trains`, `data`, `pictures`, `latents`, `parameters` of each model, `score` (see
    [`score_of`]), `about`."""
    return [_describe(name) for name in names or preset_names()]


def _describe(name: str) -> dict:
    preset = load_preset(name)
    size = [preset.get("resolution", 16)] if not isinstance(preset.get("resolution"), list) else preset["resolution"]
    height, width = size[0], size[-1]
    channels = 1 if preset.get("image_mode") == "L" else 3
    shape, parameters = (channels, height, width), {}
    scripts = [script for script in MADE_BY if script in preset] or ["train_ldm"]
    if "vqvae" in preset and scripts != ["train_ddpm"]:
        vqvae = build_vqvae(preset["vqvae"], channels, (height, width))
        parameters["vqvae"], shape = _count(vqvae), latent_shape(vqvae, (height, width))
    if "unet" in preset:
        parameters["unet"] = _count(build_unet(preset["unet"], shape, 10))  # some number of labels: they are few
    for model, build in (("generator", build_generator), ("critic", build_critic)):
        if model in preset:
            parameters[model] = _count(build(preset[model], shape, 10))
    return {
        "name": name,
        "trains": [MADE_BY[script] for script in scripts],
        "data": preset.get("dataset_name") or "--train_data_dir",
        "pictures": [channels, height, width],
        "latents": list(shape) if "vqvae" in parameters else None,
        "parameters": parameters,
        "score": score_of(name),
        "about": _about(name),
    }


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _text(name: str) -> str:
    if name not in preset_names():
        return Path(name).read_text(encoding="utf-8")
    return resources.files("hwdiffusion").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


def _about(name: str) -> str:
    """The comment at the head of a preset."""
    lines = []
    for line in _text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def score_of(name: str) -> dict | None:
    """The known score of a preset, from the section `score` of its file, which is where it is kept; `None` if it
    has none. One that stands on another has not the other's.

    Returns:
        `of` (what was measured), `value`, `n`, `judge` (by whom or on what), and, where it says something, `sampling`
        and `after` (how much training).
    """
    score = yaml.safe_load(_text(name)).get("score")
    if score is None:
        return None
    numbers = isinstance(score, dict) and all(type(score.get(key)) in (int, float) for key in ("value", "n"))
    if not numbers or not {"of", "judge"} <= set(score):
        raise InputError(f"score of preset {name} must have `of`, `value` and `n`, which are numbers, and `judge`")
    return dict(score)


def _in_short(score: dict | None) -> str:
    return NO_SCORE if score is None else "{of} {value:g} (n {n:,})".format(**score)


def score_in_words(score: dict | None) -> str:
    """For example `label accuracy 0.988, n = 4,000, by mnist-classifier (DDIM, 50 steps); after 14 minutes`."""
    if score is None:
        return NO_SCORE
    words = "{of} {value:g}, n = {n:,}, by {judge}".format(**score)
    words += f" ({score['sampling']})" if "sampling" in score else ""
    return words + (f"; after {score['after']}" if "after" in score else "")


def print_presets(as_json: bool):
    """All presets as a table, each with a line on what it is; or as one JSON object, with a list `presets`."""
    rows = describe_presets()
    if as_json:
        print(json.dumps({"presets": rows}, indent=2, ensure_ascii=False))
        return
    cells = [["preset", "trains", "data", "pictures", "latents", "parameters", "known score"]]
    for row in rows:
        cells.append(
            [
                row["name"],
                ", ".join(row["trains"]),
                row["data"],
                "x".join(map(str, row["pictures"])),
                "x".join(map(str, row["latents"])) if row["latents"] else "",
                ", ".join(f"{model} {count / 1e6:.1f} M" for model, count in row["parameters"].items()),
                _in_short(row["score"]),
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for place, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if place:
            print(f"    {rows[place - 1]['about']}")
    print("\n`hwdiffusion presets show NAME` prints one, and by whom its score was measured.")


def print_preset(name: str, as_json: bool):
    """A preset with what its `base` gives it, as YAML, which can be edited and given as `--preset FILE`."""
    preset = load_preset(name)
    if as_json:
        print(json.dumps(preset, indent=2, ensure_ascii=False))
        return
    for line in (_about(name) or name, f"Best known: {score_in_words(score_of(name))}."):
        print(f"# {line}")
    print(yaml.safe_dump(preset, sort_keys=False), end="")
