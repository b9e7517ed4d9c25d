"""A DRR, a pose and a state dict that were written before the package had rooms are read, and render the same
picture."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from diffdrr.geometry import RigidTransform
from diffdrr.rendering import DRR

WRITTEN = Path(__file__).parent / "fixtures" / "before_the_rooms.pkl"


@pytest.fixture
def before() -> dict:
    return pickle.loads(WRITTEN.read_bytes())


def test_a_drr_renders_the_picture_that_it_rendered(before: dict):
    drr, pose = before["drr"], before["pose"]
    assert isinstance(drr, DRR) and isinstance(pose, RigidTransform)
    torch.testing.assert_close(drr(pose), before["picture"])
    assert drr.labels.dtype == torch.uint8 and drr.mask.dtype == torch.float32
    torch.testing.assert_close(drr(pose, mask_to_channels=True).sum(dim=1, keepdim=True), before["picture"])
    assert drr.camera.height == drr.detector.height and drr.grid.shape == tuple(drr.density.shape)


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_state_dict_is_loaded(before: dict, asked_for: bool):
    "Also where the label map has become one of floats, and where the labels that come do not fit those that were."
    drr, pose, state = before["drr"], before["pose"], dict(before["state"])
    if asked_for:
        assert drr.mask is not None
    drr.density = torch.zeros_like(drr.density)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    drr.load_state_dict(torch.load(file))
    torch.testing.assert_close(drr(pose), before["picture"])
    state["mask"] = state["mask"].float() + 298  # as 0.6.1 writes them, more than a byte holds
    drr.load_state_dict(state)
    assert drr.labels.min() == 298 and drr(pose, mask_to_channels=True).shape[1] == int(state["mask"].max()) + 1


def test_what_is_written_now_is_read_again(before: dict):
    drr, pose = before["drr"], before["pose"]
    drr.mask[0] = 2  # in place
    expected = drr(pose, mask_to_channels=True)
    again = pickle.loads(pickle.dumps(drr))
    torch.testing.assert_close(again(pose, mask_to_channels=True), expected)
    torch.testing.assert_close(again(pose).sum(), before["picture"].sum())


def test_masks_are_sampled_as_by_programs_of_061(before: dict):
    drr = before["drr"]
    found = torch.nn.functional.grid_sample(
        drr.mask[None, None], torch.zeros(1, 1, 1, 1, 3), mode="nearest", align_corners=False
    )
    assert found.dtype == torch.float32
    drr.mask = drr.mask.to(torch.uint8)
    assert drr.mask.dtype == torch.float32
    drr.mask = None
    assert drr.mask is None and drr(before["pose"]).shape == before["picture"].shape
