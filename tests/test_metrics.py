"""Metrics against their definitions, written as loops; masks, dtypes, constant pictures, equal poses; numbers of
0.6.1."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from scipy.spatial.transform import Rotation
from scipy.stats import pearsonr
from torch.autograd import gradcheck

import diffdrr.metrics
from diffdrr.compare import (
    DoubleGeodesicSE3,
    GradientNormalizedCrossCorrelation2d,
    LogGeodesicSE3,
    MultiscaleNormalizedCrossCorrelation2d,
    MutualInformation,
    NormalizedCrossCorrelation2d,
    Sobel,
    projection_distance,
    reprojection_distance,
    rotation_error,
    target_registration_error,
    to_patches,
    translation_error,
)
from diffdrr.compare.correlation import window_sum
from diffdrr.geometry import Detector, RigidTransform, convert

# Scores lie between -1 and 1 and are averages of some hundred pixels.
FLOAT64 = 1e-10  # loops and tensors add in different orders
FLOAT32 = 1e-5  # so do they here; deviations of the pictures are some hundred times smaller than their values at worst
TOLERANCE = {torch.float64: FLOAT64, torch.float32: FLOAT32}
# Distances of poses 850 mm away: a coordinate in float32 is known to 6e-5 mm, and rounded a few times.
MILLIMETRES = {torch.float64: 1e-9, torch.float32: 1e-3}
RADIANS = {torch.float64: 1e-12, torch.float32: 1e-6}


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    "Two batches of two pictures with two channels, written down so that 0.6.1 can be asked about them."
    i = torch.arange(2 * 2 * 18 * 21, dtype=torch.float64).reshape(2, 2, 18, 21)
    x1 = 0.5 + 0.4 * torch.sin(0.37 * i) * torch.cos(0.05 * i)
    return x1, 0.6 * x1 + 0.2 * torch.cos(0.011 * i**1.3) ** 2


def poses() -> tuple[RigidTransform, RigidTransform]:
    rotations = torch.tensor([[0.3, -0.2, 0.1], [1.2, 0.4, -0.9], [0.0, 0.0, 0.0]])
    translations = torch.tensor([[5.0, 850.0, -3.0], [40.0, 700.0, 12.0], [0.0, 850.0, 0.0]])
    pose_1 = convert(rotations, translations, parameterization="axis_angle")
    return pose_1, convert(rotations.flip(0) + 0.1, translations + 7.0, parameterization="axis_angle")


def distant_poses() -> tuple[RigidTransform, RigidTransform]:
    "The same, with the camera so far back that it sees everything."
    away = turn(0, 0.0, torch.float32, (0.0, 0.0, -2000.0))
    return tuple(away.compose(pose) for pose in poses())


def random_weights(batch: int = 2, height: int = 18, width: int = 21) -> torch.Tensor:
    "Weights between 0 and 2, half of the pixels without any, and a corner of windows that are all hidden."
    torch.manual_seed(0)
    weights = 2 * torch.rand(batch, 1, height, width, dtype=torch.float64) * (torch.rand(batch, 1, height, width) < 0.5)
    weights[:, :, :8, :8] = 0
    return weights


SIMILARITIES = {
    "global": NormalizedCrossCorrelation2d(),
    "patches": NormalizedCrossCorrelation2d(5),
    "multiscale": MultiscaleNormalizedCrossCorrelation2d([None, 7], [0.25, 0.75]),
    "gradient": GradientNormalizedCrossCorrelation2d(),
    "gradient patches": GradientNormalizedCrossCorrelation2d(6, sigma=0.7, eps=1e-3),
    "mutual information": MutualInformation(num_bins=32),
    "bits": MutualInformation(sigma=0.04, num_bins=32, normalize=False),
}
every_similarity = pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)


# ---------------------------------------------------------------------------------------------------------------------
# Definitions, pixel by pixel


def naive_correlation(x1: np.ndarray, x2: np.ndarray, w: np.ndarray, eps: float) -> float:
    "Correlate two small pictures. Without contrast there is no correlation."
    seen = w > 0
    if not seen.any() or eps == 0 and 0 in (np.ptp(x1[seen]), np.ptp(x2[seen])):
        return 0.0
    mean1, mean2 = (w * x1).sum() / w.sum(), (w * x2).sum() / w.sum()
    var1, var2 = (w * (x1 - mean1) ** 2).sum() / w.sum(), (w * (x2 - mean2) ** 2).sum() / w.sum()
    return (w * (x1 - mean1) * (x2 - mean2)).sum() / w.sum() / math.sqrt((var1 + eps) * (var2 + eps))


def naive_patches(x1: np.ndarray, x2: np.ndarray, w: np.ndarray, size: int, eps: float) -> float:
    "Average over all windows of one channel, by weight."
    score = total = 0.0
    for i in range(x1.shape[0] - size + 1):
        for j in range(x1.shape[1] - size + 1):
            window = slice(i, i + size), slice(j, j + size)
            score += w[window].sum() * naive_correlation(x1[window], x2[window], w[window], eps)
            total += w[window].sum()
    return score / total


def naive_gradients(x: np.ndarray, sigma: float) -> np.ndarray:
    "Blur one channel, then differentiate it."
    if sigma > 0:
        radius = (int(6 * sigma + 1) | 1) // 2
        offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        kernel = np.exp(-(offsets**2).sum(axis=0) / (2 * sigma**2))
        x = filtered(np.pad(x, radius, mode="reflect"), kernel / kernel.sum())
    rows = np.array([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    x = np.pad(x, 1, mode="edge")
    return np.stack([filtered(x, rows), filtered(x, rows.T)])


def filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    n = kernel.shape[0]
    shape = x.shape[0] - n + 1, x.shape[1] - n + 1
    return np.array([[(x[i : i + n, j : j + n] * kernel).sum() for j in range(shape[1])] for i in range(shape[0])])


def naive_information(x1: np.ndarray, x2: np.ndarray, w: np.ndarray, sigma: float, bins: int, normalize: bool) -> float:
    "Enter each pixel into the histograms, one after the other."
    centres = np.linspace(0, 1, bins)
    joint, first, second = np.zeros((bins, bins)), np.zeros(bins), np.zeros(bins)
    for a, b, weight in zip(x1.flat, x2.flat, w.flat):
        k1, k2 = (np.exp(-0.5 * ((v - centres) / sigma) ** 2) for v in (a, b))
        first, second, joint = first + weight * k1, second + weight * k2, joint + weight * np.outer(k1, k2)
    h1, h2, h12 = (-(p / p.sum() * np.log2(p / p.sum() + 1e-10)).sum() for p in (first, second, joint))
    return (2 * (h1 + h2 - h12) / (h1 + h2)) if normalize else h1 + h2 - h12


def by_channel(function, x1: torch.Tensor, x2: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    "Apply a function of one channel to all, and average over the channels."
    w = w.expand_as(x1[:, :1]).double().numpy()
    return torch.tensor(
        [
            np.mean([function(a, b, c[0]) for a, b in zip(p, q)])
            for p, q, c in zip(x1.double().numpy(), x2.double().numpy(), w)
        ]
    )


ONES = torch.ones(1, 1, 18, 21)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "weights"])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_correlation(dtype, masked, eps):
    x1, x2 = (x.to(dtype) for x in pictures())
    w = random_weights() if masked else ONES
    mask = w.to(dtype) if masked else None
    tolerance = dict(rtol=0, atol=TOLERANCE[dtype], check_dtype=False)
    wanted = by_channel(lambda a, b, c: naive_correlation(a, b, c, eps), x1, x2, w)
    torch.testing.assert_close(NormalizedCrossCorrelation2d(eps=eps)(x1, x2, mask), wanted, **tolerance)
    for size in (2, 5, 18):
        wanted = by_channel(lambda a, b, c: naive_patches(a, b, c, size, eps), x1, x2, w)
        torch.testing.assert_close(NormalizedCrossCorrelation2d(size, eps)(x1, x2, mask), wanted, **tolerance)


def test_eps_reaches_every_scale():
    x1, x2 = pictures()
    wanted = 0.3 * NormalizedCrossCorrelation2d(eps=0.1)(x1, x2) + 2.0 * NormalizedCrossCorrelation2d(5, eps=0.1)(
        x1, x2
    )
    torch.testing.assert_close(
        MultiscaleNormalizedCrossCorrelation2d([None, 5], [0.3, 2.0], eps=0.1)(x1, x2), wanted, rtol=0, atol=FLOAT64
    )


def test_correlation_coefficient_of_numpy():
    x1, x2 = pictures()
    wanted = [np.mean([np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(p, q)]) for p, q in zip(x1, x2)]
    np.testing.assert_allclose(NormalizedCrossCorrelation2d(eps=0.0)(x1, x2), wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.3])
def test_gradients(sigma):
    x, _ = pictures()
    wanted = np.stack(
        [np.concatenate([naive_gradients(channel, sigma) for channel in picture.numpy()]) for picture in x]
    )
    np.testing.assert_allclose(Sobel(sigma)(x), wanted, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(Sobel(sigma)(x.float()), torch.tensor(wanted).float(), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "weights"])
@pytest.mark.parametrize("normalize", [False, True], ids=["bits", "normalized"])
def test_mutual_information(dtype, masked, normalize):
    x1, x2 = (x.to(dtype) for x in pictures())
    w = random_weights() if masked else ONES
    measure = MutualInformation(sigma=0.05, num_bins=24, normalize=normalize).to(dtype)
    measure.bins.copy_(torch.linspace(0, 1, 24, dtype=dtype)), measure.sigma.fill_(0.05)  # in the precision of the test
    wanted = by_channel(lambda a, b, c: naive_information(a, b, c, 0.05, 24, normalize), x1, x2, w)
    # The entropies are some bits, and what is left of them is the difference.
    made = measure(x1, x2, w.to(dtype) if masked else None)
    torch.testing.assert_close(made, wanted, rtol=0, atol=10 * TOLERANCE[dtype], check_dtype=False)


def test_patches_of_air_in_float32():
    "Line integrals in mm with a border of air: a window of air has no variance, however large the values elsewhere."
    torch.manual_seed(0)
    x1 = 300 * torch.rand(1, 1, 90, 90).cumsum(-1) / 90
    x1[..., :30] = 0
    x2 = x1 + 20 * torch.rand_like(x1) * (x1 > 0)
    measure = NormalizedCrossCorrelation2d(7)
    p1, p2 = (to_patches(x.double(), 7) for x in (x1, x2))
    wanted = (measure.norm(p1) * measure.norm(p2)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(measure(x1, x2), wanted.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", range(1, 18))
def test_window_sum(size):
    x, _ = pictures()
    for dim in (-1, -2):
        torch.testing.assert_close(window_sum(x, size, dim), x.unfold(dim, size, 1).sum(-1), rtol=0, atol=FLOAT64)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@every_similarity
def test_hidden_pixels_do_not_count(similarity):
    x1, x2 = pictures()
    mask = torch.ones(1, 1, 18, 21, dtype=torch.bool)
    mask[..., 4:9, 6:15] = False
    wanted = similarity(x1, x2, mask)
    for value in (0.0, 1e3, torch.nan, torch.inf):
        assert torch.equal(
            similarity(x1.masked_fill(~mask, value).requires_grad_(), x2.masked_fill(~mask, -value), mask), wanted
        )
    hidden = x1.masked_fill(~mask, torch.nan).requires_grad_()
    similarity(hidden, x2, mask).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[~mask.expand_as(hidden)].any() and hidden.grad.any()
    assert not torch.equal(similarity(x1.masked_fill(~mask, 0.9), x2), similarity(x1, x2))


@every_similarity
def test_mask_of_ones_is_none(similarity):
    x1, x2 = pictures()
    for mask in (torch.ones(2, 1, 18, 21, dtype=torch.bool), torch.full((1, 1, 18, 21), 3.0)):
        torch.testing.assert_close(similarity(x1, x2, mask), similarity(x1, x2), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("name", ["global", "mutual information", "bits"])
def test_masking_is_cropping(name):
    x1, x2 = pictures()
    mask = torch.zeros(1, 1, 18, 21)
    mask[..., 3:15, 2:19] = 1
    torch.testing.assert_close(
        SIMILARITIES[name](x1, x2, mask),
        SIMILARITIES[name](x1[..., 3:15, 2:19], x2[..., 3:15, 2:19]),
        rtol=0,
        atol=FLOAT64,
    )


def test_masked_gradients_are_those_inside():
    "Within a crop, gradients whose surroundings are inside do not know of the rest; the mask keeps these."
    x1, x2 = pictures()
    mask = torch.zeros(1, 1, 18, 21)
    mask[..., 2:17, 3:20] = 1
    inside = [Sobel(0.7)(x)[..., 5:14, 6:17] for x in (x1, x2)]  # 3 pixels from the border of the crop
    assert Sobel(0.7).radius == 3
    torch.testing.assert_close(
        GradientNormalizedCrossCorrelation2d(sigma=0.7)(x1, x2, mask),
        NormalizedCrossCorrelation2d()(*inside),
        rtol=0,
        atol=FLOAT64,
    )


@every_similarity
def test_one_mask_for_each_picture(similarity):
    x1, x2 = pictures()
    mask = random_weights() + 0.1
    both = similarity(x1, x2, mask)
    for b in range(2):
        torch.testing.assert_close(
            both[b : b + 1], similarity(x1[b : b + 1], x2[b : b + 1], mask[b : b + 1]), rtol=0, atol=FLOAT64
        )
    torch.testing.assert_close(similarity(x1, x2, 7 * mask), both, rtol=0, atol=FLOAT64)  # weights are relative


@every_similarity
def test_nothing_visible(similarity):
    x1, x2 = (x.requires_grad_() for x in pictures())
    score = similarity(x1, x2, torch.zeros(1, 1, 18, 21))
    score.sum().backward()
    assert torch.equal(score, torch.zeros(2, dtype=torch.float64)) and not x1.grad.any() and not x2.grad.any()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, dtypes, constant pictures


@every_similarity
@pytest.mark.parametrize("masked", [False, True], ids=["all pixels", "weights"])
@pytest.mark.parametrize(
    "fast", [pytest.param(True, id="a direction"), pytest.param(False, id="each pixel", marks=pytest.mark.slow)]
)
def test_gradient(similarity, masked, fast):
    x1, x2 = (x[:, :1, :9, :10].clone().requires_grad_() for x in pictures())
    mask = random_weights(2, 9, 10) + 0.1 if masked else None
    assert gradcheck(lambda a, b: similarity(a, b, mask), (x1, x2), fast_mode=fast)


@every_similarity
def test_gradient_in_float32(similarity):
    grads = []
    for dtype in TOLERANCE:
        x1, x2 = (x.to(dtype).requires_grad_() for x in pictures())
        similarity(x1, x2).sum().backward()
        grads.append(x1.grad.double())
    torch.testing.assert_close(
        grads[1], grads[0], rtol=0, atol=1e-4 * grads[0].abs().max().item()
    )  # up to ten times the error of a score, relatively


@every_similarity
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(similarity, dtype):
    x1, x2 = (x.to(dtype).requires_grad_() for x in pictures())
    score = similarity(x1, x2)
    assert score.dtype == torch.float32 and torch.equal(score, similarity(x1.float(), x2.float()))
    score.sum().backward()
    assert x1.grad.dtype == dtype and x1.grad.isfinite().all() and x1.grad.any()


@every_similarity
def test_autocast(similarity):
    x1, x2 = (x.float() for x in pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = similarity(x1, x2)
    assert torch.equal(score, similarity(x1, x2))


@every_similarity
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_constant_pictures(similarity, value, dtype):
    x1, x2 = (torch.full_like(pictures()[0], value, dtype=dtype).requires_grad_() for _ in range(2))
    for a, b in ((x1, pictures()[1].to(dtype)), (x1, x2)):
        score = similarity(a, b)
        torch.testing.assert_close(
            score, torch.zeros(2, dtype=dtype), rtol=0, atol=1e-4
        )  # float32: rounding, divided by the root of eps
        score.sum().backward()
        assert x1.grad.isfinite().all()


@pytest.mark.parametrize("patch_size", [None, 5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_constant_pictures_without_eps(patch_size, dtype):
    measure = NormalizedCrossCorrelation2d(patch_size, eps=0.0)
    x1 = torch.full_like(pictures()[0], 0.1, dtype=dtype).requires_grad_()
    for x2 in (pictures()[1].to(dtype), x1.detach()):
        score = measure(x1, x2)
        score.sum().backward()
        assert not score.any() and x1.grad.isfinite().all()


def test_scale_of_the_picture_without_eps():
    x1, x2 = pictures()
    for patch_size in (None, 5):
        measure = NormalizedCrossCorrelation2d(patch_size, eps=0.0)
        torch.testing.assert_close(
            measure(1e-6 * x1, 1e6 * x2 - 3e6), measure(x1, x2), rtol=0, atol=1e-8
        )  # 1e6 costs some digits


@every_similarity
def test_batch_and_empty_batch(similarity):
    x1, x2 = pictures()
    for b in range(2):
        torch.testing.assert_close(
            similarity(x1[b : b + 1], x2[b : b + 1]), similarity(x1, x2)[b : b + 1], rtol=0, atol=FLOAT64
        )
    assert similarity(x1[:0], x2[:0]).shape == (0,)


@every_similarity
def test_similarities_are_modules_like_any_other(similarity):
    x1, x2 = pictures()
    for twin in (copy.deepcopy(similarity), pickle.loads(pickle.dumps(similarity))):
        assert torch.equal(twin(x1, x2), similarity(x1, x2))
    assert not list(similarity.parameters())


def test_mistakes():
    x1, x2 = pictures()
    with pytest.raises(ValueError, match=r"same shape, not \(2, 2, 18, 21\) and \(1, 2, 18, 21\)"):
        NormalizedCrossCorrelation2d()(x1, x2[:1])
    with pytest.raises(ValueError, match="same dtype"):
        MutualInformation()(x1, x2.float())
    with pytest.raises(ValueError, match=r"mask must have shape .* with B = 2, H = 18, W = 21, not \(18, 21\)"):
        GradientNormalizedCrossCorrelation2d()(x1, x2, torch.ones(18, 21))
    with pytest.raises(ValueError, match="some are negative or NaN"):
        MutualInformation()(x1, x2, torch.full((1, 1, 18, 21), torch.nan))
    with pytest.raises(ValueError, match="patch_size must be at most the size"):
        NormalizedCrossCorrelation2d(19)(x1, x2)
    with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1, not 2.5"):
        MultiscaleNormalizedCrossCorrelation2d([2.5], [1.0])
    with pytest.raises(ValueError, match="sigma must be a positive number, not 0"):
        MutualInformation(sigma=0)
    with pytest.raises(ValueError, match="num_bins must be a whole number of at least 2, not 1"):
        MutualInformation(num_bins=1)


# ---------------------------------------------------------------------------------------------------------------------
# 0.6.1


# What 0.6.1 returns (float64 pictures for the correlations; gradients and mutual information compute in float32). The
# pictures of the gradients end in zeros, so that it does not matter how they are continued.
NUMBERS = {
    "global": [0.8615107, 0.86452803],
    "patches": [0.80436435, 0.82316959],
    "multiscale": [0.83955138, 0.84824625],
    "gradient": [0.99177325, 0.9738754],
    "gradient patches": [0.78071618, 0.69744706],
    "bits": [0.828825, 0.84903765],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_similarities_of_061(name):
    x1, x2 = pictures()
    if "gradient" in name:
        x1, x2 = (F.pad(x[:, :1], (8, 8, 8, 8)).float() for x in (x1, x2))
    if name == "bits":
        x1, x2 = x1[:, :1].float(), x2[:, :1].float()
    torch.testing.assert_close(
        SIMILARITIES[name](x1, x2).double(), torch.tensor(NUMBERS[name], dtype=torch.float64), rtol=0, atol=FLOAT32
    )


def test_poses_of_061():
    arc, translation, both = DoubleGeodesicSE3(1020.0)(*poses())
    torch.testing.assert_close(
        arc, torch.tensor([183.658707, 80.356445, 233.711349]), rtol=0, atol=MILLIMETRES[torch.float32]
    )
    torch.testing.assert_close(
        translation, torch.tensor([12.124414, 12.124444, 12.124377]), rtol=0, atol=MILLIMETRES[torch.float32]
    )
    torch.testing.assert_close(
        both, torch.tensor([184.058472, 81.265984, 234.025635]), rtol=0, atol=MILLIMETRES[torch.float32]
    )
    torch.testing.assert_close(
        LogGeodesicSE3()(*poses()),
        torch.tensor([156.572296, 20.883743, 385.401093]),
        rtol=0,
        atol=MILLIMETRES[torch.float32],
    )


SIGNATURES = {
    "NormalizedCrossCorrelation2d": "(patch_size=None, eps=1e-05)",
    "MultiscaleNormalizedCrossCorrelation2d": "(patch_sizes=[None], patch_weights=[1.0], eps=1e-05)",
    "GradientNormalizedCrossCorrelation2d": "(patch_size=None, sigma=1.0, **kwargs)",
    "MutualInformation": "(sigma=0.1, num_bins=256, epsilon=1e-10, normalize=True)",
    "Sobel": "(sigma)",
    "LogGeodesicSE3": "(*args, **kwargs)",
    "DoubleGeodesicSE3": "(sdd, eps=1e-06)",
    "to_patches": "(x, patch_size)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_of_061(name):
    signature = inspect.signature(getattr(diffdrr.metrics, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[name]


# ---------------------------------------------------------------------------------------------------------------------
# Poses


def turn(axis: int, angle: float, dtype: torch.dtype = torch.float64, translation=(0.0, 0.0, 0.0)) -> RigidTransform:
    "A rotation of the camera about an axis of the world through its origin, and a shift of what it sees."
    rotation = torch.zeros(1, 3, dtype=dtype)
    rotation[0, axis] = angle
    return convert(rotation, torch.tensor([translation], dtype=dtype), parameterization="axis_angle")


def detector(
    dtype: torch.dtype = torch.float64,
    delx: float = 0.5,
    dely: float = 0.8,
    beam: str = "cone",
    reverse_x_axis: bool = True,
) -> Detector:
    "A detector 1000 mm from the source that looks along z at identity."
    return Detector(1000.0, 300, 200, delx, dely, 7.0, -4.0, torch.eye(4), reverse_x_axis=reverse_x_axis, beam=beam).to(
        dtype
    )


@pytest.mark.parametrize("dtype", MILLIMETRES, ids=str)
@pytest.mark.parametrize("angle", [0.0, 1e-4, 1e-3, 0.3, 2.0, math.pi])
@pytest.mark.parametrize("axis", range(3))
def test_angle(dtype, angle, axis):
    pose_1, pose_2 = turn(axis, 0.0, dtype), turn(axis, angle, dtype)
    error = rotation_error(pose_1, pose_2)
    torch.testing.assert_close(error, torch.tensor([angle], dtype=dtype), rtol=0, atol=RADIANS[dtype])
    torch.testing.assert_close(
        rotation_error(pose_1, pose_2, degrees=True), torch.rad2deg(error), rtol=RADIANS[dtype], atol=0
    )
    assert not translation_error(pose_1, pose_2)
    torch.testing.assert_close(DoubleGeodesicSE3(1000.0)(pose_1, pose_2)[0], 500 * error, rtol=RADIANS[dtype], atol=0)


def test_translation_is_that_of_the_origin():
    pose_1, pose_2 = (pose.double() for pose in poses())
    origin = torch.zeros(1, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(
        translation_error(pose_1, pose_2),
        target_registration_error(pose_1, pose_2, origin),
        rtol=0,
        atol=MILLIMETRES[torch.float64],
    )
    torch.testing.assert_close(
        translation_error(pose_1, pose_2),
        (pose_1.convert("matrix")[1] - pose_2.convert("matrix")[1]).norm(dim=-1),
        rtol=0,
        atol=MILLIMETRES[torch.float64],
    )


def naive_errors(
    pose_1: RigidTransform, pose_2: RigidTransform, points: torch.Tensor, camera: Detector
) -> tuple[float, float, float]:
    "mTRE, mPD and mRPD of single poses, point by point, in world coordinates and with the rays of the detector."
    tre, pd, rpd = [], [], []
    motion = pose_2.matrix[0] @ torch.linalg.inv(pose_1.matrix[0])
    source = (pose_2.matrix[0] @ camera.reorient.matrix[0])[:3, 3]
    axis = (pose_2.matrix[0] @ camera.reorient.matrix[0])[:3, 2]
    for p in points:
        tre.append((motion[:3, :3] @ p + motion[:3, 3] - p).norm())
        pixel_1, pixel_2 = (camera.project(pose, p[None, None])[0, 0] for pose in (pose_1, pose_2))
        mm_1, mm_2 = (camera.backproject(pose_1, pixel[None, None])[0, 0] for pixel in (pixel_1, pixel_2))
        pd.append((mm_1 - mm_2).norm())
        shown = camera.backproject(pose_2, pixel_1[None, None])[0, 0]
        ray = axis if camera.beam == "parallel" else (shown - source) / (shown - source).norm()
        rpd.append(((p - shown) - ((p - shown) @ ray) * ray).norm())
    return tuple(float(torch.stack(values).mean()) for values in (tre, pd, rpd))


@pytest.mark.parametrize("beam", ["cone", "parallel"])
@pytest.mark.parametrize("reverse_x_axis", [False, True])
def test_errors_point_by_point(beam, reverse_x_axis):
    torch.manual_seed(0)
    camera = detector(beam=beam, reverse_x_axis=reverse_x_axis)
    camera._reorient.copy_(turn(0, math.pi / 2).matrix[0])
    rotation = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    translation = torch.tensor([[5.0, -850.0, -3.0], [0.0, -700.0, 0.0]], dtype=torch.float64)
    pose_1 = convert(rotation, translation, parameterization="axis_angle")
    pose_2 = convert(
        rotation + 0.05 * torch.randn(2, 3).double(),
        translation + 5 * torch.randn(2, 3).double(),
        parameterization="axis_angle",
    )
    points = 60 * torch.randn(2, 9, 3, dtype=torch.float64)
    made = torch.stack(
        [
            target_registration_error(pose_1, pose_2, points),
            projection_distance(pose_1, pose_2, points, camera),
            reprojection_distance(pose_1, pose_2, points, camera),
        ]
    )
    wanted = [naive_errors(RigidTransform(pose_1[b]), RigidTransform(pose_2[b]), points[b], camera) for b in range(2)]
    torch.testing.assert_close(
        made.mT, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6
    )  # the naive one inverts a matrix of pixels and mm
    for function in (lambda *args: target_registration_error(*args[:3]), projection_distance):
        torch.testing.assert_close(
            function(pose_2, pose_1, points, camera),
            function(pose_1, pose_2, points, camera),
            rtol=0,
            atol=MILLIMETRES[torch.float64],
        )


@pytest.mark.parametrize("dtype", MILLIMETRES, ids=str)
@pytest.mark.parametrize(("delx", "dely"), [(0.2, 0.2), (1.0, 1.0), (3.0, 0.4)])
def test_errors_are_millimetres(dtype, delx, dely):
    """A shift of 3 mm in the plane and one in depth, for points 800 mm from a source 1000 mm from its detector.

    No answer depends on the pixels."""
    camera, k = detector(dtype, delx, dely), 3.0
    true = turn(0, 0.0, dtype, (0.0, 0.0, -800.0))
    grid = torch.tensor([[[0.0, 0, 0], [40, -30, 0], [-10, 20, 0]]], dtype=dtype)
    tolerance = dict(rtol=0, atol=MILLIMETRES[dtype], check_dtype=False)
    for direction in ((k, 0.0), (0.0, k), (0.6 * k, -0.8 * k)):
        estimate = turn(0, 0.0, dtype, (*direction, -800.0))
        torch.testing.assert_close(target_registration_error(true, estimate, grid), torch.tensor([k]), **tolerance)
        torch.testing.assert_close(
            projection_distance(true, estimate, grid, camera), torch.tensor([k * 1000 / 800]), **tolerance
        )
        torch.testing.assert_close(
            reprojection_distance(true, estimate, grid[:, :1], camera), torch.tensor([k]), **tolerance
        )
    deeper, radius = turn(0, 0.0, dtype, (0.0, 0.0, -800.0 - k)), 50.0
    off_axis, on_axis = grid[:, 1:2], grid[:, :1]
    for made, wanted in (
        (target_registration_error(true, deeper, off_axis), k),
        (projection_distance(true, deeper, off_axis, camera), 1000 * radius * (1 / 800 - 1 / 803)),
        (reprojection_distance(true, deeper, off_axis, camera), k * radius / math.hypot(radius, 800)),
        (reprojection_distance(true, deeper, on_axis, camera), 0.0),  # where depth cannot be seen
    ):
        torch.testing.assert_close(made, torch.tensor([wanted], dtype=dtype), rtol=0, atol=MILLIMETRES[dtype])


POSE_METRICS = {
    "rotation": lambda a, b: rotation_error(a, b),
    "translation": lambda a, b: translation_error(a, b),
    "log": lambda a, b: LogGeodesicSE3()(a, b),
    "double": lambda a, b: torch.stack(DoubleGeodesicSE3(1020.0)(a, b)).sum(dim=0),
    "mTRE": lambda a, b: target_registration_error(a, b, POINTS.to(a.matrix)),
    "mPD": lambda a, b: projection_distance(a, b, POINTS.to(a.matrix), detector(a.matrix.dtype)),
    "mRPD": lambda a, b: reprojection_distance(a, b, POINTS.to(a.matrix), detector(a.matrix.dtype)),
}
POINTS = torch.tensor([[[10.0, 20, 30], [-40, 5, 0], [0, 0, 0]]])
every_pose_metric = pytest.mark.parametrize("metric", POSE_METRICS.values(), ids=POSE_METRICS)


@every_pose_metric
def test_gradient_of_pose_metrics(metric):
    rotation, translation = (
        torch.tensor([[0.3, -0.2, 0.1]]).double().requires_grad_(),
        torch.tensor([[5.0, -3, -850]]).double().requires_grad_(),
    )
    other = convert(rotation.detach() + 0.07, translation.detach() - 4, parameterization="axis_angle")
    assert gradcheck(lambda r, t: metric(other, convert(r, t, parameterization="axis_angle")), (rotation, translation))


@every_pose_metric
@pytest.mark.parametrize("dtype", MILLIMETRES, ids=str)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_equal_poses(metric, dtype, angle):
    rotation = torch.tensor([[angle, -angle, 0.5 * angle]], dtype=dtype, requires_grad=True)
    translation = torch.tensor([[5.0, -3, -850]], dtype=dtype, requires_grad=True)
    pose = convert(rotation, translation, parameterization="axis_angle")
    distance = metric(RigidTransform(pose.matrix.detach()), pose)
    # Half of the square root of eps for the combination of 0.6.1; RADIANS times a radius for the rest.
    torch.testing.assert_close(distance, torch.zeros(1, dtype=dtype), rtol=0, atol=1.1e-3 + 1000 * RADIANS[dtype])
    distance.sum().backward()
    assert rotation.grad.isfinite().all() and translation.grad.isfinite().all()


@every_pose_metric
def test_one_pose_against_many(metric):
    pose_1, pose_2 = (pose.double() for pose in distant_poses())
    first = RigidTransform(pose_1[:1])
    many = metric(first, pose_2)
    assert many.shape == (3,)
    for b in range(3):
        torch.testing.assert_close(many[b : b + 1], metric(first, RigidTransform(pose_2[b : b + 1])), rtol=0, atol=1e-8)


@every_pose_metric
def test_pose_metrics_under_autocast(metric):
    pose_1, pose_2 = distant_poses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = metric(pose_1, pose_2)
    assert torch.equal(made, metric(pose_1, pose_2))


def test_pose_metrics_can_be_pickled():
    for metric in (LogGeodesicSE3(), DoubleGeodesicSE3(1020.0, eps=0.0)):
        for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            for made, wanted in zip(twin(*poses()), metric(*poses())):
                assert torch.equal(made, wanted)


def test_points_that_do_not_fit():
    pose_1, pose_2 = poses()
    with pytest.raises(ValueError, match=r"give one set of points as points\[None\]"):
        target_registration_error(pose_1, pose_2, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="N at least 1"):
        projection_distance(pose_1, pose_2, torch.zeros(1, 0, 3), detector(torch.float32))
    with pytest.raises(
        ValueError, match="points and pose must have the same dtype, not torch.float64 and torch.float32"
    ):
        reprojection_distance(pose_1, pose_2, torch.zeros(1, 4, 3).double(), detector(torch.float32))
    with pytest.raises(ValueError, match="sdd must be a positive number, not -1.0"):
        DoubleGeodesicSE3(-1.0)


# Against other libraries


def test_correlation_is_that_of_scipy():
    x1, x2 = pictures()
    expected = [[pearsonr(a.flatten(), b.flatten()).statistic for a, b in zip(*pair)] for pair in zip(x1, x2)]
    found = NormalizedCrossCorrelation2d(eps=0.0)(x1, x2)
    assert found.numpy() == pytest.approx(np.mean(expected, axis=1), abs=FLOAT64)


def test_correlation_in_patches_is_made_of_scipy_s_windows():
    x1, x2 = (x[:1, :1] for x in pictures())
    size, inside = 5, (slice(2, -2), slice(2, -2))  # windows that lie in the picture

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, size)[inside]

    a, b = (x[0, 0].numpy() for x in (x1, x2))
    expected = (mean(a * b) - mean(a) * mean(b)) / np.sqrt((mean(a * a) - mean(a) ** 2) * (mean(b * b) - mean(b) ** 2))
    assert NormalizedCrossCorrelation2d(patch_size=size, eps=0.0)(x1, x2).item() == pytest.approx(
        expected.mean(), abs=1e-9
    )  # cancellation in the variances


def test_gradients_are_those_of_scikit_image():
    filters = pytest.importorskip("skimage.filters", reason="scikit-image comes with the extra [xray]")
    image = pictures()[0][:1, :1]
    found = Sobel(sigma=0)(image)[0].numpy()
    for gradient, axis in zip(found, (1, 0)):
        np.testing.assert_allclose(
            -gradient, 4 * filters.sobel(image[0, 0].numpy(), axis=axis, mode="nearest"), atol=1e-12
        )  # scikit-image divides by 4


def test_rotation_errors_are_those_of_scipy():
    pose_1, pose_2 = poses()
    expected = (
        Rotation.from_matrix(pose_1.rotation.numpy()).inv() * Rotation.from_matrix(pose_2.rotation.numpy())
    ).magnitude()
    np.testing.assert_allclose(rotation_error(pose_1, pose_2).numpy(), expected, atol=1e-6)
