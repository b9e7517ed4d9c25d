"The tables as text and as data."

from __future__ import annotations

import datetime
import json
from dataclasses import asdict

import pandas as pd

from .table import Measurements, Options


def number(value: object) -> str:
    "Write a number with three digits."
    if not isinstance(value, float):
        return str(value)
    if value != value:
        return "-"
    if abs(value) < 0.01 and value:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_table(table: pd.DataFrame) -> str:
    "Write a table in Markdown."
    lines = [list(table.columns), ["---:" if pd.api.types.is_float_dtype(t) else "---" for t in table.dtypes]]
    lines += [[number(value).replace("|", "/") for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(
    options: Options, machine: dict, results: Measurements, table: pd.DataFrame, measures: pd.DataFrame
) -> str:
    "Write the report that people read."
    camera = options.camera
    contents = [
        f"# {machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else ""),
        f"{datetime.date.today()}, commit {machine['commit']}, {options.threads} threads, {machine['memory_gb']} GB, "
        f"{machine['system']}. "
        f"One picture of {camera.height} x {camera.height} pixels of "
        f"{options.ct.name if options.ct else 'the built-in example'}, "
        f"`sdd={camera.sdd:g}`, `delx={camera.delx:g}`, rotation {camera.rotation[0]}, translation "
        f"{camera.translation[0]}. "
        f"Other programs kept {results.extras['cores used by others']:.2f} cores busy meanwhile. "
        "Medians over rounds in which everyone has a turn; the README of the benchmarks says how to read them.",
        markdown_table(table),
        markdown_table(measures),
    ]
    if results.missing:
        contents.append("Left out:\n\n" + "\n".join(f"- {who}: {why}" for who, why in results.missing.items()))
    contents.append(
        "Versions: "
        + "; ".join(
            f"{who}: " + ", ".join(f"{k} {v}" for k, v in what.items()) for who, what in results.versions.items()
        )
        + "."
    )
    return "\n\n".join(contents) + "\n"


def as_json(options: Options, machine: dict, results: Measurements, table: pd.DataFrame, measures: pd.DataFrame) -> str:
    "Write the report that programs read, with every round."

    def records(data):
        return json.loads(data.to_json(orient="records", double_precision=15))

    return json.dumps(
        {
            "machine": machine,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "ct": options.ct.name if options.ct else "example",
            "threads": options.threads,
            "camera": asdict(options.camera),
            "versions": results.versions,
            "missing": results.missing,
            "table": records(table),
            "measures": records(measures),
            "rounds": [
                {"contestant": c, "device": d, "method": m, "task": t, "seconds": list(r.values())}
                for (c, d, m, t), r in results.rounds.items()
            ],
            "extras": results.extras,
        },
        indent=1,
    )
