"""Check a built website: links, anchors, pictures and what is said of them, formulas, and markup that was not rendered.

Usage: python -m tools.check_site FOLDER"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
UNREAD_TAGS = {"script", "style", "code", "pre"}
MARKUP_LEFTOVER = re.compile(
    r"""(?m:^):{3,}[^\n]*            # a fence of a callout or of tabs
    | \{[#.][\w-]+[^}\n]*\}        # attributes
    | (?<![\w/])@(?:fig|eq|sec|tbl)-[\w-]+   # a cross-reference
    | \{\{<[^\n]*                   # a shortcode
    | (?<!\w)\[[^\]\n]*\]\([^)\s]+\)  # a link""",
    re.VERBOSE,
)
TEX_LEFTOVER = re.compile(
    r"""\$\$
    | \\(?:begin|end|frac|sum|int|mathbf|mathrm|text|left|right|alpha|mu|cdot|times)\b
    | \\[()[\]]
    | (?<![\w$])\$[^\s$][^$\n]*(?<!\s)\$(?![\w$])""",
    re.VERBOSE,
)
LOADED_BY_STYLE = re.compile(r"""url\(["']?((?:https?:)?//[^"')]+)""")
TRACEBACK = "Traceback (most recent call last)"
NOT_SHOWN = "<IPython.core.display."  # what an output is called that the page cannot show
KATEX_CHECK = """
const katex = require(process.argv[1]), formulas = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify(formulas.map(([tex, display]) => {
  try { katex.renderToString(tex, { displayMode: display }); return null; } catch (error) { return error.message; }
})));"""


class Formula(NamedTuple):
    tex: str
    display: bool  # whether it has a line of its own


class Page(HTMLParser):
    "What a page holds: anchors, links, what it loads, pictures nobody describes, prose, formulas, all its text."

    def __init__(self, html: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.undescribed: list[str] = []  # pictures without alternative text
        self.prose = ""
        self.text = ""
        self.formulas: list[Formula] = []
        self._open: list[tuple[str, bool]] = []  # open tags, and whether each is a formula
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = {name: value or "" for name, value in attrs}
        classes = attributes.get("class", "").split()
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag in ("script", "img") or (tag == "link" and "stylesheet" in attributes.get("rel", "")):
            self.loaded += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img" and not attributes.get("alt", "").strip():
            self.undescribed.append(attributes.get("src", ""))
        if tag not in VOID_TAGS:
            self._open.append((tag, "math" in classes))
        if "math" in classes:
            self.formulas.append(Formula("", "display" in classes))

    def handle_endtag(self, tag: str) -> None:
        names = [name for name, _ in self._open]
        if tag in names:
            del self._open[len(names) - 1 - names[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        tags = {name for name, _ in self._open}
        if not tags & {"script", "style"}:
            self.text += data
        if any(is_formula for _, is_formula in self._open):
            self.formulas[-1] = self.formulas[-1]._replace(tex=self.formulas[-1].tex + data)
        elif not tags & UNREAD_TAGS:
            self.prose += data


def read_pages(root: Path) -> dict[Path, Page]:
    "Read all pages of a website."
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.html"))}


def resolve(
    link: str,  # link as it stands in a page
    page: Path,  # file of the page
    root: Path,  # folder of the website
) -> tuple[Path, str] | None:  # file and anchor that it leads to, None where it leaves the website
    "Follow a link."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path, anchor = unquote(parts.path), unquote(parts.fragment)
    if not path:
        return page, anchor
    target = (root / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    return (target / "index.html" if target.is_dir() else target), anchor


def link_problems(links: list[str], page: Path, pages: dict[Path, Page], root: Path) -> list[str]:
    "List the links of a page that lead nowhere."
    problems = []
    for link in links:
        target, anchor = resolve(link, page, root) or (None, "")
        if target is None:
            continue
        if not target.is_file():
            problems.append(f"nothing at {link!r}")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            problems.append(f"no anchor {link!r}")
    return problems


def content_problems(page: Page) -> list[str]:
    "List what a page shows or loads that it should not."
    problems = [f"needs the network: {address}" for address in page.loaded if urlsplit(address).netloc]
    problems += [f"markup not rendered: {match[0].strip()!r}" for match in MARKUP_LEFTOVER.finditer(page.prose)]
    problems += [f"TeX not rendered: {match[0]!r}" for match in TEX_LEFTOVER.finditer(page.prose)]
    problems += [f"no alternative text (fig-alt): {source[:60]!r}" for source in page.undescribed]
    if TRACEBACK in page.text:
        problems.append("shows a traceback")
    if NOT_SHOWN in page.text:
        problems.append("an output is not shown, only named: display pictures as PNG or GIF, and others by HTML")
    return problems


def style_problems(root: Path) -> list[str]:
    "List what style sheets load from other websites."
    sheets = sorted(root.rglob("*.css"))
    found = (
        (sheet, address) for sheet in sheets for address in LOADED_BY_STYLE.findall(sheet.read_text(encoding="utf-8"))
    )
    return [f"{sheet.relative_to(root)}: needs the network: {address}" for sheet, address in found]


def search_problems(root: Path, pages: dict[Path, Page]) -> list[str]:
    "List the results of the search that lead nowhere."
    index = root / "search.json"
    entries = json.loads(index.read_text(encoding="utf-8")) if index.exists() else []
    return link_problems([entry["href"] for entry in entries], index, pages, root)


def tex_of(formula: Formula) -> str:
    "Take the delimiters off a formula."
    tex = formula.tex.strip()
    return tex[2:-2] if tex.startswith((r"\(", r"\[")) else tex


def formula_problems(formulas: list[Formula], katex: Path) -> list[str]:
    "List the formulas that KaTeX can not show; Node.js runs it."
    request = json.dumps([[tex_of(formula), formula.display] for formula in formulas])
    answer = subprocess.run(
        ["node", "-e", KATEX_CHECK, str(katex)], input=request, capture_output=True, text=True, check=True
    )
    return [
        f"{message} in the formula {formula.tex!r}"
        for formula, message in zip(formulas, json.loads(answer.stdout))
        if message
    ]


def katex_of(root: Path) -> Path | None:
    "Find the KaTeX of a website; None where there is none, or no Node.js to run it."
    katex = root / "site_libs" / "katex" / "katex.min.js"
    return katex if katex.exists() and shutil.which("node") else None


def problems_of(root: Path) -> list[str]:
    "List everything that is wrong with the website in a folder."
    root = root.resolve()
    pages = read_pages(root)
    if not pages:
        return [f"{root} holds no pages"]
    katex = katex_of(root)
    found = style_problems(root) + [f"search.json: {problem}" for problem in search_problems(root, pages)]
    for path, page in pages.items():
        problems = link_problems(page.links, path, pages, root) + content_problems(page)
        if katex and page.formulas:
            problems += formula_problems(page.formulas, katex)
        found += [f"{path.relative_to(root)}: {problem}" for problem in problems]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a built website.")
    parser.add_argument("folder", type=Path, help="folder of the website")
    folder = parser.parse_args().folder
    problems = problems_of(folder)
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} problems in the website"]))
    formulas = (
        "no formula that KaTeX cannot show"
        if katex_of(folder.resolve())
        else "formulas not checked (that needs Node.js and KaTeX)"
    )
    print(
        f"{len(list(folder.rglob('*.html')))} pages: no dead link or anchor, no picture missing or without a text, "
        f"nothing left unrendered, {formulas}"
    )


if __name__ == "__main__":
    main()
