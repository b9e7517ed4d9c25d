"""The tiles of the gallery: the first picture of each page that it lists, made small when the website is built.

Git holds each picture once, in the notebook; the gallery is a listing of Quarto's, in nbs/gallery/index.qmd."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from tools.readme import DIRECTIVE

INDEX = "gallery/index.qmd"
TILES = "gallery/tiles"
TILE_SIZE = (480, 480)  # pixels at most
KINDS = ("image/png", "image/gif")


class Picture(NamedTuple):
    content: bytes  # of a PNG or GIF file
    alt: str  # what it shows


def listed_pages(
    root: Path,  # folder of the notebooks
) -> list[Path]:
    "List the pages that the gallery shows. Raises a `FileNotFoundError` for one that is not there."
    front = (root / INDEX).read_text(encoding="utf-8").split("---\n")[1]
    names = (name for part in yaml.safe_load(front)["listing"] for name in part["contents"])
    return [(root / INDEX).parent.joinpath(name).resolve(strict=True) for name in names]


def first_picture(
    notebook: dict,
) -> Picture | None:
    "Find the first picture that a notebook shows, with its alternative text."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            kind = next((kind for kind in KINDS if kind in output.get("data", {})), None)
            if kind:
                directives = dict(DIRECTIVE.findall("".join(cell["source"])))
                alt = str(yaml.safe_load(directives.get("fig-alt", "")) or "")
                return Picture(base64.b64decode("".join(output["data"][kind])), alt)
    return None


def make_tile(
    content: bytes,  # of a PNG or GIF file
) -> bytes:  # of a JPEG file
    "Make a picture small; of a film, take the first frame."
    with Image.open(io.BytesIO(content)) as image:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        tile = Image.alpha_composite(white, image).convert("RGB")
    tile.thumbnail(TILE_SIZE)
    file = io.BytesIO()
    tile.save(file, "jpeg", quality=85)
    return file.getvalue()


def add_tiles(
    root: Path,  # folder of the notebooks that nbdev processed
) -> list[str]:  # pages without a picture
    "Write the tiles, and tell each page that the gallery lists which one is its own."
    if not (root / INDEX).exists():
        return []
    problems = []
    (root / TILES).mkdir(parents=True, exist_ok=True)
    for page in listed_pages(root):
        notebook = json.loads(page.read_text(encoding="utf-8"))
        picture = first_picture(notebook)
        if picture is None:
            problems.append(f"{page.name}: the gallery lists it, but it shows no picture")
            continue
        tile = root / TILES / f"{page.stem}.jpg"
        tile.write_bytes(make_tile(picture.content))
        header = notebook["cells"][0]
        front = yaml.safe_load("".join(header["source"]).strip().strip("-"))
        front |= {"image": Path(os.path.relpath(tile, page.parent)).as_posix(), "image-alt": picture.alt}
        header["source"] = f"---\n{yaml.safe_dump(front, allow_unicode=True)}---\n"
        page.write_text(json.dumps(notebook), encoding="utf-8")
    return problems
