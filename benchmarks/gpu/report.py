"The report: as text, and as data."

from __future__ import annotations

import json
import sys
import time

import torch

COLUMNS = {  # of the table: heading, and how a value is written
    "method": ("method", str),
    "bits": ("bits", str),
    "task": ("task", str),
    "view": ("view", str),
    "size": ("pixels", str),
    "batch": ("pictures", str),
    "kernel": ("kernel, us", "{:.0f}".format),
    "predicted": ("predicted, us", "{:.0f}".format),
    "limit": ("predicted limit", str),
    "ratio": ("kernel over predicted", "{:.2f}".format),
    "call": ("call, us", "{:.0f}".format),
    "captured": ("call captured, us", "{:.0f}".format),
    "bandwidth": ("of the bandwidth", "{:.0%}".format),
    "error": ("error", "{:.1e}".format),
    "fault": ("fault", str),
}


def table(rows: list[dict], columns: dict | None = None) -> str:
    "Write rows in Markdown, without pandas, which the image of a GPU may lack; what is not known is left empty."
    columns = columns or {name: (name, str) for row in rows for name in row}
    lines = [[heading for heading, _ in columns.values()], ["---"] * len(columns)]
    for row in rows:
        values = ((row.get(name), write) for name, (_, write) in columns.items())
        lines.append(["" if value is None else write(value).replace("|", "/") for value, write in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readable(row: dict) -> dict:
    "Add what follows from others."
    ratio = row["kernel"] / row["predicted"] if row["kernel"] and row["predicted"] else None
    return row | dict(size=f"{row['height']} x {row['width']}", ratio=ratio)


def versions() -> dict[str, str]:
    import triton

    return dict(python=sys.version.split()[0], torch=torch.__version__, triton=triton.__version__)


def as_markdown(found: dict) -> str:
    "Write the report that people read."
    failed = [check["check"] for check in found["checks"] if check["outcome"] == "FAILED"]
    parts = [
        f"# {found['machine']['gpu'] or 'Rehearsal without a card'}",
        f"{time.strftime('%Y-%m-%d')}, commit {found['machine']['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + f", {found['seconds']:.0f} s. `python -m benchmarks.gpu`.",
        "Checks that failed: " + (", ".join(failed) or "none") + ".",
        table(found["checks"], {name: (name, str) for name in ("check", "what", "outcome", "text")}),
    ]
    if found["rows"]:
        parts.append(
            "The kernel: a captured graph, replayed without pause. A call: from the pose on, launches included, "
            "and the same by `DRR.capture`. "
            "Predicted: the kernel by `benchmarks/gpu/model.py`, warm. "
            "Error: relative, against the reference in float64."
        )
        parts.append(table([readable(row) for row in found["rows"]], COLUMNS))
    if found["left_out"]:
        parts.append(f"There was no time for {found['left_out']} rows.")
    if found["peers"]:
        parts.append(table(found["peers"]))
    if found["missing"]:
        parts.append("Others: " + "; ".join(f"{who}: {why}" for who, why in found["missing"].items()) + ".")
    return "\n\n".join(parts) + "\n"


def as_json(found: dict) -> str:
    "Write the report that programs read."
    return json.dumps(found, indent=1)
