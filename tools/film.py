"""Make the picture that moves at the top of the README: the built-in example, turned once, as a radiograph, its bones
alone, and the derivative of the picture with respect to the angle.

Usage: python -m tools.film"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

import diffdrr as dd
from tools.rooms import ROOT

PATH = ROOT / "nbs" / "images" / "turn.webp"
BONES = "rib_|vertebrae|sternum|scapula|clavicula|humerus|cartilage"
TITLES = ("radiograph", "bones alone", "derivative by the angle")
FRAMES, PIXELS, CAPTION = 36, 200, 22  # one turn; rows and columns of each picture; height of the titles, pixels
CAMERA = dict(sdd=1020.0, height=PIXELS, delx=2.0)


def scenes() -> tuple[dd.DRR, dd.DRR, dd.DRR]:
    "Load the example, its bones alone, and a smooth version of it: where voxels have edges, so has the derivative."
    whole = dd.load_example_ct()
    names = whole.structures.structure
    bones = set(whole.structures[names.str.contains(BONES)].id) & set(whole.mask.data.unique().tolist())
    smooth = dd.load_example_ct(shape=(90, 90, 83), spacing=(4.0, 4.0, 4.0))
    return (
        dd.DRR(whole, **CAMERA),
        dd.DRR(dd.load_example_ct(labels=sorted(bones)), **CAMERA),
        dd.DRR(smooth, renderer="trilinear", **CAMERA),
    )


def turned(
    angle: float,  # about the long axis, degrees
) -> dd.RigidTransform:
    "Turn the camera around the patient."
    rotation, translation = torch.tensor([[angle, 0.0, 0.0]]), torch.tensor([[0.0, 850.0, 0.0]])
    return dd.convert(rotation, translation, parameterization="euler_angles", convention="ZXY", degrees=True)


def as_rgb(
    picture: torch.Tensor,  # (H, W)
    low: float,
    high: float,
    cmap: str = "gray",  # of matplotlib
) -> np.ndarray:  # (H, W, 3) uint8
    "Colour a picture between two values."
    return (255 * plt.get_cmap(cmap)(((picture - low) / (high - low)).numpy())[..., :3]).astype(np.uint8)


def frame(
    whole: dd.DRR,
    bones: dd.DRR,
    smooth: dd.DRR,
    angle: float,  # degrees
) -> Image.Image:
    "Draw the three pictures of one angle, with their titles."
    pose = turned(angle)
    with torch.no_grad():
        picture, skeleton = whole(pose), bones(pose)
        _, derivatives = smooth.jacobian(pose, n_points=None)
    slope = derivatives[0, 5]  # mm of water for a turn of one radian about the world's z
    panels = as_rgb(picture[0, 0], 0, 140), as_rgb(skeleton[0, 0], 0, 45), as_rgb(slope, -200, 200, "RdBu_r")
    drawn = Image.new("RGB", (3 * PIXELS, PIXELS + CAPTION))
    drawn.paste(Image.fromarray(np.hstack(panels)), (0, CAPTION))
    for number, title in enumerate(TITLES):
        place = (number * PIXELS + PIXELS // 2, CAPTION // 2)
        ImageDraw.Draw(drawn).text(place, title, fill="white", anchor="mm", font=ImageFont.load_default(13))
    return drawn


def main() -> None:
    drrs = scenes()
    first, *rest = (frame(*drrs, 360 * n / FRAMES) for n in tqdm(range(FRAMES)))
    partial = PATH.with_name(PATH.name + ".partial")
    first.save(partial, format="WEBP", save_all=True, append_images=rest, duration=100, loop=0, quality=40, method=6)
    partial.replace(PATH)
    print(f"{PATH.relative_to(ROOT)}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
