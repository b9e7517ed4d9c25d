"""Thickness of meshes: against what is known, without a pixel that slips through, with derivatives that are exact."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch

from diffdrr.bodies import Mesh, MeshBody, ball, box, read_mesh, screw
from diffdrr.kernels import Rays
from diffdrr.kernels.meshes import find_crossings

FEMUR = Path(__file__).parents[2] / "shared" / "data" / "knee" / "femur.stl"
F64 = torch.float64


def points(*numbers: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([numbers], dtype=F64)


def measure(mesh: Mesh, source: torch.Tensor, target: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return MeshBody(mesh, backend=backend)(Rays.between(source, target))[:, 0]


def random_rays(n: int, size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Draw rays from around a body through it."
    generator = torch.Generator().manual_seed(seed)
    source = torch.nn.functional.normalize(torch.randn(1, n, 3, dtype=F64, generator=generator), dim=2) * 3 * size
    through = (torch.rand(1, n, 3, dtype=F64, generator=generator) - 0.5) * size
    return source, source + (through - source) * 2


def rotation() -> torch.Tensor:
    "Return some rotation."
    return torch.matrix_exp(torch.tensor([[0.0, 0.9, -0.4], [-0.9, 0, 1.3], [0.4, -1.3, 0]], dtype=F64))


BODIES = {
    "box": lambda: box(20.0, 30, 40),
    "ball": lambda: ball(15.0, 40),
    "screw": lambda: screw(30.0, 3.0, 0.8, 3.0, n=24),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_ray_slips_through(name: str):
    """Turned, moved and reversed, every sum is rounded otherwise: a ray that slipped through between two triangles in
    one of them would be off by millimetres."""
    mesh = BODIES[name]()
    size = mesh.size.norm().item()
    source, target = random_rays(20_000, size)
    thickness = measure(mesh, source, target)
    assert (thickness > 0).float().mean() > 0.1
    turn, shift = rotation(), torch.tensor([3.0, -20, 50], dtype=F64)
    turned = Mesh(mesh.vertices @ turn.T + shift, mesh.faces)
    for other in (measure(mesh, target, source), measure(turned, source @ turn.T + shift, target @ turn.T + shift)):
        assert (thickness - other).abs().max() < 1e-9 * size


@pytest.mark.parametrize("name", BODIES)
def test_rays_through_vertices_and_along_edges(name: str):
    "Each ray enters as often as it leaves, and the kernel finds the crossings of the reference."
    mesh = BODIES[name]()
    generator = torch.Generator().manual_seed(0)
    faces = mesh.faces[torch.randint(len(mesh.faces), (300,), generator=generator)]
    a, b, c = mesh.vertices[faces].unbind(dim=1)
    outside = points((100.0, 3, 2)).expand(1, 300, 3)
    source = torch.cat([outside, a[None] + 2 * (a - b)[None], (a + b)[None] / 2 + torch.tensor([0.0, 0, 90])], dim=1)
    target = torch.cat([2 * a[None] - outside, b[None] - 3 * (a - b)[None], (b + a)[None] / 2], dim=1)
    far = source + 4 * (target - source)
    ray, _, sign = find_crossings(mesh.vertices, mesh.faces, source, far)
    assert (torch.zeros(900, dtype=torch.long).index_add(0, ray, sign) == 0).all()
    fast, slow = (measure(mesh, source, target, backend) for backend in ("numba", "torch"))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


def test_a_cube_along_its_axes():
    cube = box(2.0, 2, 2)
    grid = torch.linspace(-1.5, 1.5, 13, dtype=F64)  # through edges and vertices, too
    for axis in range(3):
        for sign in (1.0, -1.0):
            y, z = torch.meshgrid(grid, grid, indexing="ij")
            ends = torch.stack([torch.full_like(y, sign * 5), y, z], dim=2).roll(axis, 2).view(1, -1, 3)
            opposite = ends.clone()
            opposite[..., axis] *= -1
            thickness = measure(cube, ends, opposite).view(13, 13)
            inside, outside = (y.abs().maximum(z.abs()) < 1), (y.abs().maximum(z.abs()) > 1)
            assert ((thickness[inside] - 2).abs() < 1e-12).all() and (thickness[outside] == 0).all()
            along = thickness[~inside & ~outside].round(decimals=12)  # in a face: of two opposite ones, one counts
            assert torch.isin(along, torch.tensor([0.0, 2.0], dtype=F64)).all() and 0 < along.mean() < 2


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((-100, 1, 2), (100, 1, 2), 20),
        ((0, 1, 2), (100, 1, 2), 10),  # the source is inside
        ((-100, 1, 2), (5, 1, 2), 15),  # the detector is inside
        ((-4, 1, 2), (5, 1, 2), 9),  # both are
        ((20, 1, 2), (100, 1, 2), 0),  # the mesh is behind the source
        ((-100, 1, 2), (-20, 1, 2), 0),  # and behind the detector
        ((-100, 50, 2), (100, 50, 2), 0),
        ((-10, 1, 2), (10, 1, 2), 20),  # both on the surface
        ((3, 3, 3), (3, 3, 3), 0),
    ],
)
def test_ends_of_rays(source: tuple, target: tuple, expected: float):
    thickness = measure(box(20.0, 30, 40), points(source), points(target))
    assert thickness.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("stretch", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_balls_and_ellipsoids_converge(stretch: tuple):
    "The error falls with the square of the size of the triangles."
    stretch = torch.tensor(stretch, dtype=F64)
    source, target = random_rays(3000, 20.0)
    s, d = source / stretch, (target - source) / stretch
    a, b, c = (d * d).sum(2), (s * d).sum(2), (s * s).sum(2) - 100
    root = (b * b - a * c).clamp(min=0).sqrt() / a
    exact = 2 * root * (target - source).norm(dim=2)
    errors = []
    for n in (16, 32, 64):
        unit = ball(10.0, n)
        errors.append((measure(Mesh(unit.vertices * stretch, unit.faces), source, target) - exact).abs().mean())
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3 and errors[2] < 0.02 * exact.mean()


def path(mesh: Mesh, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    "Make a number for each ray that tells which triangles it crosses."
    ray, triangle, sign = find_crossings(mesh.vertices, mesh.faces, source, target)
    return torch.zeros(source.shape[1], dtype=torch.long).index_add(0, ray, sign * (triangle + 1) ** 3)


@pytest.mark.parametrize("name", BODIES)
def test_slopes_against_differences(name: str):
    "For rays that cross the same triangles a step further: at an edge, the slope has a step."
    mesh = BODIES[name]()
    source, target = random_rays(1000, 0.5 * mesh.size.norm().item())
    source[:, :200] *= 0.05  # inside, or nearly so
    length, body, step = torch.full((1, 1000), 100.0, dtype=F64), MeshBody(mesh), 1e-5
    inputs = [x.clone().requires_grad_() for x in (source, target)]
    slopes = torch.cat(torch.autograd.grad(body(Rays(*inputs, length)).sum(), inputs), dim=2)
    smooth, differences, here = torch.ones(1000, dtype=torch.bool), [], path(mesh, source, target)
    for shift in step * torch.eye(6, dtype=F64):
        ends = [(source + sign * shift[:3], target + sign * shift[3:]) for sign in (1, -1)]
        more, less = (body(Rays(*x, length))[:, 0] for x in ends)
        differences.append((more - less) / (2 * step))
        for x in ends:
            smooth &= path(mesh, *x) == here
    error = (torch.stack(differences, dim=2) - slopes).abs()[0]
    steep = slopes.abs().amax(dim=2)[0]
    assert smooth.float().mean() > 0.98 and (steep > 0).float().mean() > 0.3
    assert (error.amax(dim=1) <= 1e-6 * (1 + steep) ** 2)[smooth].all()


def test_gradient_by_vertices():
    mesh = screw(4.0, 1.5, 0.4, 3.0, n=5)
    source, target = random_rays(40, 3.0)
    vertices = mesh.vertices.clone().requires_grad_()
    body = MeshBody(mesh)

    def pixels(vertices: torch.Tensor) -> torch.Tensor:
        body.vertices = vertices
        return body(Rays.between(source, target))

    assert torch.autograd.gradcheck(pixels, vertices) and pixels(vertices).gt(0).float().mean() > 0.3


def test_shells_that_overlap_touch_and_nest():
    cube, small = box(2.0, 2, 2), box(1.0, 1, 1)
    along = points((-9.0, 0.1, 0.2)), points((9.0, 0.1, 0.2))

    def both(other: Mesh, shift: float, inward: bool = False) -> float:
        faces = (other.faces.flip(1) if inward else other.faces) + 8
        vertices = torch.cat([cube.vertices, other.vertices + torch.tensor([shift, 0, 0])])
        return measure(Mesh(vertices, torch.cat([cube.faces, faces])), *along).item()

    assert both(cube, 1.5) == pytest.approx(3.5)  # overlap counts once
    assert both(cube, 2.0) == pytest.approx(4)  # they touch
    assert both(cube, 5.0) == pytest.approx(4)
    assert both(cube, 0.0) == pytest.approx(2)  # one in the place of the other
    assert both(small, 0.0) == pytest.approx(2)
    assert both(small, 0.0, inward=True) == pytest.approx(1)  # a cavity
    with pytest.raises(ValueError, match="1 of 2 shells are inside out"):
        both(small, 5.0, inward=True)


def test_far_sources_and_fine_meshes():
    "A source a kilometre away sees a mesh of a millimetre, to the precision of its coordinates."
    mesh = ball(0.5, 20)
    offset = (torch.rand(1, 500, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.8
    source = points((1e6, 2e5, -3e5)) + offset
    thickness = measure(mesh, source, 2 * offset - source)
    near = offset + (source - offset) / 1e6
    assert (thickness - measure(mesh, near, 2 * offset - near)).abs().max() < 1e-7


def test_compiled_programs_can_leave_meshes_out():
    ends = points((-9.0, 0.1, 0.2)), points((9.0, 0.1, 0.2))
    apart = torch.compiler.disable(MeshBody(box(2.0, 2, 2)))
    compiled = torch.compile(lambda *x: apart(Rays.between(*x)) / 2, backend="eager")
    assert compiled(*ends).item() == pytest.approx(1)


@pytest.mark.skipif(not FEMUR.is_file(), reason="needs the knee data")
def test_a_real_implant():
    with pytest.raises(ValueError, match="15 of 109686 edges are open"):
        read_mesh(FEMUR)
    with pytest.warns(UserWarning, match="closed holes of 15 edges, 10.5 mm around"):
        mesh = read_mesh(FEMUR, repair=True)
    assert len(mesh.faces) == 73119 + 13 and mesh.volume == pytest.approx(41383, abs=1)
    centre = (mesh.vertices.amax(dim=0) + mesh.vertices.amin(dim=0)) / 2
    source, target = (x + centre for x in random_rays(20_000, 60.0))
    thickness = measure(mesh, source, target)
    assert (thickness - measure(mesh, target, source)).abs().max() < 1e-9 * 75


def test_no_warning_for_a_whole_mesh(tmp_path: Path):
    trimesh = pytest.importorskip("trimesh")
    mesh = screw(10.0, 2.0, 0.5, 3.0)
    trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False).export(tmp_path / "screw.stl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_mesh(tmp_path / "screw.stl")
    assert math.isclose(read.volume, mesh.volume, rel_tol=1e-5) and len(read.vertices) == len(mesh.vertices)
