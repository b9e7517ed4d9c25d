"""The names of diffdrr 0.6.1 that were in this module: see kernels.reference, rendering."""

from .kernels.reference import (
    reduce,
)
from .rendering import (
    Siddon,
    Trilinear,
)

__all__ = [
    "Siddon",
    "Trilinear",
]
