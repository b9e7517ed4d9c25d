"""Register simulated X-rays of a CT from random starting poses: how often, how exactly, how fast, and whether failures
are noticed.

    python -m benchmarks.registration
    python -m benchmarks.registration --only frontal "lungs 1.6 %" --starts 20

The second command registers under conditions of practice, see `conditions.py`; the rest of this page is about the first.
The X-rays (`xrays.py`) are taken around the frontal view. Starts are twists about the isocentre: a rotation and a
translation, each with a normal distribution for each axis. Errors are mean target registration errors (mTRE) over a
grid of points in the middle of the CT, in all three dimensions. The same starts are given to the recipe of 0.6.1's
users (`recipe.py`), as it runs in 0.6.1 and in this repository; and that recipe is also run as its tutorial does,
from a pose far off towards a picture of the very model that is fitted, until the correlation is above 0.999.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchio import Subject
from tqdm import tqdm

from diffdrr.compare import rotation_error, target_registration_error, translation_error
from diffdrr.geometry import RigidTransform, convert, twist_to_matrix
from diffdrr.registration import register
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct, read

from . import conditions, machine, trust
from .peers import FOLDER, Unavailable, prepare
from .recipe import BLOCK, HEIGHT, Climb, Recipe, Start, climb
from .report import markdown_table
from .scene import CT
from .worker import Failure
from .xrays import Exposure, Patient, cached_xray, collimated_field

RESULTS = Path(__file__).parent / "results"
EULER = dict(parameterization="euler_angles", convention="ZXY")
SOURCE = (0.0, 850.0, 0.0)  # from the isocentre, in the frontal view, mm
VIEWS = (0.2, 15.0)  # standard deviations of each Euler angle (rad) and each translation (mm) of the true poses
SETS = {
    "P10": (10.0, 30.0),
    "hard": (20.0, 60.0),
}  # standard deviations of a start, degrees and mm about and along each axis
WITHIN, WRONG = 1.0, 2.0  # mTRE of a success; from which on a pose is a failure, mm
RATE, SECONDS = 95.0, 2.0  # what P10 asks for: successes in percent, median time
FAR = 50.0  # degrees that a start of the recipe's own check is off, in one Euler angle
PACKAGES = {"ours": "ours", "diffdrr_061": "0.6.1"}  # by the names of their environments


@dataclass(frozen=True)
class Case:
    "An X-ray, and where to start."

    seed: int
    xray: torch.Tensor  # (1, 1, H, W)
    mask: torch.Tensor  # (1, 1, H, W)
    true: RigidTransform  # (1)
    init: RigidTransform  # (1)


@dataclass(frozen=True)
class Outcome:
    "A registration, and how good it is."

    set: str  # a key of `SETS`
    who: str
    seed: int
    start: float  # mTRE of the starting pose, mm
    error: float  # mTRE afterwards, mm
    seconds: float
    iterations: int
    flagged: bool | None  # whether it was reported as failed; None for the recipe, which does not say
    reason: str | None = None


@dataclass(frozen=True)
class Check:
    "The recipe from a start that is far off."

    who: str
    start: str
    reached: bool
    iterations: int
    seconds: float
    degrees: float  # afterwards
    millimetres: float


@dataclass
class Measurements:
    "Everything that was measured."

    outcomes: list[Outcome] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # who does not take part, and why
    busy: float = 0.0  # cores that other programs kept busy during the registrations


def true_pose(
    seed: int,
) -> RigidTransform:  # (1)
    "Draw a pose around the frontal view."
    normal = np.random.default_rng((seed, 0)).standard_normal((2, 3))
    rotation, translation = VIEWS[0] * normal[0], np.array(SOURCE) + VIEWS[1] * normal[1]
    return convert(*(torch.tensor(x[None], dtype=torch.float32) for x in (rotation, translation)), **EULER)


def starting_pose(
    true: RigidTransform,  # (1)
    spread: tuple[float, float],  # standard deviations, degrees and mm
    seed: int,  # with the same seed, starts differ in how far they are off, not in the direction
) -> RigidTransform:  # (1)
    "Move the patient by a random twist about the isocentre."
    normal = np.random.default_rng((seed, 1)).standard_normal((2, 3))
    twist = np.concatenate([spread[1] * normal[0], np.deg2rad(spread[0]) * normal[1]])
    return true.compose(RigidTransform(twist_to_matrix(torch.tensor(twist[None], dtype=torch.float32))))


def middle_grid(
    subject: Subject,
    n: int = 5,  # points along each axis
) -> torch.Tensor:  # (1, n^3, 3) mm
    "Spread points evenly over the middle half of the CT's box."
    size = torch.tensor(subject.volume.spatial_shape)
    steps = torch.linspace(0.25, 0.75, n, dtype=torch.float64)
    voxels = torch.cartesian_prod(steps, steps, steps) * size - 0.5
    affine = torch.as_tensor(subject.volume.affine)
    return (voxels @ affine[:3, :3].T + affine[:3, 3])[None].float()


def take_case(
    patient: Patient,
    exposure: Exposure,
    spread: tuple[float, float],  # standard deviations of the start, degrees and mm
    seed: int,
    folder: Path,  # where X-rays are kept
) -> Case:
    "Take an X-ray, or read it, and draw a start."
    true = true_pose(seed)
    return Case(
        seed,
        cached_xray(patient, true, exposure, seed, folder),
        collimated_field(exposure),
        true,
        starting_pose(true, spread, seed),
    )


def attempt(
    method: Callable,  # (drr, xray, init, mask) -> an object with `pose`, `reason`, `iterations`; or a `ValueError` that says why it cannot
    drr: DRR,
    case: Case,
    points: torch.Tensor,  # (1, N, 3) mm
    name: str,  # of the set
) -> Outcome:
    "Register an X-ray. A start that is refused counts as a failure that was noticed."

    def error(pose):
        return target_registration_error(case.true, pose, points).item()

    begin = time.perf_counter()
    try:
        result = method(drr, case.xray, case.init, case.mask)
        seconds = time.perf_counter() - begin
        pose, reason, iterations = result.pose, result.reason, result.iterations
    except ValueError as refusal:
        seconds = time.perf_counter() - begin
        pose, reason, iterations = case.init, str(refusal), 0
    return Outcome(
        name, "register", case.seed, error(case.init), error(pose), seconds, iterations, reason is not None, reason
    )


def climbed(
    name: str,  # of the set
    package: str,  # a key of `PACKAGES`
    case: Case,
    found: Climb,
    points: torch.Tensor,  # (1, N, 3) mm
) -> Outcome:
    "Measure where the recipe led to."

    def error(pose):
        return target_registration_error(case.true, pose, points).item()

    pose = RigidTransform(torch.tensor([found.pose]))
    return Outcome(
        name,
        f"recipe, {PACKAGES[package]}",
        case.seed,
        error(case.init),
        error(pose),
        found.seconds,
        found.iterations,
        None,
    )


def far_starts() -> dict[str, Start]:
    "Turn the frontal view about each axis, to either side."

    def frontal(rotation):
        return convert(torch.tensor([rotation]), torch.tensor([SOURCE]), **EULER)

    starts = {}
    for axis, letter in enumerate("ZXY"):
        for sign in (1, -1):
            rotation = [0.0, 0.0, 0.0]
            rotation[axis] = sign * FAR * np.pi / 180
            starts[f"{sign * FAR:+g} degrees about {letter}"] = Start(frontal(rotation), frontal([0.0, 0.0, 0.0]))
    return starts


def check(
    package: str,  # a key of `PACKAGES`
    label: str,  # of the start
    start: Start,
    found: Climb,
) -> Check:
    "Measure how the recipe did on its own ground."
    pose = RigidTransform(torch.tensor([found.pose]))
    return Check(
        PACKAGES[package],
        label,
        found.reached,
        found.iterations,
        found.seconds,
        rotation_error(start.true, pose, degrees=True).item(),
        translation_error(start.true, pose).item(),
    )


def summarize(
    outcomes: list[Outcome],
) -> pd.DataFrame:  # a row for each set and method
    "Lay errors, times and verdicts out."
    table = pd.DataFrame([asdict(outcome) for outcome in outcomes])
    rows = []
    for (name, who), group in table.groupby(["set", "who"], sort=False):
        wrong, judged = group["error"] >= WRONG, group["flagged"].notna().all()
        flagged = group["flagged"].astype(bool)

        def count(condition):
            return f"{condition.sum()}" if judged else "-"

        rows.append(
            {
                "set": name,
                "who": who,
                "runs": len(group),
                "start, mm": group["start"].median(),
                f"mTRE < {WITHIN:g} mm, %": 100.0 * (group["error"] < WITHIN).mean(),
                f"mTRE < {WRONG:g} mm, %": 100.0 * (~wrong).mean(),
                "mTRE, mm": group["error"].median(),
                "mTRE, 90th percentile": group["error"].quantile(0.9),
                "seconds": group["seconds"].median(),
                "seconds, 90th percentile": group["seconds"].quantile(0.9),
                "iterations": float(group["iterations"].median()),
                "wrong and reported": count(wrong & flagged),
                "wrong, not reported": count(wrong & ~flagged),
                "right, but reported": count(~wrong & flagged),
            }
        )
    return pd.DataFrame(rows)


def summarize_checks(
    checks: list[Check],
) -> pd.DataFrame:  # a row for each package
    "Lay out what the recipe needs, over the starts from which every package arrived."
    table = pd.DataFrame([asdict(one) for one in checks])
    arrived = table.groupby("start")["reached"].transform("all")
    rows = []
    for who, group in table.groupby("who", sort=False):
        both = group[arrived[group.index]]
        medians = {
            title: float(both[column].median())
            for title, column in (
                ("iterations", "iterations"),
                ("seconds", "seconds"),
                ("rotation, degrees", "degrees"),
                ("translation, mm", "millimetres"),
            )
        }
        rows.append(
            {"who": who, "reached from": f"{group['reached'].sum()} of {len(group)}", "compared": len(both), **medians}
        )
    return pd.DataFrame(rows)


def verdicts(
    outcomes: list[Outcome],
    checks: list[Check],
) -> pd.DataFrame:
    "Say whether the measures that the project has set itself are reached."
    rows = []
    p10 = [o for o in outcomes if (o.set, o.who) == ("P10", "register")]
    if p10:
        rate = 100.0 * sum(o.error < WITHIN for o in p10) / len(p10)
        seconds = statistics.median(o.seconds for o in p10)
        rows.append(("P10", f"mTRE < {WITHIN:g} mm, % of {len(p10)} starts", rate, f">= {RATE:g} %", rate >= RATE))
        rows.append(("P10", "median time, s", seconds, f"<= {SECONDS:g} s (2 cores)", seconds <= SECONDS))
    reached = {(c.who, c.start): c for c in checks if c.reached}
    pairs = [
        (reached["ours", start], theirs)
        for (who, start), theirs in reached.items()
        if who != "ours" and ("ours", start) in reached
    ]
    if pairs:

        def part(what):
            return sum(getattr(ours, what) for ours, _ in pairs) / sum(getattr(theirs, what) for _, theirs in pairs)

        rows.append(
            (
                "recipe",
                f"iterations over those of 0.6.1, {len(pairs)} starts together",
                part("iterations"),
                "<= 1x",
                part("iterations") <= 1,
            )
        )
        rows.append(("recipe", "time over that of 0.6.1", part("seconds"), "< 1x", part("seconds") < 1))

    def verdict(ok):
        return "reached" if ok else "**not reached**"

    return pd.DataFrame(
        [(which, what, value, reach, verdict(ok)) for which, what, value, reach, ok in rows],
        columns=["", "measure", "value", "reach", "verdict"],
    )


def load_subject(
    path: Path | None,  # of a CT; the built-in example without one
) -> Subject:
    "Read the CT."
    return load_example_ct() if path is None else read(path)


def others_busy() -> float:  # seconds
    "Return for how long the cores have worked, except for this process and its children."
    return machine.busy_seconds() - machine.process_seconds(os.getpid())


def measure_driver(
    subject: Subject,
    patient: Patient,
    exposure: Exposure,
    method: Callable,  # (drr, xray, init, mask) -> result
    chosen: argparse.Namespace,
) -> tuple[list[Outcome], float]:  # and how many cores other programs kept busy meanwhile
    "Register the X-rays of all sets."
    points, drr = middle_grid(subject), exposure.camera(subject)

    def take(name, seed):
        return take_case(patient, exposure, SETS[name], seed, chosen.cache)

    for seed in tqdm(range(chosen.seeds), desc="X-rays"):
        take(chosen.sets[0], seed)
    attempt(method, drr, take(chosen.sets[0], 0), points, "")  # compiles and loads code
    start, before = time.perf_counter(), others_busy()
    todo = [(name, seed) for name in chosen.sets for seed in range(chosen.seeds)]
    outcomes = [attempt(method, drr, take(name, seed), points, name) for name, seed in tqdm(todo, desc="register")]
    return outcomes, (others_busy() - before) / (time.perf_counter() - start)


def measure_recipe(
    package: str,  # a key of `PACKAGES`
    subject: Subject,
    patient: Patient,
    exposure: Exposure,
    chosen: argparse.Namespace,
) -> tuple[list[Outcome], list[Check]]:
    """Give the starts to the recipe, then those of its own check.

    Raises `Unavailable` or a `Failure` where it does not run."""
    python, points = prepare(package, chosen.environments), middle_grid(subject)
    given = [
        (name, take_case(patient, exposure, SETS[name], seed, chosen.cache))
        for name in chosen.sets
        for seed in range(chosen.recipe_seeds)
    ]
    far = far_starts()
    starts = [Start(case.init, case.true, case.xray, case.mask) for _, case in given] + list(far.values())
    geometry = (exposure.sdd, exposure.height * exposure.delx)
    steps = climb(package, python, subject, starts, Recipe(limit=chosen.limit), *geometry, chosen.threads)
    found = list(tqdm(steps, total=len(starts), desc=f"recipe, {PACKAGES[package]}"))
    outcomes = [climbed(name, package, case, one, points) for (name, case), one in zip(given, found)]
    return outcomes, [
        check(package, label, start, one) for (label, start), one in zip(far.items(), found[len(given) :])
    ]


def measure(
    chosen: argparse.Namespace,
    method: Callable,  # (drr, xray, init, mask) -> result
) -> Measurements:
    "Measure everything."
    subject, exposure = load_subject(chosen.ct), Exposure()
    patient = Patient.of(subject)
    outcomes, busy = measure_driver(subject, patient, exposure, method, chosen)
    results = Measurements(outcomes, busy=busy)
    for package in PACKAGES if chosen.recipe_seeds else ():
        try:
            outcomes, checks = measure_recipe(package, subject, patient, exposure, chosen)
            results.outcomes += outcomes
            results.checks += checks
        except (Unavailable, Failure) as reason:
            results.missing[f"recipe, {PACKAGES[package]}"] = str(reason)
    return results


def as_markdown(
    chosen: argparse.Namespace,
    about: dict,  # the session
    results: Measurements,
) -> str:
    "Write the report that people read."
    exposure, recipe = Exposure(), Recipe(limit=chosen.limit)
    spreads = "; ".join(f"{name}: N(0, {SETS[name][0]:g} degrees) x N(0, {SETS[name][1]:g} mm)" for name in chosen.sets)
    seeds = range(chosen.recipe_seeds)
    contents = [
        f"# Registration on {about['cpu']}, {about['cores']} cores",
        f"{machine.in_words(about)} Other programs kept {results.busy:.2f} cores busy meanwhile.",
        f"X-rays of {chosen.ct.name if chosen.ct else 'the built-in example'}, {exposure.height} x {exposure.height} "
        f"pixels of {exposure.delx:g} mm, simulated with {exposure.oversampling} x {exposure.oversampling} rays for "
        "each pixel, "
        f"{exposure.photons_per_pixel:.0f} photons for each pixel without a patient, scatter of {exposure.scatter:g} "
        f"of the primary radiation, an uneven gain ({exposure.gain:.0%}), a steel rod of {exposure.rod:g} mm, "
        f"and a round field of {2 * exposure.aperture:g} mm with its mask. Starts: {spreads}. The mTRE is over a grid "
        "of points in the middle half of the CT; "
        f"a pose is wrong from {WRONG:g} mm on.",
        "## The driver\n\n" + markdown_table(summarize([o for o in results.outcomes if o.who == "register"])),
    ]
    if results.checks:
        shared = [o for o in results.outcomes if o.seed in seeds]
        contents += [
            f"## The same starts with the recipe of 0.6.1\n\nThe first {len(seeds)} starts of each set. Recipe: "
            f"`Registration` with `NormalizedCrossCorrelation2d` under the mask and Adam, {recipe.lr_rotation:g} rad "
            f"and {recipe.lr_translation:g} mm for each step, "
            f"at most {recipe.iterations} steps and {recipe.limit:g} s, the best pose; blocks of "
            f"{' x '.join(map(str, BLOCK))} voxels, {HEIGHT} x {HEIGHT} pixels.\n\n"
            + markdown_table(summarize(shared)),
            f"## The recipe as users know it\n\nFrom {FAR:g} degrees off the frontal view, in one Euler angle, to a "
            f"correlation of {recipe.enough:g} with a picture of the model itself. Medians over the starts from which "
            "all arrived; single starts differ by a few iterations either way, because Adam's long steps amplify "
            "rounding.\n\n" + markdown_table(summarize_checks(results.checks)),
        ]
    contents.append("## Reached?\n\n" + markdown_table(verdicts(results.outcomes, results.checks)))
    if results.missing:
        contents.append("Left out:\n\n" + "\n".join(f"- {who}: {why}" for who, why in results.missing.items()))
    return "\n\n".join(contents) + "\n"


def as_json(
    chosen: argparse.Namespace,
    about: dict,  # the session
    results: Measurements,
) -> str:
    "Write the report that programs read, with every registration."
    return json.dumps(
        {
            "machine": about,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "ct": chosen.ct.name if chosen.ct else "example",
            "exposure": asdict(Exposure()),
            "recipe": asdict(Recipe(limit=chosen.limit)),
            "sets": {name: SETS[name] for name in chosen.sets},
            **asdict(results),
        },
        indent=1,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.registration", description="Register simulated X-rays from random starting poses."
    )
    parser.add_argument("--seeds", type=int, default=100, help="X-rays, and starts in each set (default: %(default)s)")
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=list(SETS), help="how far the starts are off (default: all)"
    )
    parser.add_argument(
        "--recipe-seeds",
        type=int,
        default=5,
        help="starts of each set that are given to the recipe, too; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds for each start of the recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--ct",
        type=Path,
        default=CT if CT.exists() else None,
        help=(
            "of the patient (default: the real CT beside the project where there is one, otherwise the built-in "
            "example)"
        ),
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument(
        "--environments", type=Path, default=FOLDER, help="where the other package is installed (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=FOLDER / "xrays", help="where X-rays are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the report is written (default: %(default)s)"
    )
    parser.add_argument("--name", help="of this machine, in the names of the files (default: made from its processor)")
    practical = parser.add_argument_group("conditions of practice")
    practical.add_argument(
        "--only", nargs="+", choices=conditions.CONDITIONS, metavar="CONDITION",
        help="register under these instead: " + "; ".join(conditions.CONDITIONS).replace("%", "%%"),
    )  # fmt: skip
    practical.add_argument(
        "--starts",
        type=int,
        default=100,
        help="X-rays under each; 0 to report what the log holds (default: %(default)s)",
    )
    practical.add_argument("--first", type=int, default=0, help="seed of the first (default: %(default)s)")
    practical.add_argument(
        "--log",
        type=Path,
        help="a file to which each registration is appended, as a line of JSON; what it holds is not done again, and "
        "the report is of all of it",
    )
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.recipe_seeds <= chosen.seeds or chosen.seeds < 1:
        parser.error(
            f"--seeds must be at least 1, and --recipe-seeds from 0 to as many, not {chosen.seeds} and "
            f"{chosen.recipe_seeds}"
        )
    if chosen.only and chosen.ct not in (None, CT):
        parser.error(f"--ct {chosen.ct} is not for --only, whose X-rays are of {CT.name}; leave out one of the two")
    logged = chosen.log is not None and chosen.log.exists()
    if chosen.starts < (0 if logged else 1):
        parser.error(f"--starts must be at least 1, or 0 for the report of a --log that exists, not {chosen.starts}")
    return chosen


def practice(
    method: Callable,  # see `conditions.run`
    chosen: argparse.Namespace,
) -> pd.DataFrame:  # a row for each registration
    "Register under conditions of practice, print the report and store it."
    runs = conditions.collect(method, chosen)
    text = trust.as_markdown(runs)
    print("\n" + text)
    stem = f"{chosen.name or machine.slug(machine.describe())}-conditions"
    machine.write_report(chosen.results, stem, {".md": text, ".csv": runs.to_csv(index=False)})
    return runs


def main(
    arguments: list[str] | None = None,  # of the command line
) -> Measurements | pd.DataFrame:  # a table for conditions of practice
    "Measure, print the report and store it."
    chosen = parse(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        return practice(lambda *given, **options: register(*given, **options, verbose=False), chosen)
    about = machine.session(chosen.threads)
    results = measure(chosen, lambda *given: register(*given, verbose=False))
    text = as_markdown(chosen, about, results)
    print("\n" + text)
    stem = f"{chosen.name or machine.slug(about)}-registration"
    machine.write_report(chosen.results, stem, {".md": text, ".json": as_json(chosen, about, results)})
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the recipe's program goes, too
    main()
