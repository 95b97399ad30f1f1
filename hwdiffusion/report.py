"""What an evaluation says: as JSON, as a table on the screen and in a card."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hwdiffusion.arguments import ALL_STEPS


def write_json(path: Path, report: dict | list):
    """Write a report beside its place, then put it there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def as_json_text(found: dict) -> str:
    """A report for programs: strict JSON, in which a figure that is not finite is `null`."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(found), indent=2, ensure_ascii=False, allow_nan=False)


def as_table(report: dict, markdown: bool = False) -> str:
    """The report for reading: a line a measure, the pictures' figure beside that of real ones."""
    floor, rows = report["floor"], []
    if "labels" in report:
        ours, theirs = report["labels"], floor.get("labels")
        low, high = ours["accuracy_95"]
        real = "" if theirs is None else f"{theirs['accuracy']:.4f}"
        if "by_size" in ours:  # labels of one picture aren't independent, so an interval of them would be too narrow
            rows.append((f"label accuracy ({ours['n']} labels)", f"{ours['accuracy']:.4f}", real))
        else:
            rows.append(("label accuracy (95 %)", f"{ours['accuracy']:.4f} ({low:.4f}–{high:.4f})", real))
        worst = min((share, name) for name, share in ours["per_class"].items() if share is not None)
        for size, scores in ours.get("over_seeds", {}).get("by_size", ours.get("by_size", {})).items():
            name = f"  of sets of {size}" if int(size) > 1 else "  of single labels"
            real = (theirs or {}).get("by_size", {}).get(size)
            rows.append((name, _share(scores), f"{real['accuracy']:.4f}" if real else ""))
        if "over_seeds" in ours:
            rows.append((f"mean of {ours['over_seeds']['n']} seeds (95 %)", _share(ours["over_seeds"]), ""))
        if "whole_sets" in ours:
            real = f"{theirs['whole_sets']:.4f}" if theirs and "whole_sets" in theirs else ""
            rows.append(("whole sets", f"{ours['whole_sets']:.4f}", real))
        for place, of in enumerate(ours.get("attributes", [])):
            real = f"{theirs['attributes'][place]['accuracy']:.4f}" if theirs and "attributes" in theirs else ""
            rows.append((", ".join(of["values"]), f"{of['accuracy']:.4f}", real))
        real = "" if theirs is None else f"{theirs['worst_class']:.4f}"
        rows.append(("worst class", f"{worst[0]:.4f} ({worst[1]})", real))
        rows.append(("mean confidence", f"{ours['confidence']:.4f}", f"{theirs['confidence']:.4f}" if theirs else ""))
    if "distances" in report:
        sides = [side.get("distances") for side in (report, floor)]
        rows.append(("Fréchet distance", *(f"{side['frechet_distance']:.4f}" if side else "" for side in sides)))
        spread = (
            f"{side['kernel_distance']:.2e} ± {side['kernel_distance_sd']:.0e}" if side else "" for side in sides
        )
        rows.append(("kernel distance", *spread))
    if "manifold" in report:
        for name in ("precision", "recall", "density", "coverage"):
            sides = [side.get("manifold") for side in (report, floor)]
            rows.append((name, *(f"{side[name]:.4f}" if side else "" for side in sides)))
    for space, scores in report.get("memorisation", {}).items():
        rows.append((f"distance to the nearest training picture ({space}), ratio", f"{scores['ratio']:.3f}", "1"))
        rows.append((f"share of copies ({space})", f"{scores['share_of_copies']:.4f}", "0.01"))
    if "cas" in report:
        rows.append(("CAS", f"{report['cas']['generated']:.4f}", f"{report['cas']['real']:.4f}"))
    extractor, reference = report["extractor"], report["reference"]
    judged = f", test accuracy {extractor['test_accuracy']:.4f}" if extractor.get("test_accuracy") else ""
    pretext = ", which learned rotations" if extractor.get("pretext") == "rotation" else ""
    sampling = report["sampling"]
    drawn = "pictures"
    if sampling is not None:
        drawn = f"samples ({how_drawn(sampling)})"
        if sampling.get("label_sets", {}).get("file"):
            drawn += " of the {sets} sets of {file} by {seeds} seeds each".format(**sampling["label_sets"])
    about = (
        f"{report['n']} {drawn} against {reference['n']} pictures of {reference['name']} ({reference['split']}); "
        f"features of {extractor['extractor']} {extractor['model']}{judged}{pretext}. The column of real pictures: "
        f"labels and nearest pictures of the {reference['n']}"
        + (f", else {floor['n']} others ({floor['of']})." if floor["of"] != "held-out" else ".")
    )
    if "left_out" in report:
        about += f" Left out: {report['left_out']}."
    if markdown:
        lines = [f"| {name} | {ours} | {real} |" for name, ours, real in rows]
        return "\n".join([about, "", "| | these | real |", "|---|---|---|", *lines])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([about, *lines])


