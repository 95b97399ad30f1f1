"""What an evaluation says: as JSON, as a table on the screen and in a card."""

import json
import os
from pathlib import Path


def write_json(path: Path, report):
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def as_table(report: dict, markdown: bool = False) -> str:
    """The report for reading: a line a measure, the pictures' figure beside that of real ones."""
    floor, rows = report["floor"], []
    if "labels" in report:
        ours, theirs = report["labels"], floor.get("labels")
        low, high = ours["accuracy_95"]
        real = "" if theirs is None else f"{theirs['accuracy']:.4f}"
        rows.append(("label accuracy (95 %)", f"{ours['accuracy']:.4f} ({low:.4f}–{high:.4f})", real))
        worst = min((share, name) for name, share in ours["per_class"].items() if share is not None)
        real = "" if theirs is None else f"{theirs['worst_class']:.4f}"
        rows.append(("worst class", f"{worst[0]:.4f} ({worst[1]})", real))
        rows.append(("mean confidence", f"{ours['confidence']:.4f}", f"{theirs['confidence']:.4f}" if theirs else ""))
    if "distances" in report:
        ours, theirs = report["distances"], floor["distances"]
        rows.append(("Fréchet distance", *(f"{side['frechet_distance']:.4f}" for side in (ours, theirs))))
        spread = (f"{side['kernel_distance']:.2e} ± {side['kernel_distance_sd']:.0e}" for side in (ours, theirs))
        rows.append(("kernel distance", *spread))
    if "manifold" in report:
        for name in ("precision", "recall", "density", "coverage"):
            rows.append((name, *(f"{side['manifold'][name]:.4f}" for side in (report, floor))))
    for space, scores in report.get("memorisation", {}).items():
        rows.append((f"nearest training picture, ratio ({space})", f"{scores['ratio']:.3f}", "1"))
        rows.append((f"share of copies ({space})", f"{scores['share_of_copies']:.4f}", "0.01"))
    if "cas" in report:
        rows.append(("CAS", f"{report['cas']['generated']:.4f}", f"{report['cas']['real']:.4f}"))
    extractor, reference = report["extractor"], report["reference"]
    judged = f", test accuracy {extractor['test_accuracy']:.4f}" if extractor.get("test_accuracy") else ""
    pretext = ", which learned rotations" if extractor.get("pretext") == "rotation" else ""
    sampling = report["sampling"]
    drawn = "pictures"
    if sampling is not None:
        drawn = "samples ({scheduler}, {num_inference_steps} steps, guidance {guidance_scale})".format(**sampling)
    about = (
        f"{report['n']} {drawn} against {reference['n']} pictures of {reference['name']} ({reference['split']}); "
        f"features of {extractor['extractor']} {extractor['model']}{judged}{pretext}; real column: {floor['n']} "
        f"pictures ({floor['of']})."
    )
    if markdown:
        lines = [f"| {name} | {ours} | {real} |" for name, ours, real in rows]
        return "\n".join([about, "", "| | generated | real |", "|---|---|---|", *lines])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([about, *lines])
