"""Bodies placed by hand: what a move does in every view, what can be undone, and the page in a browser."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffdrr.bodies import MeshBody, Scene, VoxelBody, ball, screw
from diffdrr.geometry import Camera, Detector, RigidTransform, convert, orientation_matrix, pose_from_opencv
from diffdrr.show import place_bodies
from diffdrr.show.placer import centre_of, move, outlines
from diffdrr.volumes import Grid
from diffdrr.xrays import XRay


def calibrated(angle: float, reverse_x_axis: bool = True) -> XRay:
    "A view around z from a camera of OpenCV, with a principal point off the middle and pixels that are not square."
    turn = convert(torch.tensor([[0.1, angle, -0.2]]), torch.zeros(1, 3), parameterization="axis_angle")
    extrinsic = turn.matrix.clone()
    extrinsic[0, :3, 3] = torch.tensor([10.0, -5.0, 800.0])
    pose = pose_from_opencv(extrinsic, torch.eye(4))
    camera = Camera(1000.0, 90, 120, 2.0, 1.9, x0=11.0, y0=-6.0, reverse_x_axis=reverse_x_axis)
    blank = torch.zeros(1, 1, 90, 120)
    return XRay(blank, blank + 1, camera, pose=pose)


def project(xray: XRay, point: torch.Tensor) -> torch.Tensor:
    return Detector.from_camera(xray.camera, orientation_matrix(None)).project(xray.pose, point[None, None])[0, 0]


BODIES = {"pin": MeshBody(screw(40.0, 3.0, 0.9, 3.0)), "bead": MeshBody(ball(6.0))}
XRAYS = [calibrated(0.3), calibrated(-1.1)]
PLACES = {
    name: convert(torch.tensor([[0.4, 0.2, -1.0]]), torch.tensor([at]), parameterization="axis_angle")
    for name, at in {"pin": (4.0, 8.0, -3.0), "bead": (-12.0, 5.0, 9.0)}.items()
}


@pytest.mark.parametrize("xray", [*XRAYS, calibrated(2.0, reverse_x_axis=False)])
def test_a_body_moves_as_the_picture_says(xray: XRay):
    body, pose = BODIES["pin"], PLACES["pin"]
    before = project(xray, centre_of(body, pose))
    moved = [project(xray, centre_of(body, move(body, pose, xray, 8 * np.eye(3)[i], (3.0, 40, -9)))) for i in range(3)]
    right, down, away = (after - before for after in moved)
    assert right[0] > 4 and abs(right[1]) < 1e-3 and down[1] > 4 and abs(down[0]) < 1e-3
    middle = torch.tensor([60 + 11 / 2, 45 - 6 / 1.9]) if xray.camera.reverse_x_axis else None
    if middle is not None:  # away from the source is towards the principal point
        assert (away / (middle - before)).std() < 1e-2 and (away / (middle - before) > 0).all()


def test_a_turn_keeps_the_middle_and_is_clockwise():
    body, pose, xray = BODIES["pin"], PLACES["pin"], XRAYS[0]
    turned = move(body, pose, xray, (0.0, 0, 0), (0.0, 0, 10))
    torch.testing.assert_close(centre_of(body, turned), centre_of(body, pose), atol=1e-4, rtol=0)
    tip = torch.tensor([[[0.0, 0, 20]]])
    a, b = (project(xray, p(tip)[0, 0]) - project(xray, centre_of(body, p)) for p in (pose, turned))
    assert a[0] * b[1] - a[1] * b[0] > 0  # x to the right, y down


def test_outlines_are_those_of_the_mask():
    "Of a bone made of voxels, too, and of one that is cut off by the border."
    density = torch.zeros(12, 12, 12)
    density[3:9, 4:8, 2:10] = 0.02
    affine = torch.diag(torch.tensor([3.0, 3, 3, 1], dtype=torch.float64))
    bone = VoxelBody(density, Grid((12, 12, 12), affine))
    for body in (*BODIES.values(), bone):
        for xray in (XRAYS[0], XRAYS[0].crop(left=62)):
            mask = Scene({"it": body}, xray.camera, None).masks(xray.pose, {"it": PLACES["bead"]})[0, 0].numpy()
            area = sum(
                0.5 * abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
                for x, y in (line.T for line in outlines(body, PLACES["bead"], xray, 120))
            )
            assert area == pytest.approx(mask.sum(), rel=0.08, abs=3) and mask.any()


def test_each_body_is_moved_alone_and_every_move_undone():
    placer = place_bodies(BODIES, XRAYS, PLACES)
    placer.handles.shift[1].value = 12.0
    placer.handles.turn[2].value = 30.0
    moved = placer.poses
    assert torch.equal(moved["bead"].matrix, PLACES["bead"].matrix)
    placer.handles.name.value = "bead"
    assert torch.equal(placer.poses["pin"].matrix, moved["pin"].matrix) and placer.handles.motion == ([0] * 3, [0] * 3)
    placer.click(1, (20.0, 30.0))
    placer.handles.view.value = "view 2"
    placer.handles.shift[0].value = -7.0
    assert not torch.equal(placer.poses["bead"].matrix, PLACES["bead"].matrix)
    for expected in (20.0, None, None):  # the slider, the click, the sliders before it
        placer.undo()
        if expected:
            assert project(XRAYS[1], centre_of(BODIES["bead"], placer.poses["bead"]))[0] == pytest.approx(
                20.0, abs=1e-3
            )
    assert all(torch.equal(pose.matrix, PLACES[name].matrix) for name, pose in placer.poses.items())
    placer.undo()  # nothing is left
    assert placer.lines[0].data["width"] == [1.5, 3.0]


def test_refine_gets_what_there_is_and_may_fail():
    asked = []

    def refine(bodies, xrays, poses):
        asked.append((list(bodies), len(xrays), poses["pin"].matrix))
        if len(asked) > 1:
            raise ValueError("the X-rays show nothing")
        warnings.warn("pin should not be trusted: it is hidden")
        return {"pin": RigidTransform(PLACES["bead"].matrix.double())}

    placer = place_bodies(BODIES, XRAYS, PLACES, refine, save=lambda poses: f"{len(poses)} saved")
    placer.handles.shift[0].value = 5.0
    wanted = placer.poses["pin"].matrix
    placer.actions["Refine"]()
    assert asked[0][:2] == (["pin", "bead"], 2) and torch.equal(asked[0][2], wanted)
    torch.testing.assert_close(placer.poses["pin"].matrix, PLACES["bead"].matrix)
    assert "pin should not be trusted: it is hidden" in placer.message.object
    placer.actions["Refine"]()
    assert "Refine failed:** the X-rays show nothing" in placer.message.object
    torch.testing.assert_close(placer.poses["pin"].matrix, PLACES["bead"].matrix)
    placer.undo()
    torch.testing.assert_close(placer.poses["pin"].matrix, wanted)
    placer.actions["Save"]()
    assert placer.message.object == "2 saved"


def test_wrong_input():
    with pytest.raises(ValueError, match=r"xrays\[1\] must have one pose, room from camera; give it one"):
        place_bodies(BODIES, [XRAYS[0], replace(XRAYS[1], pose=None)])
    with pytest.raises(ValueError, match="did you mean 'bead'"):
        place_bodies(BODIES, XRAYS, {"beat": PLACES["pin"]})
    with pytest.raises(ValueError, match="at least one body"):
        place_bodies({}, XRAYS)


# In the browser

PROGRAM = """
import sys; sys.path.insert(0, {folder!r})
from test_placer import BODIES, PLACES, XRAYS
from diffdrr.show import place_bodies, serve_placer
serve_placer(lambda: place_bodies(BODIES, XRAYS, PLACES, lambda *given: {{"pin": PLACES["bead"]}}), port=0, show=False)
"""


@pytest.fixture(scope="module")
def address(chromium: str, request: pytest.FixtureRequest) -> Iterator[str]:
    "Serve bodies from a process of its own."
    program = PROGRAM.format(folder=str(request.path.parent))
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert said.startswith("http://localhost:"), said
        yield said.split()[0]
    finally:
        server.terminate()
        server.communicate(timeout=20)


@pytest.mark.slow
def test_page(address: str, browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)  # a busy machine is slow
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.goto(address)
    expect(page.locator("canvas").first).to_be_visible()
    message = page.get_by_text("its middle is at", exact=False)
    expect(message).to_contain_text("pin")
    first = message.inner_text()
    page.locator(".noUi-handle").first.press("ArrowRight")
    expect(message).not_to_have_text(first)
    page.get_by_text("Undo", exact=True).click()
    expect(message).to_have_text(first)
    page.get_by_text("bead", exact=True).click()
    expect(message).to_contain_text("bead")
    page.get_by_text("pin", exact=True).click()
    expect(message).to_have_text(first)
    picture = page.locator("canvas").first.bounding_box()
    page.mouse.click(picture["x"] + 120, picture["y"] + 160)
    expect(message).not_to_have_text(first)
    page.get_by_text("Refine", exact=True).click()
    expect(message).to_contain_text("pin")
    page.close()
    assert problems == []
