"""The explorer: its code makes its picture, for every kind of camera; and the page in a browser, where there is one."""

from __future__ import annotations

import base64
import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from unittest import mock
from urllib.parse import urlsplit

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from diffdrr.geometry import Camera, RigidTransform, convert, pose_from_view
from diffdrr.rendering import DRR
from diffdrr.show import explore, explorer, serve, view_name
from diffdrr.show.explorer import Controls, View, aim, code_of, first_view, grey_picture, render_view
from diffdrr.volumes import load_example_ct

HALF_A_GREY_VALUE = 0.6  # is lost to 8 bits; the rest is rounding in float32


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def example(**kwargs):
    return load_example_ct(shape=(64, 64, 33), spacing=(5.6, 5.6, 10.0), **kwargs)


def plotted(code: str, **names) -> np.ndarray:
    "Run a program, and return the grey values that it plots."
    with torch.no_grad(), mock.patch("matplotlib.pyplot.show"):  # a notebook that ran before would close the figure
        exec(code, names)
    image = plt.gca().images[0]
    return np.asarray(image.norm(image.get_array())).clip(0, 1) * 255


CAMERAS = {
    "square": dict(delx=4.0),
    "wide, shifted": dict(delx=4.0, dely=3.0, width=110, x0=12.5, y0=-7.1),
    "mirrored": dict(delx=4.0, reverse_x_axis=False, x0=20.0),
    "parallel": dict(delx=4.0, beam="parallel"),
    "corners": dict(delx=4.0, voxel_shift=0.0, renderer="trilinear"),
    "small pixels": dict(delx=1 / 3),
}


