"""A Monte Carlo simulation of photons in a slab of water, to compare the convolution model of scatter with.

A thin beam meets a slab that is infinitely wide. Photons are absorbed (photoelectric effect) or scattered by free
electrons (Klein and Nishina, 1929); coherent scattering, which hardly turns photons of these energies, counts as no
event. By reciprocity the scatter that a thin beam spreads over a square is the scatter that a beam of that square
brings to its middle.
"""

from __future__ import annotations

import numpy as np
import torch
import xraydb

from diffdrr.physics import Tube, csi_response, tube_spectrum

ELECTRON = 510.999  # rest energy, keV
GRID = np.arange(5.0, 151.0)  # keV


def coefficient(kind: str) -> np.ndarray:
    "Tabulate the attenuation of water by one process, 1/cm."
    return 0.111894 * xraydb.mu_elam("H", 1000 * GRID, kind=kind) + 0.888106 * xraydb.mu_elam(
        "O", 1000 * GRID, kind=kind
    )


def compton_cosines(energies: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Draw cosines of scattering angles by rejection."
    cosines, todo = np.empty(len(energies)), np.arange(len(energies))
    while len(todo):
        cosine = rng.uniform(-1, 1, len(todo))
        ratio = 1 / (1 + energies[todo] / ELECTRON * (1 - cosine))
        accepted = rng.uniform(0, 2, len(todo)) < ratio**2 * (ratio + 1 / ratio - 1 + cosine**2)
        cosines[todo[accepted]] = cosine[accepted]
        todo = todo[~accepted]
    return cosines


def turn(directions: np.ndarray, cosines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Turn unit vectors by given angles, all around at random."
    helper = np.where(np.abs(directions[:, :1]) < 0.5, [[1.0, 0, 0]], [[0.0, 1, 0]])
    first = np.cross(directions, helper)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(directions, first)
    around, sines = rng.uniform(0, 2 * np.pi, len(cosines)), np.sqrt(1 - cosines**2)
    return cosines[:, None] * directions + sines[:, None] * (
        np.cos(around)[:, None] * first + np.sin(around)[:, None] * second
    )


def scatter_to_primary(
    thickness: float,  # of the slab, cm
    sides: list[float],  # of square fields on the detector, cm
    kvp: float = 80.0,  # behind 2.5 mm of aluminium
    gap: float = 10.0,  # between slab and detector, cm
    photons: int = 400_000,
    seed: int = 0,
) -> list[float]:  # in the middle of each field
    "Simulate the ratio of scattered to primary signal."
    rng = np.random.default_rng(seed)
    absorbed, scattered = coefficient("photo"), coefficient("incoh")
    response = csi_response(torch.as_tensor(GRID)).numpy()

    def signal(energies: np.ndarray) -> np.ndarray:
        return np.interp(energies, GRID, response)

    energies, fluence = tube_spectrum(Tube(kvp, {"aluminium": 2.5}))
    energy = rng.choice(energies.numpy(), photons, p=(fluence / fluence.sum()).numpy())
    primary = (signal(energy) * np.exp(-thickness * np.interp(energy, GRID, absorbed + scattered))).sum()
    position, direction, events = np.zeros((photons, 3)), np.tile([0.0, 0.0, 1.0], (photons, 1)), np.zeros(photons, int)
    sums = np.zeros(len(sides))
    while len(energy):
        free_path = rng.exponential(1 / np.interp(energy, GRID, absorbed + scattered))
        position = position + free_path[:, None] * direction
        depth = position[:, 2]
        out = (depth > thickness) & (events > 0)
        on_detector = (
            position[out, :2] + direction[out, :2] * ((thickness + gap - depth[out]) / direction[out, 2])[:, None]
        )
        sums += [signal(energy[out])[(np.abs(on_detector) < side / 2).all(axis=1)].sum() for side in sides]
        stays = (
            (depth > 0)
            & (depth < thickness)
            & (rng.uniform(size=len(energy)) < np.interp(energy, GRID, scattered / (absorbed + scattered)))
        )
        position, direction, energy, events = position[stays], direction[stays], energy[stays], events[stays] + 1
        cosines = compton_cosines(energy, rng)
        direction = turn(direction, cosines, rng)
        energy = energy / (1 + energy / ELECTRON * (1 - cosines))
        hard = energy > GRID[0]
        position, direction, energy, events = position[hard], direction[hard], energy[hard], events[hard]
    return (sums / primary).tolist()
