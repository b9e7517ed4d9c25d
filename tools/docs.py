"""Build the website without Quarto: nbdev processes the notebooks, smalldocs turns them into pages.

smalldocs reads the same `_quarto.yml` as Quarto; users of Quarto run `nbdev_docs` instead. KaTeX, which shows the
mathematics, comes from the npm registry once and is kept in .cache, so that the website itself needs no network.

Usage: python -m tools.docs
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath

import nbdev.doclinks
import smalldocs.layout
from execnb.nbio import read_nb
from IPython.core.interactiveshell import InteractiveShell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.config import load
from smalldocs.site import Page, Site

from tools.gallery import add_tiles
from tools.rooms import ROOMS, door_names

KATEX_VERSION = "0.16.22"
KATEX_PLACEHOLDER = "KATEX-FOLDER"
MIXED_CELL = "Found cells containing imports and other code"
NESTED_LINK = re.compile(r"\[\[(`[^`]+`)\]\([^)]*\)\](\([^)]*\))")
FONTS_ELSEWHERE = re.compile(r"@import url\(https:[^)]*\);")
DOCUMENTED = re.compile(r"^(####?) (\w+)$", re.MULTILINE)  # the heading of a symbol; at the fourth level, it is folded
SCRIPTS = ("synonyms.js", "search.js", "sidebar.js", "folds.js")  # on every page
KATEX_UNUSED = ("*.mjs", "*.woff", "*.ttf", "*.md", "katex.css", "katex.js", "katex-swap*")


class NbdevSite(Site):
    """A website of nbdev: pages have the names that nbdev gives them, and nbdev's absolute links to them become
    relative."""

    def __init__(
        self,
        source: Path,  # folder of the processed notebooks
        output: Path,  # folder to write the website to
        url: str,  # where nbdev says that the website is
    ):
        super().__init__(load(source), quiet=True)
        self.out = output
        self.url = url.rstrip("/") + "/"

    def warn(self, msg: str) -> None:
        "Keep a warning, unless it says that smalldocs does not know the names of nbdev, which this class does."
        if not msg.endswith("output-file is not read by smalldocs"):
            super().warn(msg)

    def read(self, src: PurePosixPath) -> Page:
        "Read a page and give it its name: `01_so3.ipynb` becomes `so3.html`."
        page = super().read(src)
        name = page.front.get("output-file")
        return replace(page, out=src.with_name(name)) if name else page

    def find_page(self, target: PurePosixPath) -> Page | None:
        "Find a page by its source or by its name."
        by_name = (page for page in self.pages.values() if page.out == target)
        return super().find_page(target) or next(by_name, None)

    def resolve(self, href: str, page: Page | None, record: bool = True) -> str:
        "Rewrite a link, a link to this website as one from its root."
        if href and href.startswith(self.url):
            href = "/" + href.removeprefix(self.url)
        return super().resolve(href, page, record)


def mixed_cell_problem(message: str, notebooks: Path) -> str:
    "Say in which notebook the cell is that nbdev warns of."
    source = message.split("---\n")[1].strip()
    cells = ((path, cell) for path in sorted(notebooks.rglob("*.ipynb")) for cell in read_nb(path).cells)
    names = {path.name for path, cell in cells if source in cell.source}
    return f"{', '.join(sorted(names))}: imports need a cell of their own, without other code:\n{source}"


def documented_names(module: str) -> set[str]:
    "Read the names that a module documents."
    path = Path(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    found = re.search(r"^__all__ = (\[.*?\])", source, re.DOTALL | re.MULTILINE)
    return set(ast.literal_eval(found[1])) if found else set()


def link_documented_names(library: str) -> None:
    "Let names in backticks lead to what is documented: to names behind front doors first, never to private ones."
    lookup = NbdevLookup()
    places: dict[str, list[tuple]] = {}
    for module, symbols in lookup.entries[library]["syms"].items():
        room, documented = module.split(".")[1], documented_names(module)
        offered = door_names(room) if room in ROOMS else set()
        for qualified, place in symbols.items():
            short = qualified.removeprefix(f"{module}.")
            top, others = short.split(".")[0], places.setdefault(short, [])
            if top in documented:
                others.insert(0 if top in offered else len(others), place)
            else:
                lookup.syms.pop(qualified, None)
    for short, found in places.items():
        lookup.syms.pop(short, None)
        if found:
            lookup.syms[short] = found[0]


def offered_names(
    notebook: dict,  # of the reference, processed
) -> str:  # Markdown; nothing for a page that documents no symbol
    "Say which of the symbols that a page documents its room offers."
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    documented = ("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    found = [match for text in documented if "```python" in text for match in DOCUMENTED.findall(text)[:1]]
    names = [name for level, name in found if level == "###"]
    if names:
        return f"**Offered here:** {', '.join(f'[`{name}`](#{name.lower()})' for name in names)}."
    return "Inside of its room: nothing of this page is offered to others." if found else ""


def put_public_names_first(reference: Path) -> None:
    "Begin each page of the reference with the names that it offers."
    for path in reference.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        offered = offered_names(notebook)
        if offered:
            notebook["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": offered})
            path.write_text(json.dumps(notebook), encoding="utf-8")


def leave_shells_as_they_are() -> None:
    """Let Python end at once: for the shell of each notebook that nbdev processed, IPython would clear the names then,
    which takes as long as building the website."""
    InteractiveShell.atexit_operations = lambda shell: None


def process(notebooks: Path) -> tuple[Path, list[str]]:
    "Let nbdev process the notebooks; return the folder with the results, and what is wrong with them."
    leave_shells_as_they_are()
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    link_documented_names(get_config().lib_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=MIXED_CELL)
        folder = Path(proc_nbs(n_workers=0, force=True))
    for path in folder.rglob("*.ipynb"):  # nbdev makes links of names, even within the author's links, which go first
        path.write_text(NESTED_LINK.sub(r"[\1]\2", path.read_text(encoding="utf-8")), encoding="utf-8")
    put_public_names_first(folder / "api")
    messages = [str(warning.message) for warning in caught]
    return folder, [mixed_cell_problem(message, notebooks) for message in messages if message.startswith(MIXED_CELL)]


def download_katex(folder: Path) -> None:
    "Unpack KaTeX from the npm registry into a folder."
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", f"katex@{KATEX_VERSION}"]
        packed = subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.PIPE, text=True)
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            archive.extractall(scratch, filter="data")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(Path(scratch) / "package" / "dist", partial, ignore=shutil.ignore_patterns(*KATEX_UNUSED))
        partial.rename(folder)


def katex(cache: Path) -> Path | None:
    "Return the folder with KaTeX, or None with a warning if it can not be had."
    folder = cache / f"katex-{KATEX_VERSION}"
    try:
        if not folder.exists():
            download_katex(folder)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(
            f"Warning: formulas will show as TeX source, for want of KaTeX ({error}). Install Node.js, whose npm "
            "fetches it, or\n"
            f"unpack the folder dist of the npm package katex@{KATEX_VERSION} as {folder}",
            file=sys.stderr,
        )
        return None
    return folder


def bundle_katex(
    site: Path,  # folder of the website
    folder: Path | None,  # folder with KaTeX, None to do without it
) -> None:
    "Make every page with formulas use the website's own copy of KaTeX."
    if folder:
        shutil.copytree(folder, site / "site_libs" / "katex")
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        if folder:
            up = "../" * (len(page.relative_to(site).parts) - 1)
            html = html.replace(KATEX_PLACEHOLDER, f"{up}site_libs/katex")
        else:
            html = re.sub(
                rf"<link[^>]*{KATEX_PLACEHOLDER}[^>]*>|<script[^>]*{KATEX_PLACEHOLDER}[^>]*></script>", "", html
            )
        page.write_text(html, encoding="utf-8")


def drop_fonts_elsewhere(site: Path) -> None:
    "Let pages use the fonts of the reader's machine, instead of asking another website for those of a theme."
    for sheet in (site / "site_libs" / "themes").glob("*.css"):
        sheet.write_text(FONTS_ELSEWHERE.sub("", sheet.read_text(encoding="utf-8")), encoding="utf-8")


def build() -> list[str]:
    "Build the website of the project in the current folder; return what is wrong with it."
    config = get_config()
    if config.lib_name not in NbdevLookup().entries:
        sys.exit(
            f"{config.lib_name} is not installed here, so that names would not link to their documentation: run `make "
            "docs`"
        )
    output = Path(config.doc_path)
    shutil.rmtree(output, ignore_errors=True)
    smalldocs.layout.KATEX = KATEX_PLACEHOLDER
    source, problems = process(config.nbs_path)
    problems += add_tiles(source)
    site = NbdevSite(source, output, config.doc_host + config.doc_baseurl)
    site.build()
    drop_fonts_elsewhere(output)
    scripts = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    (output / "site_libs" / "fuse" / "fuse.min.js").write_text("\n".join(scripts), encoding="utf-8")
    bundle_katex(output, katex(config.config_path / ".cache"))
    return problems + site.warnings


def main() -> None:
    start = time.perf_counter()
    problems = build()
    if problems:
        sys.exit("The website was built, but:\n" + "\n".join(problems))
    folder = Path(get_config().doc_path)
    print(f"{len(list(folder.rglob('*.html')))} pages in {folder.name}/ ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
