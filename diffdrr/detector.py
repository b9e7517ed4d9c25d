"""The names of diffdrr 0.6.1 that were in this module: see geometry."""

from .geometry import (
    Detector,
    RigidTransform,
    get_focal_length,
    get_principal_point,
    make_intrinsic_matrix,
    parse_intrinsic_matrix,
)

__all__ = [
    "Detector",
    "get_focal_length",
    "get_principal_point",
    "parse_intrinsic_matrix",
    "make_intrinsic_matrix",
]