def in_part(interval: Sequence[float]) -> str:
    """In which part of the steps, in words that go after others; none of all steps."""
    return "" if list(interval) == ALL_STEPS else " in ({:g}, {:g}) of the steps".format(*interval)


def how_drawn(sampling: dict) -> str:
    """How samples were drawn, in a few words."""
    rest = f", {sampling['torch_dtype']}" if "torch_dtype" in sampling else ""
    rest += ", labels as often as held out" if "label_frequencies" in sampling else ""
    if sampling["scheduler"] is None:
        truncated = f", truncation {sampling['truncation']:g}" if "truncation" in sampling else ""
        return "one pass of the generator" + truncated + rest
    guidance = "autoguidance" if "autoguidance" in sampling else "guidance"
    how = "{scheduler}, {num_inference_steps} steps, {guidance} {guidance_scale}".format(**sampling, guidance=guidance)
    if "guidance_interval" in sampling:
        how += in_part(sampling["guidance_interval"])
    if "classifier_guidance_scale" in sampling:
        how += f", classifier guidance {sampling['classifier_guidance_scale']:g} by {sampling['guide']['model']}"
    return how + rest


def _share(scores: dict) -> str:
    """An accuracy, with its interval over seeds if it has one."""
    if "mean" not in scores:
        return f"{scores['accuracy']:.4f}"
    return "{:.4f} ({:.4f}–{:.4f})".format(scores["mean"], *scores["mean_95"])


def _accuracy(report: dict) -> str:
    """Label accuracy with its interval: over seeds, if sets were drawn by several."""
    labels = report["labels"]
    if "by_size" in labels and "over_seeds" not in labels:  # labels of one picture aren't independent
        return f"{labels['accuracy']:.4f}"
    interval = labels.get("over_seeds", {}).get("mean_95", labels["accuracy_95"])
    return "{:.4f} ({:.3f}–{:.3f})".format(labels["accuracy"], *interval)


