"""`hwdiffusion presets`: what comes with the package, with sizes and best known scores."""

import json
from importlib import resources

import yaml

from hwdiffusion.config import load_preset, preset_names
from hwdiffusion.models import build_critic, build_generator, build_unet, build_vqvae, latent_shape


MADE_BY = {
    "train_ldm": "ldm",
    "train_ddpm": "ddpm",
    "train_wgan": "wgan",
    "train_vqgan": "vqgan",
    "train_classifier": "classifier",
}


def describe_presets(names: list[str] | None = None) -> list[dict]:
    """Of each preset `name`, `trains`, `data`, `pictures`, `latents`, `parameters` of each model, `about`."""
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
        "about": _about(name),
    }


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _text(name: str) -> str:
    return resources.files("hwdiffusion").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


def _about(name: str) -> str:
    """The comment at the head of a preset, which has its best known score."""
    lines = []
    for line in _text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def print_presets(as_json: bool):
    rows = describe_presets()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    cells = [["preset", "trains", "data", "pictures", "latents", "parameters"]]
    for row in rows:
        cells.append(
            [
                row["name"],
                ", ".join(row["trains"]),
                row["data"],
                "x".join(map(str, row["pictures"])),
                "x".join(map(str, row["latents"])) if row["latents"] else "",
                ", ".join(f"{model} {count / 1e6:.1f} M" for model, count in row["parameters"].items()),
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for place, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if place:
            print(f"    {rows[place - 1]['about']}")


def print_preset(name: str, as_json: bool):
    """A preset with what its `base` gives it, as YAML, which can be edited and given as `--preset FILE`."""
    preset = load_preset(name)
    if as_json:
        print(json.dumps(preset, indent=2, ensure_ascii=False))
        return
    print(f"# {_about(name)}" if name in preset_names() else f"# {name}")
    print(yaml.safe_dump(preset, sort_keys=False), end="")
