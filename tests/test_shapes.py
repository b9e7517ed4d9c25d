"""The hook that verifies the shapes in annotations while tests run (see tools/shapes.py)."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tools.shapes import MARK, WrongShape, is_installed, verified, verify_namespace


def swap(points: Float[Tensor, "B N 3"], wrong: bool = False) -> Float[Tensor, "N B 3"]:
    if points.shape[-1] != 3:
        raise ValueError("points must have shape (B, N, 3)")
    return points if wrong else points.transpose(0, 1)


class Grid:
    def __init__(self, corner: Float[Tensor, "3"] | None = None):
        self.corner = corner

    @property
    def middle(self) -> Float[Tensor, "3"]:
        return torch.zeros(2)

    @staticmethod
    def both(
        a: Float[Tensor, "*batch 3"], b: Float[Tensor, "*#batch 3"]
    ) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, ""]]:
        return a + b, (a + b).sum()


def test_annotations_that_are_true_pass():
    assert verified(swap)(torch.zeros(2, 5, 3)).shape == (5, 2, 3)


def test_a_result_of_another_shape_is_found():
    with pytest.raises(WrongShape, match=r"swap: return is a torch.float32 tensor of shape \(2, 5, 3\)"):
        verified(swap)(torch.zeros(2, 5, 3), wrong=True)


def test_an_argument_of_another_dtype_is_found():
    with pytest.raises(WrongShape, match="points is a torch.int64 tensor"):
        verified(swap)(torch.zeros(2, 5, 3, dtype=torch.int64))


def test_errors_of_the_function_pass_through():
    with pytest.raises(ValueError, match="points must have shape"):
        verified(swap)(torch.zeros(2, 5, 4))


def test_methods_and_properties_are_verified():
    verify_namespace({"Grid": Grid}, __name__)
    Grid(torch.zeros(3)), Grid()
    Grid.both(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(WrongShape, match="corner is"):
        Grid(torch.zeros(4))
    with pytest.raises(WrongShape, match="middle: return is"):
        Grid().middle
    with pytest.raises(WrongShape, match="b is"):
        Grid.both(torch.zeros(4, 3), torch.zeros(2, 4, 3))


def test_a_compiled_function_is_left_alone():
    compiled = torch.compile(verified(swap), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2, 5, 3)).shape == (5, 2, 3)
    torch.compiler.reset()


def test_the_package_is_verified(request: pytest.FixtureRequest):
    if not is_installed():
        pytest.skip("switched off by --no-shapes")
    from diffdrr.geometry import RigidTransform

    assert any(getattr(getattr(member, "fget", member), MARK, False) for member in vars(RigidTransform).values())


def test_what_was_right_once_is_verified_again_with_other_shapes():
    once = verified(swap)
    once(torch.zeros(2, 5, 3))
    with pytest.raises(WrongShape, match="swap: return is"):
        once(torch.zeros(2, 5, 3), True)
    with pytest.raises(WrongShape, match="points is a torch.float32 tensor"):
        once(torch.zeros(5, 3))