def comparison_table(rows: list[dict], device: str) -> str:
    """Runs for reading: a line a measure, a column a run, and one of real pictures, in Markdown.

    Args:
        rows: a report each, with `run`, `parameters`, `training` and `speed`.
        device: on which samples were drawn.
    """
    first, floor = rows[0], rows[0]["floor"]
    lines: list[tuple[str, Callable[[dict], str], str]] = [("sampling", lambda row: how_drawn(row["sampling"]), "")]

    def of_both(name: str, part: str, key: str, layout: str = "{:.4f}"):
        real = layout.format(floor[part][key]) if part in floor else ""
        lines.append((name, lambda row: layout.format(row[part][key]), real))

    if "labels" in first:
        real = f"{floor['labels']['accuracy']:.4f}" if "labels" in floor else ""
        lines.append(("label accuracy (95 %)", _accuracy, real))
        of_both("worst class", "labels", "worst_class", "{:.3f}")
    if "distances" in first:
        of_both("Fréchet distance", "distances", "frechet_distance", "{:.3f}")
        of_both("kernel distance", "distances", "kernel_distance", "{:.2e}")
    if "manifold" in first:
        for name in ("precision", "recall", "coverage"):
            of_both(name, "manifold", name, "{:.3f}")
    if "memorisation" in first:
        for name, key, real in (
            ("distance to the nearest training picture, ratio", "ratio", "1"),
            ("share of copies", "share_of_copies", "0.01"),
        ):
            lines.append((name, lambda row, key=key: f"{row['memorisation']['features'][key]:.3f}", real))
    lines.append(("parameters", lambda row: f"{row['parameters'] / 1e6:.2f} M", ""))
    for name, key, layout in (
        ("training seconds", "seconds", "{:.0f}"),
        ("training pictures seen", "images", "{:,}"),
        ("training memory (GiB)", "peak_memory_gb", "{:.2f}"),
    ):
        if any(key in row["training"] for row in rows):
            lines.append((name, lambda row, key=key, layout=layout: _known(row["training"], key, layout), ""))
    lines.append((f"pictures a second ({device})", lambda row: f"{row['speed']['images_per_second']:.3g}", ""))
    if any("memory_gb" in row["speed"] for row in rows):
        lines.append(("sampling memory (GiB)", lambda row: _known(row["speed"], "memory_gb", "{:.2f}"), ""))

    reference, extractor = first["reference"], first["extractor"]
    about = (
        f"{first['n']} samples of each, against {reference['n']} pictures of {reference['name']} "
        f"({reference['split']}), by the extractor {extractor['extractor']} {extractor['model']}; pictures a second "
        f"are of {first['speed']['n']} in one batch, one run after another"
    )
    for row in rows:
        for what in row["training"].get("given", []):
            about += f"; the training of the {what} that {row['run']} was given isn't counted"
    head = ["", *(row["run"] for row in rows), "real"]
    table = [head, ["---"] * len(head)]
    table += [[name, *(cell(row) for row in rows), real] for name, cell, real in lines]
    return "\n".join([f"{about}.", "", *(f"| {' | '.join(cells)} |" for cells in table)])


def _known(of: dict, key: str, layout: str) -> str:
    return layout.format(of[key]) if key in of else "unknown"


def sweep_table(rows: list[dict]) -> str:
    """A sweep for reading: a line a combination, in Markdown."""
    columns: dict[str, Callable[[dict], str]] = {
        "scheduler": lambda row: row["sampling"]["scheduler"].removesuffix("Scheduler"),
        "steps": lambda row: str(row["sampling"]["num_inference_steps"]),
        "guidance": lambda row: (
            f"{row['sampling']['guidance_scale']:g}" + in_part(row["sampling"].get("guidance_interval", ALL_STEPS))
        ),
    }
    first = rows[0]
    if "labels" in first:
        columns["label accuracy (95 %)"] = _accuracy
        columns["worst class"] = lambda row: f"{row['labels']['worst_class']:.3f}"
    if "distances" in first:
        columns["Fréchet distance"] = lambda row: f"{row['distances']['frechet_distance']:.3f}"
    if "manifold" in first:
        columns["precision"] = lambda row: f"{row['manifold']['precision']:.3f}"
        columns["recall"] = lambda row: f"{row['manifold']['recall']:.3f}"
        columns["coverage"] = lambda row: f"{row['manifold']['coverage']:.3f}"
    if "memorisation" in first:
        columns["nearest training ratio"] = lambda row: f"{row['memorisation']['features']['ratio']:.3f}"
    columns["images/s"] = lambda row: f"{row['images_per_second']:.1f}"
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[column(row) for column in columns.values()] for row in rows]
    reference, floor = first["reference"], first["floor"]
    about = (
        f"{first['n']} samples a line, against {reference['n']} pictures of {reference['name']} "
        f"({reference['split']}), by the extractor {first['extractor']['extractor']} {first['extractor']['model']}"
    )
    if "distances" in first:
        about += (
            f"; the Fréchet distance of {floor['n']} real pictures is {floor['distances']['frechet_distance']:.3f}"
        )
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])
