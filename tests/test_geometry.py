"""The picture and the geometry agree: a dense ball is seen where `perspective_projection` says, whatever the grid, the
camera and the flips."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from diffdrr.geometry import (
    INTRINSICS,
    ORIENTATIONS,
    Camera,
    Detector,
    RigidTransform,
    convert,
    opencv_camera,
    orientation_matrix,
    pose_from_landmarks,
    pose_from_opencv,
    random_views,
)
from diffdrr.rendering import DRR
from diffdrr.volumes import read

# How far the centre of the picture of a ball may be from the image of its centre, in pixels of about 0.7 mm.
# Perspective moves it by little. The trilinear picture is
# smooth; Siddon's is made of blocks of up to 2.5 mm, whose edges fall between pixels.
PIXELS = {"trilinear": 0.1, "siddon": 0.4}

# Without shrinking: a picture takes a tenth of a second, and any failing example tells enough.
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))

angles = st.floats(-0.5, 0.5)
offsets = st.floats(-8, 8)


@st.composite
def affines(draw) -> np.ndarray:
    "Draw an affine matrix: any order and direction of the axes, oblique, with unequal spacing and any origin."
    order = draw(st.permutations([0, 1, 2]))
    signs = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    spacing = draw(st.tuples(*[st.floats(1.0, 2.5)] * 3))
    tilt = (
        convert(
            torch.tensor([draw(st.tuples(angles, angles, angles))]), torch.zeros(1, 3), parameterization="axis_angle"
        )
        .matrix[0]
        .numpy()
    )
    affine = np.eye(4)
    affine[:3, :3] = tilt[:3, :3] @ (np.eye(3)[:, order] * signs) * np.array(spacing)
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return affine


def ball_subject(affine: np.ndarray, offset: list[float], orientation: str | None):
    """A soft ball of density in air, displaced from the isocentre, within the volume; return it with its centre in the
    world."""
    shape = (34, 36, 38)
    index = np.moveaxis(np.indices(shape), 0, -1)
    isocentre = affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    distance = np.linalg.norm(index @ affine[:3, :3].T - isocentre - offset, axis=-1)
    hu = torch.tensor(np.clip(300 - 300 * (distance - 4), -1000, 300), dtype=torch.float32)[None]
    return read(torchio.ScalarImage(tensor=hu, affine=affine), orientation=orientation), torch.tensor(
        offset, dtype=torch.float32
    )


def frontal(orientation: str | None, rotation) -> object:
    "A pose that looks at the isocentre from 500 mm away."
    place = {"AP": [0.0, 500, 0], "PA": [0.0, -500, 0], None: [0.0, 0, -500]}[orientation]
    return convert(torch.tensor([rotation]), torch.tensor([place]), parameterization="euler_angles", convention="ZXY")


def centroid(img: torch.Tensor) -> torch.Tensor:
    "The centre of what is bright, in pixel coordinates."
    rows, cols = torch.meshgrid(torch.arange(img.shape[0]) + 0.5, torch.arange(img.shape[1]) + 0.5, indexing="ij")
    return torch.stack([(cols * img).sum(), (rows * img).sum()]) / img.sum()


@EXAMPLES
@given(
    affine=affines(),
    offset=st.tuples(offsets, offsets, offsets),
    rotation=st.tuples(angles, angles, angles),
    orientation=st.sampled_from(list(ORIENTATIONS)),
    reverse_x_axis=st.booleans(),
    beam=st.sampled_from(["cone", "parallel"]),
    principal_point=st.tuples(st.floats(-12, 12), st.floats(-12, 12)),
    renderer=st.sampled_from(["siddon", "trilinear"]),
)
def test_ball_is_seen_where_it_projects(
    affine, offset, rotation, orientation, reverse_x_axis, beam, principal_point, renderer
):
    subject, centre = ball_subject(affine, list(offset), orientation)
    x0, y0 = principal_point
    magnified = 2.0 if beam == "cone" else 1.0
    drr = DRR(
        subject,
        sdd=1000.0,
        height=96,
        width=120,
        delx=0.7 * magnified,
        dely=0.77 * magnified,
        x0=x0,
        y0=y0,
        reverse_x_axis=reverse_x_axis,
        renderer=renderer,
        beam=beam,
    )
    pose = frontal(orientation, rotation)
    img = drr(pose, **({"n_points": None} if renderer == "trilinear" else {}))[0, 0]
    assert torch.allclose(
        centroid(img), drr.perspective_projection(pose, centre[None, None])[0, 0], atol=PIXELS[renderer]
    )


@EXAMPLES
@given(
    rotation=st.tuples(angles, angles, angles),
    orientation=st.sampled_from(list(ORIENTATIONS)),
    reverse_x_axis=st.booleans(),
    beam=st.sampled_from(["cone", "parallel"]),
    principal_point=st.tuples(offsets, offsets),
    pixels=st.lists(st.tuples(st.floats(0, 80), st.floats(0, 64)), min_size=1, max_size=5),
)
def test_projections_undo_each_other(rotation, orientation, reverse_x_axis, beam, principal_point, pixels):
    subject, _ = ball_subject(np.eye(4), [0.0, 0, 0], orientation)
    drr = DRR(
        subject,
        sdd=1000.0,
        height=64,
        width=80,
        delx=2.0,
        dely=1.5,
        x0=principal_point[0],
        y0=principal_point[1],
        reverse_x_axis=reverse_x_axis,
        beam=beam,
    )
    pose, pixels = frontal(orientation, rotation), torch.tensor([pixels])
    before = pixels.clone()
    again = drr.perspective_projection(pose, drr.inverse_projection(pose, pixels))
    assert torch.allclose(again, pixels, atol=2e-3)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("orientation, reverse_x_axis", [("AP", True), ("PA", False), (None, True)])
def test_opencv_draws_the_same_points(orientation, reverse_x_axis):
    "The matrices for OpenCV project as it documents: pixels = K [R | t] X, by hand."
    subject, _ = ball_subject(np.eye(4), [0.0, 0, 0], orientation)
    drr = DRR(
        subject, sdd=1000.0, height=64, width=80, delx=2.0, dely=1.5, x0=9.0, y0=-3.0, reverse_x_axis=reverse_x_axis
    )
    pose = frontal(orientation, (0.2, -0.1, 0.3))
    K, extrinsic = opencv_camera(drr.detector, pose)
    assert K[0, 0] > 0 and K[1, 1] > 0 and torch.linalg.det(extrinsic[0, :3, :3]) > 0
    points = torch.randn(10, 3) * 30
    camera = points @ extrinsic[0, :3, :3].T + extrinsic[0, :3, 3]
    assert (camera[:, 2] > 0).all()  # in front of the camera
    pixels = (
        camera[:, :2] / camera[:, 2:] * K.diagonal()[:2] + K[:2, 2] + 0.5
    )  # OpenCV counts from the centre of the first pixel
    assert torch.allclose(pixels, drr.perspective_projection(pose, points[None])[0], atol=1e-2)


@EXAMPLES
@given(
    cuts=st.tuples(*[st.integers(0, 5)] * 4),
    n=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(4, 90), st.integers(4, 90)),
    scale=st.sampled_from([0.25, 0.5, 2.0]),
    reverse_x_axis=st.booleans(),
    beam=st.sampled_from(["cone", "parallel"]),
    principal_point=st.tuples(offsets, offsets),
)
def test_cameras_move_with_their_pictures(cuts, n, size, scale, reverse_x_axis, beam, principal_point):
    "Cropping, binning and resizing move the image of a point as they move the pixels."
    top, bottom, left, right = (8 * cut for cut in cuts)
    camera = Camera(1000.0, 96, 128, 2.0, 1.5, *principal_point, reverse_x_axis, beam)

    def detector(c):
        return Detector.from_camera(c, torch.eye(4))

    points, pose = torch.tensor([0.0, 0, 500]) + 20 * torch.randn(1, 10, 3), RigidTransform(torch.eye(4))
    pixels = detector(camera).project(pose, points)
    cropped = camera.crop(top, bottom, left, right)
    ratio = torch.tensor([size[1] / cropped.width, size[0] / cropped.height])
    for other, moved in (
        (cropped, pixels - torch.tensor([float(left), top])),
        (cropped.bin(n), (pixels - torch.tensor([float(left), top])) / n),
        (cropped.resize(*size), (pixels - torch.tensor([float(left), top])) * ratio),
        (cropped.rescale(scale), (pixels - torch.tensor([float(left), top])) * scale),
    ):
        assert torch.allclose(detector(other).project(pose, points), moved, atol=5e-3)
        assert torch.allclose(detector(other).calibration.matrix, other.calibration) and torch.allclose(
            detector(other).intrinsic, other.intrinsic
        )


def test_cameras_carry_gradients():
    "Every intrinsic has a gradient, whatever is done to the camera."
    values = torch.tensor([1000.0, 2.0, 1.5, 3.0, -4.0], dtype=torch.float64, requires_grad=True)

    def matrices(values: torch.Tensor) -> torch.Tensor:
        camera = (
            Camera(**dict(zip(INTRINSICS, values)), height=96, width=128)
            .crop(top=8, right=16)
            .bin(2)
            .resize(30, 40)
            .rescale(0.5)
        )
        again = Camera.from_opencv(camera.to_opencv(), camera.height, camera.width, camera.sdd)
        return torch.stack([camera.calibration, again.calibration])

    found = matrices(values)
    assert torch.allclose(found[0], found[1])
    assert torch.autograd.gradcheck(matrices, (values,))


CAMERAS = [  # non-square pictures, pixels that are not square, a principal point beside the middle; both flips
    Camera(1000.0, 96, 128, 2.0, 1.5, 9.0, -3.0, True),
    Camera(900.0, 131, 77, 1.1, 1.7, -6.0, 12.0, False),
]


def opencv_projects(points: np.ndarray, K: torch.Tensor, extrinsic: torch.Tensor) -> np.ndarray:
    "Have OpenCV project points. A mirrored camera sees mirrored points: rotation vectors know no reflection."
    cv2 = pytest.importorskip("cv2")
    K, extrinsic = K.double().numpy(), extrinsic[0].double().numpy()
    mirror = np.diag([np.sign(np.linalg.det(extrinsic[:3, :3])), 1.0, 1.0])
    rotation = cv2.Rodrigues(extrinsic[:3, :3] @ mirror)[0]
    return cv2.projectPoints(points @ mirror, rotation, extrinsic[:3, 3], K, None)[0][:, 0]


@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
@pytest.mark.parametrize("camera", CAMERAS, ids=["reversed", "not reversed"])
def test_opencv_counts_pixels_from_the_centre_of_the_first(camera, orientation):
    "OpenCV itself projects points half a pixel before where we do, and its matrices come back as they went out."
    reorient = orientation_matrix(orientation)
    detector, pose = Detector.from_camera(camera, reorient), frontal(orientation, (0.2, -0.1, 0.3))
    points = 30 * torch.randn(10, 3)
    K, extrinsic = opencv_camera(detector, pose)
    theirs = opencv_projects(points.double().numpy(), K, extrinsic)
    assert np.allclose(theirs + 0.5, detector.project(pose, points[None])[0].numpy(), atol=1e-2)
    again = Camera.from_opencv(K, camera.height, camera.width, camera.sdd, camera.reverse_x_axis)
    assert all(getattr(again, name) == pytest.approx(getattr(camera, name), abs=1e-3) for name in INTRINSICS)
    back = pose_from_opencv(extrinsic, reorient, camera.reverse_x_axis)
    assert torch.allclose(back.matrix, pose.matrix, atol=1e-3)


@pytest.mark.parametrize("orientation", ["AP", "PA"])
@pytest.mark.parametrize("camera", CAMERAS, ids=["reversed", "not reversed"])
def test_balls_are_seen_where_opencv_projects_them(camera, orientation):
    "The centre of the picture of a small ball, as SciPy counts pixels, is where OpenCV projects the ball."
    from scipy import ndimage

    pose = frontal(orientation, (0.2, -0.1, 0.3))
    for centre in ([20.0, -12.0, 15.0], [-18.0, 25.0, -9.0], [3.0, 14.0, -22.0]):
        subject, _ = ball_subject(np.diag([1.9, 1.9, 1.9, 1.0]), centre, orientation)
        drr = DRR(subject, **vars(camera), renderer="trilinear")
        row, column = ndimage.center_of_mass(drr(pose, n_points=None)[0, 0].numpy())
        theirs = opencv_projects(np.array([centre]), *opencv_camera(drr.detector, pose))[0]
        assert np.allclose([column, row], theirs, atol=0.05)


def seen_from_somewhere(n: int) -> Iterator[tuple[Detector, torch.Tensor, torch.Tensor, torch.Generator]]:
    "Draw detectors, landmarks in the world, and the pixels that show them."
    generator = torch.Generator().manual_seed(0)
    turns, offsets = (180.0, 30.0, 15.0), (20.0, 20.0, 20.0)
    for i in range(n):
        orientation, reverse_x_axis = list(ORIENTATIONS)[i % 3], bool(i % 2)
        pose = random_views(1, ["AP"], turns, (600.0, 900.0), offsets, orientation, generator)
        height, width, n_points = torch.randint(150, 400, (3,), generator=generator).tolist()
        dely, x0, y0 = (torch.rand(3, generator=generator) * torch.tensor([0.6, 30.0, 30.0])).tolist()
        camera = Camera(1050.0, height, width, 1.5, 1.2 + dely, x0 - 15, y0 - 15, reverse_x_axis)
        detector = Detector.from_camera(camera, orientation_matrix(orientation))
        points = 50 * torch.randn(6 + n_points % 7, 3, generator=generator)
        yield detector, points, detector.project(pose, points[None])[0], generator


@pytest.mark.filterwarnings("ignore:pixels fit somewhat better")
@pytest.mark.parametrize("noise, most", [(0.0, 0), (1.0, 12), (3.0, 30)])  # pixels; how many swaps noise may hide
def test_rows_and_columns_in_the_wrong_order_are_refused(noise, most):
    "Right clicks are never refused, however far off; swapped ones are, unless noise is larger than the difference."
    pytest.importorskip("cv2")
    accepted = 0
    for detector, points, pixels, generator in seen_from_somewhere(60):
        clicks = pixels + noise * torch.randn(pixels.shape, generator=generator)
        pose_from_landmarks(detector, points, clicks)
        try:
            pose_from_landmarks(detector, points, clicks.flip(-1))
        except ValueError:
            continue
        accepted += 1
    assert accepted <= most
