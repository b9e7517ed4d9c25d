"""The names of diffdrr 0.6.1 that were in this module: see rendering."""

from .geometry import (
    Detector,
    RigidTransform,
    convert,
)
from .rendering import (
    DRR,
    Siddon,
    Trilinear,
    reshape_subsampled_drr,
)

__all__ = [
    "DRR",
]