@pytest.mark.parametrize("look", ["integral", "transmission"])
@pytest.mark.parametrize("camera", CAMERAS.values(), ids=CAMERAS.keys())
def test_code_makes_the_picture(camera: dict, look: str):
    subject = example(orientation="PA")
    drr = DRR(subject, sdd=1020.0, height=80, **camera)
    pose = convert(
        torch.tensor([[0.3, -0.2, 0.1]]),
        torch.tensor([[9.0, -800.0, -4.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )
    first = first_view(drr, pose)
    moved = first.camera.replace(sdd=1100.0, delx=1.1 * first.camera.delx, dely=1.1 * first.camera.dely)
    view = replace(first, look=look, camera=moved)
    shown = grey_picture(drr, view)
    assert shown.std() > 5
    np.testing.assert_allclose(plotted(code_of(drr, view), subject=subject), shown, atol=HALF_A_GREY_VALUE)


def test_first_view_is_that_of_the_renderer():
    drr = DRR(example(), sdd=1020.0, height=80, delx=4.0, renderer="trilinear")
    pose = pose_from_view("LAO 25 CAU 10", 700.0)
    view = first_view(drr, pose)
    with torch.no_grad():
        expected = drr(pose, n_points=None)
    torch.testing.assert_close(
        render_view(drr, view), expected, rtol=0, atol=5e-3 * expected.max().item()
    )  # the pose is rounded to 0.001 mm and degrees


def test_picture_keeps_the_beam_with_fewer_pixels():
    drr = DRR(example(), sdd=1020.0, height=60, width=120, delx=3.0)
    view = first_view(drr)
    assert grey_picture(drr, view, 40).shape == (20, 40)
    assert grey_picture(drr, view, 500).shape == (60, 120)


@pytest.mark.parametrize("orientation", ["AP", "PA", None])
def test_first_view_sees_the_patient(orientation: str | None):
    drr = DRR(example(orientation=orientation), sdd=1020.0, height=40, delx=10.0)
    assert grey_picture(drr, first_view(drr)).std() > 20


def test_air_can_be_seen():
    drr = DRR(example(), sdd=1020.0, height=20, delx=10.0)
    drr.density = torch.zeros_like(drr.density)
    assert (grey_picture(drr, first_view(drr)) == 0).all()


@pytest.mark.parametrize("kind", ["siddon", "trilinear"])
@pytest.mark.parametrize("draft", [False, True])
def test_a_renderer_that_is_made_anew_keeps_its_choices(kind: str, draft: bool):
    drr = DRR(example(), sdd=1020.0, height=20, delx=10.0, voxel_shift=0.0, backend="torch", patch_size=7, eps=1e-6)
    view = replace(first_view(drr), renderer=kind)
    made = aim(drr.coarsen(1, (2, 2, 2)) if draft else drr, view)
    assert (made.renderer.name, made.renderer.backend, made.renderer.voxel_shift, made.renderer.eps) == (
        kind,
        "torch",
        0.0,
        1e-6,
    )
    assert made.patch_size == 7 and 'backend="torch"' in code_of(drr, view)
    assert grey_picture(drr, view).std() > 5


def test_explore_draws_with_the_backend_of_the_renderer():
    drr = DRR(example(), sdd=1020.0, height=20, delx=10.0, backend="torch")
    used = []

    def recorded(drr: DRR, view: View, pixels: int | None = None) -> torch.Tensor:
        used.append(aim(drr, view, pixels).renderer.backend)
        return render_view(drr, view, pixels)

    with mock.patch.object(explorer, "render_view", recorded):
        page = explore(drr)
        widget(page, "Turn").value = 20.0
        page.select(lambda x: getattr(x, "options", None) == ["siddon", "trilinear"])[0].value = "trilinear"
    assert used == ["torch"] * 4  # the first view, the first picture, a draft, and the other renderer


def test_controls_hold_the_view():
    camera = Camera(sdd=3000.0, height=30, width=40, delx=0.1, dely=0.3, x0=7.0, reverse_x_axis=False, beam="parallel")
    view = View(
        camera=camera,
        rotation=(12.5, -3.0, 200.0),
        translation=(-450.0, 40.0, 3.0),
        renderer="trilinear",
        look="transmission",
        window=(2.0, 8.0),
    )
    held = Controls(view).view  # also outside the usual range of the sliders
    assert replace(held, camera=camera) == view
    assert asdict(held.camera) == pytest.approx(asdict(camera))


def test_handles_of_the_window_in_one_place():
    drr = DRR(example(), sdd=1020.0, height=20, delx=30.0)
    controls = Controls(first_view(drr))
    for look, thin in (("integral", 0), ("transmission", 255)):
        controls.look.value = look
        controls.window.value = (controls.window.start,) * 2
        assert {0, 255} <= set(grey_picture(drr, controls.view).flat)
        controls.window.value = (controls.window.end,) * 2
        assert set(grey_picture(drr, controls.view).flat) == {thin}


def widget(page, label: str):
    (found,) = page.select(lambda x: getattr(x, "label", "").startswith(label))
    return found


def shown(page, kind: str) -> str | bytes:
    "Return what the last pane of a kind shows."
    return page.select(lambda x: type(x).__name__ == kind)[-1].object


def test_sliders_can_be_moved_from_python():
    drr = DRR(example(), sdd=1020.0, height=20, delx=10.0)
    page = explore(drr, pose_from_view("LAO 30 CRA 10", 800.0), source="load_example_ct()")
    before = shown(page, "PNG")
    assert "subject = dd.load_example_ct()" in shown(page, "Markdown")
    assert "torch.tensor([[-150.0, -10.0, 0.0]])" in shown(page, "Markdown")
    widget(page, "Turn").value = -20.0
    widget(page, "Source to detector").value = 1500.0
    assert shown(page, "PNG") != before
    assert "sdd=1500.0" in shown(page, "Markdown") and "torch.tensor([[-20.0, -10.0, 0.0]])" in shown(page, "Markdown")
    assert drr.detector.sdd == 1020.0 and drr.mask is not None  # the caller's renderer stays as it is


@pytest.mark.parametrize(
    ("angles", "name"),
    [
        ((180, 0), "AP"),
        ((-180, 0.4), "AP"),
        ((0.3, -20), "PA CAU 20"),
        ((90, 0), "LAO 90"),
        ((-91, 0), "RPO 89"),
        ((359, 0), "RAO 1"),
    ],
)
def test_names_of_views(angles: tuple[float, float], name: str):
    assert view_name(*angles) == name


def test_wrong_input():
    drr = DRR(example(), sdd=1020.0, height=20, delx=10.0)
    with pytest.raises(ValueError, match="pose must hold one pose, not 3"):
        explore(drr, RigidTransform(torch.eye(4).repeat(3, 1, 1)))
    with pytest.raises(ValueError, match="labels belong to a CT"):
        serve(labels="labels.nii.gz")
    with (
        socket.create_server(("localhost", 0)) as busy,
        pytest.raises(OSError, match="in use; choose another with --port"),
    ):
        serve(port=busy.getsockname()[1])


def test_missing_panel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "panel", None)
    with pytest.raises(ImportError, match=r"pip install '.\[view\]'"):
        serve()


def test_import_is_light():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, diffdrr.show.explorer; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"panel", "bokeh", "tornado", "torchio"} & set(loaded)


# In the browser


@pytest.fixture(scope="module")
def address(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "Serve a CT of a file from a process of its own."
    path = tmp_path_factory.mktemp("ct") / "chest.nii.gz"
    example().volume.save(path)
    program = f"from diffdrr.show import serve; serve({str(path)!r}, orientation='PA', port=0, show=False)"
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert said.startswith("http://localhost:"), said
        yield said.split()[0]
    finally:
        server.terminate()
        server.communicate(timeout=20)


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(address: str, browser, request: pytest.FixtureRequest):
    "Open the explorer; at the end, nothing may have gone wrong, nor have been asked of another computer."
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    asked, problems = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("websocket", lambda socket: asked.append(socket.url))
    opened.on("requestfailed", lambda request: problems.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    opened.goto(address)
    yield opened
    opened.close()
    assert problems == []
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}


def seen(page) -> np.ndarray:
    "Read the picture of the page."
    source = page.locator("img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))


@pytest.mark.slow
def test_page(page):
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)  # a busy machine is slow
    code, image, handle = page.locator(".codehilite pre"), page.locator("img"), page.locator(".noUi-handle").first
    expect(image).to_be_visible()
    expect(code).to_contain_text("[[0.0, 0.0, 0.0]]")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    frontal = seen(page)
    assert frontal.shape == (400, 400) and frontal.std() > 20

    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=4)
    expect(image).to_have_js_property("naturalWidth", explorer.DRAFT)
    expect(code).not_to_contain_text("[[0.0, 0.0, 0.0]]")
    page.mouse.up()
    expect(image).to_have_js_property("naturalWidth", explorer.SHARP)

    before = code.inner_text()
    handle.press("ArrowRight")
    expect(code).not_to_have_text(before)
    page.get_by_text("transmission").click()
    expect(code).to_contain_text('look="transmission"')
    expect(image).to_have_js_property("naturalWidth", explorer.SHARP)
    turned = seen(page)
    assert np.abs(turned.astype(float) - frontal).mean() > 10
    np.testing.assert_allclose(plotted(code.inner_text()), turned, atol=HALF_A_GREY_VALUE)
