"The measures that the project has set itself, and whether they are reached."

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from .table import Key, Measurements

OURS = ("ours", "cpu", "Siddon")
EXACT = ("ours", "cpu", "trilinear, exact")


def measures(
    results: Measurements,
) -> Iterator[tuple[str, str, float | None, str, bool | None]]:  # which, what, value, reach, whether it is reached
    "List the measures; a value is None where something needed was not measured."

    def faster(which: str, what: str, key: Key, than: Key, reach: float):
        value = results.times_as_fast(key, than)
        return which, what, value, f">= {reach:g}x", None if value is None else value >= reach

    def at_most(which: str, what: str, value: float | None, reach: float, unit: str = ""):
        return which, what, value, f"<= {reach:g}{unit}", None if value is None else value <= reach

    def over_forward(which: str, what: str, method: tuple[str, str, str], task: str, reach: float):
        return at_most(
            which,
            f"{method[2]}: {what} over own forward",
            results.times_as_fast((*method, "forward"), (*method, task)),
            reach,
            "x",
        )

    peers = {
        "0.6.1": ("diffdrr_061", "cpu", "Siddon, sorted crossings"),
        "nanodrr": ("nanodrr_017", "cpu", "trilinear, 500 samples"),
        "RTK Joseph": ("rtk", "cpu", "Joseph"),
        "plastimatch exact": ("plastimatch", "cpu", "exact"),
    }
    for which, peer, reach in (
        ("P1", "0.6.1", 150),
        ("P1", "nanodrr", 30),
        ("P2", "RTK Joseph", 1),
        ("P2", "plastimatch exact", 1),
    ):  # P2 aims for 2
        yield faster(
            which, f"Siddon forward, times as fast as {peer}", (*OURS, "forward"), (*peers[peer], "forward"), reach
        )
    yield faster(
        "P3",
        "Siddon forward + pose gradient, times as fast as 0.6.1",
        (*OURS, "pose_gradient"),
        (*peers["0.6.1"], "pose_gradient"),
        150,
    )
    for method in (OURS, EXACT):
        yield over_forward("P3", "forward + pose gradient", method, "pose_gradient", 2)
        yield over_forward("P4", "Jacobian image", method, "jacobian", 3)
        yield over_forward("P5", "volume gradient", method, "volume_gradient", 3)
        identity = results.checks.get((*method, "adjoint_identity"))
        yield at_most(
            "P5",
            f"{method[2]}: <Ax, y> against <x, A'y>, relative",
            float(identity.arrays["error"]) if identity else None,
            1e-5,
        )
        gradient = results.checks.get((*method, "pose_gradient"))
        yield at_most(
            "P6", f"{method[2]}: extra memory with pose gradient", gradient.bytes / 1e6 if gradient else None, 64, " MB"
        )
    large = results.extras.get("2048 x 2048, seconds")
    yield "P6", "Siddon: 2048 x 2048 with pose gradient in one call, s", large, "works", None if large is None else True
    if "2048 x 2048, bytes" in results.extras:
        yield (
            "P6",
            "Siddon: extra memory of that, MB (a picture is 17 MB)",
            results.extras["2048 x 2048, bytes"] / 1e6,
            "-",
            None,
        )
    yield at_most("P7", "Siddon: 8 poses in one call over 8 calls", results.extras.get("batch over one by one"), 1, "x")
    threads = results.extras.get("one thread over all")
    yield (
        "P7",
        "Siddon: one thread over all threads",
        threads,
        ">= 1.8x (2 threads)",
        None if threads is None else threads >= 1.8,
    )

    def fresh(name, less):
        return (
            results.extras[f"fresh process, {name}"] - results.extras[f"fresh process, {less}"]
            if "fresh process, render" in results.extras
            else None
        )

    yield at_most("P8", "first render in a fresh process, over torch's import", fresh("render", "torch"), 1, " s")
    yield at_most("P8", "import diffdrr, over Python's start", fresh("diffdrr", "python"), 0.1, " s")
    yield from on_gpu(results)


def on_gpu(
    results: Measurements,
) -> Iterator[tuple[str, str, float | None, str, bool | None]]:
    "List the measures on a GPU, where there is one."
    for method in ("Siddon", "trilinear, exact"):
        ours = ("ours", "cuda", method)
        if (*ours, "forward") not in results.checks:
            continue
        for peer in ("nanodrr_017", "flashdrr_060"):
            theirs = (peer, "cuda", "trilinear, 500 samples")
            for task in ("forward", "pose_gradient"):
                value = results.times_as_fast((*ours, task), (*theirs, task))

                def error(who):
                    return (
                        results.errors[(*who, "forward")][results.models[(*who, "forward")]]
                        if (*who, "forward") in results.errors
                        else None
                    )

                reached = None if value is None else value > 1 and error(ours) <= error(theirs)
                yield (
                    "P9",
                    f"{method}, {task.replace('_', ' ')}, times as fast as {peer} on the GPU",
                    value,
                    "> 1x at equal or smaller error",
                    reached,
                )
        touched = results.checks.get((*ours, "adjoint_identity"))
        seconds = results.seconds((*ours, "forward"))
        if touched and seconds and "bandwidth" in results.extras:
            fraction = 4 * float(touched.arrays["touched"]) / seconds / results.extras["bandwidth"]
            yield (
                "P9",
                f"{method}: each touched voxel read once, over the bandwidth of a copy",
                fraction,
                "the nearer to 1 the better",
                None,
            )


def frame(results: Measurements) -> pd.DataFrame:
    "Lay the measures out."
    verdict = {True: "reached", False: "**not reached**", None: "-"}
    rows = [
        (which, what, value, reach, "not measured" if value is None else verdict[ok])
        for which, what, value, reach, ok in measures(results)
    ]
    return pd.DataFrame(rows, columns=["", "measure", "value", "reach", "verdict"])
