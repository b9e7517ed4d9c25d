"""The names of diffdrr 0.6.1 that were in this module: see rendering."""

from .rendering import (
    PinholeCamera,
    get_pinhole_camera,
    resample,
)

__all__ = [
    "resample",
    "get_pinhole_camera",
]
