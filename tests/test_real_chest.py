"""The real chest CT, where it is at hand: next to the project, in ../shared/data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from diffdrr.geometry import convert
from diffdrr.rendering import DRR
from diffdrr.volumes import read

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "chest_ct.nii.gz").exists(), reason=f"the real chest CT is not in {DATA}")


@pytest.fixture(scope="module")
def subject():
    return read(DATA / "chest_ct.nii.gz", DATA / "chest_labels.nii.gz", resample_target=(2.8, 2.8, 5.0))


@pytest.fixture(scope="module")
def frontal():
    return convert(
        torch.zeros(1, 3), torch.tensor([[0.0, 850.0, 0.0]]), parameterization="euler_angles", convention="ZXY"
    )


def test_program_of_the_readme(subject, frontal):
    drr = DRR(subject, sdd=1020.0, height=60, delx=6.5)
    img = drr(torch.zeros(1, 3), torch.tensor([[0.0, 850.0, 0.0]]), parameterization="euler_angles", convention="ZXY")
    assert img.shape == (1, 1, 60, 60) and img.isfinite().all() and img.max() > 20
    assert torch.equal(img, drr(frontal))
    lungs, abdomen = img[0, 0, 15:30].mean(), img[0, 0, 40:55].mean()
    assert abdomen > 1.2 * lungs  # air above, organs below


def test_heart_and_liver_are_on_their_sides(subject, frontal):
    "On a radiograph the patient's left, with the heart, is on the right of the picture; the liver is on the left."
    drr = DRR(subject, sdd=1020.0, height=60, delx=6.5)
    channels = drr(frontal, mask_to_channels=True)[0]
    ids = pd.read_csv(DATA / "chest_structures.csv").set_index("structure").id
    columns = torch.arange(60) + 0.5

    def centre(name: str) -> torch.Tensor:  # () column
        return (channels[ids[name]].sum(dim=0) * columns).sum() / channels[ids[name]].sum()

    assert centre("liver") < 30 < centre("heart")
    assert torch.allclose(channels.sum(dim=0), drr(frontal)[0, 0], atol=1e-3 * channels.sum(dim=0).max().item())


@pytest.mark.slow
def test_structures_are_rendered_alone(frontal):
    ids = pd.read_csv(DATA / "chest_structures.csv").set_index("structure").id
    spine = read(
        DATA / "chest_ct.nii.gz",
        DATA / "chest_labels.nii.gz",
        labels=[int(ids[f"vertebrae_T{i}"]) for i in range(4, 10)],
        resample_target=(2.8, 2.8, 5.0),
    )
    img = DRR(spine, sdd=1020.0, height=60, delx=6.5)(frontal)[0, 0]
    assert img[:, 22:38].sum() > 0.99 * img.sum()
