"""Errors, derivatives, dtypes and seeds of the physics modules, and the scatter model beside a simulation."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scatter_simulation import scatter_to_primary
from torch import nn
from torch.autograd import gradcheck

from diffdrr.geometry import Camera, convert
from diffdrr.physics import (
    MATERIALS,
    Blur,
    Collimator,
    ElectronicNoise,
    HeelEffect,
    InverseSquare,
    Log,
    Material,
    MaterialChannels,
    PolyenergeticBeam,
    QuantumNoise,
    Scatter,
    Spectrum,
    Transmission,
    Tube,
    Window,
    attenuation,
    csi_response,
    half_value_layer,
    label_materials,
    look,
    sigma_of_focal_spot,
    sigma_of_mtf,
    tube_spectrum,
    voxelize,
)
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct, read

ALUMINIUM = {"aluminium": 2.5}
TUBE = Tube(80.0, ALUMINIUM)
SMALL = Camera(sdd=100.0, height=5, width=6, delx=1.0)
NEAR = Camera(sdd=50.0, height=5, width=6, delx=1.0, dely=2.0)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # some tens of rounding errors of an exponential


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


@pytest.fixture
def intensities() -> torch.Tensor:
    return (0.1 + 0.8 * torch.rand(2, 1, 5, 6, dtype=torch.float64, generator=seeded())).requires_grad_()


@pytest.fixture(scope="module")
def beam() -> PolyenergeticBeam:
    spectrum = tube_spectrum(TUBE)
    return PolyenergeticBeam(spectrum, ["soft tissue", "cortical bone", "titanium"], csi_response(spectrum.energies))


@pytest.fixture(scope="module")
def subject():
    return load_example_ct(shape=(64, 64, 40), spacing=(5.8, 5.8, 8.3), energy=70.0)


MODULES = {
    "transmission": Transmission(scale=0.7, air=3.0),
    "log": Log(air=2.0),
    "window": Window(0.5, 1.2, invert=True),
    "scatter": Scatter(40.0, 30.0, grid=(0.7, 0.1)),
    "blur": Blur(1.3, 1.0, 0.7),
    "inverse square": InverseSquare(NEAR),
    "heel effect": HeelEffect(SMALL, TUBE),
    "heel effect along columns": HeelEffect(SMALL, TUBE, anode="bottom"),
    "collimator": Collimator(SMALL, 3.0, 4.0, leakage=0.01),
    "quantum noise": QuantumNoise(50.0),
    "electronic noise": ElectronicNoise(0.1),
}


# Derivatives


@pytest.mark.parametrize("name", [name for name in MODULES if "noise" not in name])
def test_gradients_of_pictures(name, intensities):
    assert gradcheck(MODULES[name], intensities)


def test_gradients_of_noise(intensities):
    (photons,) = double(50.0)
    assert gradcheck(lambda x, n: QuantumNoise(n, generator=seeded())(x), (intensities, photons))
    assert gradcheck(lambda x: ElectronicNoise(0.1, seeded())(x), intensities)


def test_gradient_of_true_counts_is_that_of_their_mean(intensities):
    QuantumNoise(50.0, "poisson", seeded())(intensities).sum().backward()
    assert torch.allclose(intensities.grad, torch.ones_like(intensities))


def test_gradients_of_parameters(intensities):
    x = intensities.detach()
    assert gradcheck(lambda scale, air: Transmission(scale, air)(x), double(0.5, 2.0))
    assert gradcheck(
        lambda amplitude, exponent, sigma: Scatter(40.0, amplitude=amplitude, exponent=exponent, sigma=sigma)(x),
        double(0.3, 1.3, 90.0),
    )
    assert gradcheck(lambda sigma: Blur(sigma, 1.0)(x), double(0.8))
    assert gradcheck(
        lambda height, width, x0, y0: Collimator(SMALL.replace(x0=x0, y0=y0), height, width)(x),
        double(3.3, 4.1, 0.3, -0.6),
    )
    assert gradcheck(
        lambda sdd, delx, x0, y0: InverseSquare(Camera(sdd, 5, 6, delx, x0=x0, y0=y0))(x), double(50.0, 1.1, 0.3, -0.6)
    )
    assert gradcheck(lambda kvp, x0: HeelEffect(SMALL.replace(x0=x0), Tube(kvp, ALUMINIUM))(x), double(80.3, 0.3))


def test_gradients_of_a_beam(beam):
    channels = torch.rand(2, 3, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert gradcheck(beam, channels)
    water = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    assert gradcheck(
        lambda kvp, thickness: PolyenergeticBeam(tube_spectrum(Tube(kvp, {"aluminium": thickness})), ["water"])(water),
        double(80.3, 2.5),
    )


def test_gradients_are_finite_at_the_ends():
    x = torch.tensor([0.0, 1e-30, 1.0, 1.2]).expand(1, 1, 4, 4).clone().requires_grad_()
    (Scatter(1.0)(x) + QuantumNoise(10.0)(x)).sum().backward()
    assert x.grad.isfinite().all()


# Dtypes, devices and shapes


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODULES)
def test_dtype_and_shape_stay(name, dtype, intensities):
    x = intensities.detach().to(dtype)
    y = MODULES[name](x)
    assert y.dtype == dtype and y.shape == x.shape
    if "noise" not in name:
        assert torch.allclose(y.double(), MODULES[name](x.double()), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_beam_in_single_precision(beam):
    channels = 20 * torch.rand(1, 3, 8, 8, generator=seeded())  # depths to 60, where an intensity in float32 is 1e-26
    assert beam(channels).dtype == torch.float32
    assert torch.allclose(beam(channels).double(), beam(channels.double()), rtol=TOLERANCE[torch.float32])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(beam(channels), beam(channels))
        assert torch.allclose(beam(channels).double(), beam(channels.double()), rtol=TOLERANCE[torch.float32])


def test_pictures_of_a_batch_do_not_mix(intensities):
    for name in ("scatter", "blur"):
        assert torch.allclose(
            MODULES[name](intensities)[1:], MODULES[name](intensities[1:]), rtol=TOLERANCE[torch.float64]
        )


def test_blur_is_a_convolution(intensities):
    x = torch.zeros(1, 1, 31, 41, dtype=torch.float64)
    x[0, 0, 15, 20] = 1
    spread = Blur(1.3, 1.0, 0.7)(x)[0, 0]
    rows, columns = torch.arange(31).double() - 15, torch.arange(41).double() - 20
    gaussian = torch.exp(-0.5 * ((rows[:, None] * 0.7) ** 2 + columns**2) / 1.3**2)
    assert torch.allclose(spread, gaussian / gaussian.sum(), atol=1e-8)  # the border weighs differently
    light = Blur(1e-3, 1.0)(intensities)
    assert torch.equal(light, intensities)  # far below a pixel nothing happens


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_without_a_break(name, intensities):
    "A check of values would break the graph."
    torch.compiler.reset()
    x = intensities.detach().float()
    y = torch.compile(MODULES[name], fullgraph=True, backend="eager")(x)
    assert "noise" in name or torch.allclose(y, MODULES[name](x))


# Modules


def test_whole_chain_behind_a_drr(subject):
    marked = label_materials(subject)
    drr = DRR(marked, sdd=1020.0, height=24, delx=17.0)
    camera = Camera(sdd=1020.0, height=24, width=24, delx=17.0)
    spectrum = tube_spectrum(TUBE)
    system = nn.Sequential(
        MaterialChannels(drr),
        PolyenergeticBeam(spectrum, marked.materials, csi_response(spectrum.energies)),
        Transmission(),
        Scatter(17.0, grid=(0.7, 0.1)),
        HeelEffect(camera, TUBE),
        InverseSquare(camera),
        Blur(8.0, 17.0),
        QuantumNoise(1e4, generator=seeded()),
        Log(air=0.7, minimum=1e-4),
        look("radiograph"),
    )
    parameters = torch.tensor([[0.1, 0.0, 0.0], [0.0, 850.0, 0.0]], requires_grad=True)
    pose = convert(parameters[:1], parameters[1:], parameterization="euler_angles", convention="ZXY")
    picture = system(pose)
    assert picture.shape == (1, 1, 24, 24) and 0 <= picture.min() < picture.max() <= 1
    picture.square().sum().backward()
    assert parameters.grad.isfinite().all() and (parameters.grad != 0).any(dim=1).all()

    file = io.BytesIO()
    torch.save(system.state_dict(), file)
    file.seek(0)
    for module in system:
        if isinstance(module, QuantumNoise):
            module.generator.manual_seed(0)
    other = copy.deepcopy(system)
    other[1].coefficients.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(pose), system(pose))  # a copy has a generator of its own, in the same state
    assert all(word in repr(system) for word in ("grid=(0.7, 0.1)", "photons=10000.0", "anode='left'"))


def test_parameters_can_be_learned():
    scatter = Scatter(5.0, amplitude=nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in scatter.named_parameters()] == ["amplitude"]
    primary = torch.exp(-3 * torch.rand(1, 1, 16, 16, generator=seeded()))
    measured = Scatter(5.0, amplitude=0.5)(primary)
    optimizer = torch.optim.LBFGS(scatter.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = ((scatter(primary) - measured) / measured).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert abs(scatter.amplitude.item() - 0.5) < 1e-3


def test_materials_of_ones_own(monkeypatch):
    monkeypatch.setitem(MATERIALS, "nitinol", Material({"Ni": 0.55, "Ti": 0.45}, 6.45))
    assert attenuation("titanium", 60.0) < attenuation("nitinol", 60.0) < attenuation("copper", 60.0)
    table = Spectrum(torch.tensor([30.0, 45.0, 50.0]), torch.tensor([0.0, 2.0, 2.0]))  # any bins
    depth = PolyenergeticBeam(table, ["nitinol"], energy=None)(torch.ones(1, 1, 1))
    assert attenuation("nitinol", 50.0) < depth.item() < attenuation("nitinol", 45.0)


def test_metal_of_a_ct_is_titanium(subject):
    assert "titanium" not in label_materials(subject).materials
    metal = copy.deepcopy(subject)
    metal.volume.data[0, 30:32, 30:32, 20] = 3071
    marked = label_materials(metal)
    assert marked.materials[-1] == "titanium" and (marked.mask.data == len(marked.materials) - 1).sum() == 4
    assert abs(marked.density.data[0, 30, 30, 20].item() - attenuation("titanium", 70.0).item()) < 1e-6


# Numbers


def test_half_value_layers_grow_with_voltage_and_filter():
    layers = [
        half_value_layer(tube_spectrum(Tube(kvp, {"aluminium": al})))
        for kvp, al in ((60, 2.5), (80, 2.5), (120, 2.5), (120, 4.0))
    ]
    assert layers == sorted(layers)
    # SpekPy 2.5.4 (casim), 12 degrees: first and second half-value layers, mm
    for kvp, first, second in ((60, 2.082, 2.893), (80, 2.734, 4.084), (100, 3.458, 5.398), (120, 4.219, 6.672)):
        spectrum = tube_spectrum(Tube(kvp, ALUMINIUM))
        ours = half_value_layer(spectrum)
        assert ours == pytest.approx(first, rel=0.04) and half_value_layer(
            spectrum, fraction=0.25
        ) - ours == pytest.approx(second, rel=0.03)


@pytest.mark.parametrize("step", [0.1, 0.3, 2.0])
def test_half_value_layer_does_not_depend_on_the_bins(step):
    assert half_value_layer(tube_spectrum(Tube(100, ALUMINIUM), step=step)) == pytest.approx(
        half_value_layer(tube_spectrum(Tube(100, ALUMINIUM))), rel=5e-3
    )


def test_half_value_layer_of_one_energy():
    line = Spectrum(torch.tensor([60.0]), torch.tensor([1.0]))
    assert half_value_layer(line) == pytest.approx(math.log(2) / attenuation("aluminium", 60.0).item(), rel=1e-6)


@pytest.mark.parametrize("thickness", [10, 20, 30])
def test_scatter_agrees_with_a_simulation(thickness):
    spectrum = tube_spectrum(TUBE)
    slab = PolyenergeticBeam(spectrum, ["water"], csi_response(spectrum.energies), energy=None)
    primary = Transmission()(slab(torch.full((1, 1, 61, 61), 10.0 * thickness)))
    sides = [20.0, 30.0, 40.0]  # cm
    for side, simulated in zip(sides, scatter_to_primary(thickness, sides)):
        ratio = (Scatter(10 * side / 61).scattered(primary) / primary)[0, 0, 30, 30].item()
        assert ratio == pytest.approx(simulated, rel=0.1)  # of which the simulation's own noise is 2 %


# Meshes

CORNERS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
TETRAHEDRA = ((0, 1, 2, 4), (3, 2, 1, 7), (5, 4, 7, 1), (6, 7, 4, 2), (1, 2, 4, 7))  # that make up a cube
FACES = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=5, max_size=5, unique=True))
def test_bodies_that_share_a_face_share_no_voxels(points):
    """Two tetrahedra with corners on the middles of voxels, on both sides of a triangle.

    Together they hold each voxel once, like the body without the triangle."""
    corners = torch.tensor(points).double()
    volumes = [torch.linalg.det(corners[:3] - corners[k]) for k in (3, 4)]
    if volumes[0] * volumes[1] >= 0:
        return  # on the same side
    masks = [voxelize(corners[[0, 1, 2, k]], FACES, (13, 13, 13)) for k in (3, 4)]
    outer = torch.tensor([[0, 1, 3], [1, 2, 3], [2, 0, 3], [1, 0, 4], [2, 1, 4], [0, 2, 4]])
    assert not (masks[0] & masks[1]).any()
    assert torch.equal(masks[0] | masks[1], voxelize(corners, outer, (13, 13, 13)))


def test_a_cube_on_the_middles_of_voxels_is_filled_once():
    masks = [voxelize(6.0 * CORNERS[list(part)] + 3, FACES, (14, 14, 14)) for part in TETRAHEDRA]
    assert torch.stack(masks).sum() == 6**3


def test_a_turned_box():
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=seeded()))[0]
    corners = (CORNERS - 0.5) * torch.tensor([10.0, 6.0, 4.0]).double() @ turn.T + 9.3
    faces = torch.tensor(
        [
            [0, 2, 1],
            [1, 2, 3],
            [4, 5, 6],
            [5, 7, 6],
            [0, 1, 4],
            [1, 5, 4],
            [2, 6, 3],
            [3, 6, 7],
            [0, 4, 2],
            [2, 4, 6],
            [1, 3, 5],
            [3, 7, 5],
        ]
    )
    middles = torch.cartesian_prod(*[torch.arange(19.0, dtype=torch.float64)] * 3).view(19, 19, 19, 3)
    expected = (((middles - 9.3) @ turn).abs() < torch.tensor([5.0, 3.0, 2.0])).all(dim=-1)
    assert torch.equal(voxelize(corners, faces, (19, 19, 19)), expected)
    assert not voxelize(corners + 100, faces, (19, 19, 19)).any()


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transmission(scale=0), "scale must be a positive number, not 0"),
        (lambda: Transmission(air=torch.tensor([1.0, -2.0])), "air must be a positive number, not tensor"),
        (lambda: Log(air=float("nan")), "air must be a positive number, not nan"),
        (lambda: Log(air=torch.tensor([1.0, float("inf")])), "air must be a positive number, not tensor"),
        (lambda: Blur(float("inf"), 1.0), "sigma must be a positive number, not inf"),
        (lambda: Log(minimum=-1.0), "minimum must be a positive number"),
        (lambda: Log()(torch.tensor([1.0, float("nan")])), "1 of 2 pixels are NaN; repair them"),
        (lambda: Window(1.0, -1.0), "width must be a positive number, not -1"),
        (lambda: Scatter(0.0), "delx must be a positive number, not 0"),
        (lambda: Scatter(1.0, exponent=0.5), "exponent must be at least 1, not 0.5"),
        (lambda: Scatter(1.0, grid=(0.7, 1.1)), "grid must hold two proportions between 0 and 1"),
        (
            lambda: Scatter(1.0)(torch.full((1, 1, 2, 2), -0.1)),
            "x must be at least 0, but holds -0.1; intensities come from Transmission",
        ),
        (lambda: QuantumNoise(0), "photons must be a positive number, not 0"),
        (lambda: QuantumNoise(10)(torch.tensor([0.5, float("nan")])), "x must be at least 0"),
        (lambda: ElectronicNoise(-1.0), "sigma must be a positive number"),
        (lambda: Blur(0.0, 1.0), "sigma must be a positive number"),
        (lambda: sigma_of_mtf(1.0, 2.0), "mtf must be between 0 and 1, not 1.0"),
        (lambda: sigma_of_focal_spot(1.0, 1.0), "magnification must be above 1, not 1.0"),
        (lambda: Collimator(SMALL, 0.0, 1.0), "height must be a positive number, not 0"),
        (lambda: Collimator(SMALL, 1.0, 1.0, leakage=1.0), "leakage must be at least 0 and below 1, not 1.0"),
        (lambda: PolyenergeticBeam(tube_spectrum(Tube(80, {})), "water"), "materials must be a list"),
        (lambda: PolyenergeticBeam(tube_spectrum(Tube(80, {})), []), "materials must be a list"),
        (
            lambda: PolyenergeticBeam(tube_spectrum(Tube(80, {})), ["wood"]),
            "not 'wood'; did you mean .*or add it: MATERIALS\\['wood'\\]",
        ),
        (
            lambda: PolyenergeticBeam(Spectrum(torch.ones(2), torch.zeros(2)), ["water"]),
            "a finite sum above 0, but they run from 0 to 0",
        ),
        (
            lambda: PolyenergeticBeam(Spectrum(torch.tensor([5e4]), torch.ones(1)), ["water"]),
            "not 50000; are they in eV?",
        ),
        (
            lambda: half_value_layer(tube_spectrum(Tube(80, {})), fraction=1.0),
            "fraction must be between 0 and 1, not 1.0",
        ),
        (
            lambda: half_value_layer(Spectrum(torch.tensor([200.0]), torch.ones(1))),
            "between 10 and 150 keV for an air kerma",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "material", [Material({"H": 0.5}, 1.0), Material({"H": 1.5, "O": -0.5}, 1.0), Material({"H": 1.0}, 0.0)]
)
def test_materials_that_make_no_sense(material, monkeypatch):
    monkeypatch.setitem(MATERIALS, "nonsense", material)
    with pytest.raises(ValueError, match="'nonsense'"):
        attenuation("nonsense", 60.0)


def test_warnings_name_the_remedy():
    with pytest.warns(
        UserWarning, match="line integrals with a mean of 60 are no optical depths; read the volume with energy=70"
    ):
        look("radiograph")(torch.full((1, 1, 4, 4), 60.0))
    with pytest.warns(
        UserWarning,
        match="volume holds nothing but soft tissue, with values from 30 to 31; label_materials takes Hounsfield units",
    ):
        label_materials(read(torch.linspace(30, 31, 27).view(3, 3, 3), affine=torch.eye(4)))


def test_looks_do_not_warn_of_a_thick_body(recwarn):
    look("radiograph")(torch.full((1, 1, 4, 4), 10.0))
    assert not recwarn


def test_without_xraydb(monkeypatch):
    monkeypatch.setitem(sys.modules, "xraydb", None)
    with pytest.raises(ModuleNotFoundError, match=r"\[physics\]"):
        tube_spectrum(TUBE)


def test_import_is_light():
    heavy = ("xraydb", "torchio", "scipy", "pandas", "matplotlib")
    code = f"import sys, diffdrr.physics; print(*(m for m in {heavy} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
