"""Write README.md from the index notebook, or check that it is up to date.

Code, what it prints and its pictures come along; pictures go to nbs/images/index-N.png. Links between notebooks
become links to the website, links to other files become links within the repository, callouts become those of
GitHub, cards a list.

Usage: python -m tools.readme [--check]
"""

from __future__ import annotations

import argparse
import base64
import json
import posixpath
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from nbdev.config import get_config

NOTE = "<!-- Made from nbs/index.ipynb by `python -m tools.readme`: edit the notebook. -->"
IMAGES = "images"
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\"\s]+)")
CALLOUT = re.compile(r"^:::+ *\{\.callout-(\w+)[^}]*\} *\n(.*?)^:::+ *$", re.DOTALL | re.MULTILINE)
CARDS = re.compile(r"^:::+ *\{\.cards\} *\n\s*(.*?)\s*^:::+ *$", re.DOTALL | re.MULTILINE)  # on GitHub, a list
CALLOUT_TITLE = re.compile(r"^\s*#+ +(.*)\n")
GITHUB_CALLOUTS = {"note", "tip", "important", "warning", "caution"}
DIRECTIVE = re.compile(r"^#\| *([\w-]+) *:? *(.*)$", re.MULTILINE)


class Readme(NamedTuple):
    text: str  # Markdown
    images: dict[str, bytes]  # PNG files by their path below nbs


def relink(
    text: str,  # Markdown of the index notebook
    website: str,  # address of the website
) -> str:  # Markdown of the README
    "Make links work from the top of the repository: pages lead to the website, other files to their place below nbs."

    def target(match: re.Match) -> str:
        start, link = match.groups()
        path, hash_, anchor = link.partition("#")
        if not path or urlsplit(link).scheme:
            return match[0]
        folder, name = posixpath.split(path)
        page = re.fullmatch(r"(?:\d+[a-z]?_)?(.+)\.(?:ipynb|md|qmd)", name)
        if page and not path.startswith(".."):
            return f"{start}{website}/{posixpath.join(folder, page[1])}.html{hash_}{anchor}"
        return f"{start}{posixpath.normpath(posixpath.join('nbs', path))}{hash_}{anchor}"

    return LINK.sub(target, text)


def callouts(text: str) -> str:
    "Turn callouts of Quarto into those of GitHub."

    def quote(match: re.Match) -> str:
        kind, body = match.groups()
        if kind not in GITHUB_CALLOUTS:
            raise ValueError(f"GitHub has no callout {kind!r}: use one of {', '.join(sorted(GITHUB_CALLOUTS))}")
        body = CALLOUT_TITLE.sub(r"**\1**\n", body).strip()
        return "\n".join(f"> {line}".rstrip() for line in [f"[!{kind.upper()}]", *body.splitlines()])

    return CALLOUT.sub(quote, text)


def convert_prose(source: str, website: str) -> str:
    "Turn a text cell into Markdown that GitHub shows."
    converted = CARDS.sub(r"\1", callouts(source))
    if re.search(r"^:::", converted, re.MULTILINE):
        raise ValueError(
            f"GitHub can not show this cell of the index notebook, which has a block other than a callout:\n{source}"
        )
    return relink(converted, website).strip()


def is_off(directives: dict[str, str], name: str) -> bool:
    "Tell whether a directive such as `echo: false` switches something off."
    return directives.get(name, "").strip().lower() == "false"


def output_text(output: dict) -> str:
    "Return what an output says in plain text; nothing for a picture."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output.get("data", {})
    return "" if "image/png" in data else "".join(data.get("text/plain", ""))


def output_images(outputs: Iterable[dict]) -> list[bytes]:
    "Return the pictures among outputs, as PNG files."
    pictures = (output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    return [base64.b64decode("".join(picture)) for picture in pictures]


def convert_code(
    cell: dict,  # code cell
    first_image: int,  # number of its first picture
) -> tuple[list[str], dict[str, bytes]]:  # blocks of Markdown; pictures by their path below nbs
    "Turn a code cell and its outputs into Markdown, as far as its directives show them."
    source = "".join(cell["source"])
    directives = dict(DIRECTIVE.findall(source))
    if "hide" in directives or is_off(directives, "include"):
        return [], {}
    blocks, images = [], {}
    code = DIRECTIVE.sub("", source).strip()
    if code and not is_off(directives, "echo"):
        blocks.append(f"```python\n{code}\n```")
    if is_off(directives, "output"):
        return blocks, {}
    printed = "".join(map(output_text, cell["outputs"])).rstrip()
    if printed:
        blocks.append(f"```text\n{printed}\n```")
    for number, picture in enumerate(output_images(cell["outputs"]), first_image):
        path = f"{IMAGES}/index-{number}.png"
        images[path] = picture
        blocks.append(f"![{directives.get('fig-alt') or directives.get('fig-cap') or 'Figure'}](nbs/{path})")
    return blocks, images


def convert(
    notebook: dict,  # the index notebook
    website: str,  # address of the website
) -> Readme:
    "Convert the index notebook."
    blocks, images = [NOTE], {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            blocks.append(convert_prose("".join(cell["source"]), website))
        elif cell["cell_type"] == "code":
            more_blocks, more_images = convert_code(cell, len(images) + 1)
            blocks += more_blocks
            images |= more_images
    return Readme("\n\n".join(blocks) + "\n", images)


def files_of(readme: Readme) -> dict[str, bytes]:
    "List the files of a README by their paths in the repository."
    return {"README.md": readme.text.encode()} | {f"nbs/{path}": picture for path, picture in readme.images.items()}


def stale_images(root: Path, files: dict[str, bytes]) -> list[Path]:
    "List pictures of earlier versions of the index notebook."
    return [
        path
        for path in sorted((root / "nbs" / IMAGES).glob("index-*.png"))
        if path.relative_to(root).as_posix() not in files
    ]


def differences(root: Path, readme: Readme) -> list[str]:
    "List the files in the repository that differ from what the index notebook makes."
    files = files_of(readme)
    changed = [
        name for name, content in files.items() if not (root / name).is_file() or (root / name).read_bytes() != content
    ]
    return changed + [path.relative_to(root).as_posix() for path in stale_images(root, files)]


def write(root: Path, readme: Readme) -> None:
    "Write the README and its pictures, each under another name first."
    files = files_of(readme)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(path)
    for path in stale_images(root, files):
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write README.md from the index notebook.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README.md is not up to date")
    check = parser.parse_args().check
    config = get_config()
    notebook = json.loads((config.nbs_path / config.readme_nb).read_text(encoding="utf-8"))
    readme = convert(notebook, config.doc_host + config.doc_baseurl)
    if not check:
        write(config.config_path, readme)
    elif changed := differences(config.config_path, readme):
        sys.exit(f"{', '.join(changed)}: not what nbs/{config.readme_nb} makes; run `python -m tools.readme`")


if __name__ == "__main__":
    main()
