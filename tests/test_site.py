"""The tools that build the website and the README, on small inputs; and that every notebook has its place on the
website."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tools import check_site, docs_renderer, gallery, nbrun, readme

ROOT = Path(__file__).parents[1]
WEBSITE = "https://example.org/docs"
PNG = b"\x89PNG\r\n\x1a\nnot really"


def write_site(folder: Path, **pages: str) -> list[str]:
    "Write pages, and return what is wrong with them."
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return check_site.problems_of(folder)


def test_sound_site(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(PNG)
    index = """<h2 id="here">Here</h2><a href="#here">a</a><a href="other.html#there">b</a><a href="https://example.org">c</a>
        <img src="picture.png" alt="A picture"><a href="mailto:a@example.org">d</a><p>costs $5<br>and $6</p>
        <pre>::: {.callout} $$ \\frac</pre><code>[a](b)</code><span class="math inline">\\(\\frac{1}{2}\\)</span>"""
    assert write_site(tmp_path, index=index, other='<a id="there"></a><a href="/index.html">home</a>') == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">a</a>', "nothing at 'gone.html'"),
        ('<a href="/gone/">a</a>', "nothing at '/gone/'"),
        ('<img src="gone.png" alt="Gone">', "nothing at 'gone.png'"),
        ('<img src="data:image/png;base64,QUJD">', "no alternative text (fig-alt): 'data:image/png;base64,QUJD'"),
        ('<img alt=" " src="data:image/png;base64,QUJD">', "no alternative text"),
        ('<a href="#gone">a</a>', "no anchor '#gone'"),
        ('<a href="index.html#gone">a</a>', "no anchor 'index.html#gone'"),
        ('<script src="https://cdn.example.org/katex.js"></script>', "needs the network"),
        ("<p>one</p>\n::: {.callout-note}\n", "markup not rendered"),
        ("<p>see {#sec-one}</p>", "markup not rendered"),
        ("<p>see @fig-one</p>", "markup not rendered"),
        ("<p>see [text](page.ipynb)</p>", "markup not rendered"),
        ("<p>see [<code>name</code>](page.ipynb)</p>", "markup not rendered"),
        (r"<p>so \frac{1}{2}</p>", "TeX not rendered"),
        ("<p>$$ x $$</p>", "TeX not rendered"),
        ("<p>with $x^2$ here</p>", "TeX not rendered"),
        ("<pre>Traceback (most recent call last)</pre>", "shows a traceback"),
        ("<pre>&lt;IPython.core.display.Image object&gt;</pre>", "an output is not shown"),
    ],
)
def test_unsound_site(body: str, problem: str, tmp_path: Path):
    problems = write_site(tmp_path, index=body)
    assert problems and all(found.startswith("index.html: ") for found in problems)
    assert problem in problems[0]


def test_site_without_pages(tmp_path: Path):
    assert "holds no pages" in check_site.problems_of(tmp_path)[0]


def test_style_sheet_that_needs_the_network(tmp_path: Path):
    (tmp_path / "local.css").write_text(
        "a { background: url(\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>\") }"
    )
    (tmp_path / "theme.css").write_text("@import url(https://fonts.example.org/css?family=A:wght@300;400);")
    assert write_site(tmp_path, index="") == [
        "theme.css: needs the network: https://fonts.example.org/css?family=A:wght@300;400"
    ]


def test_dead_search_result(tmp_path: Path):
    (tmp_path / "search.json").write_text(json.dumps([{"href": "index.html"}, {"href": "index.html#gone"}]))
    assert write_site(tmp_path, index="") == ["search.json: no anchor 'index.html#gone'"]


def test_formulas_are_read(tmp_path: Path):
    page = check_site.Page(r'<span class="math inline">\(a\)</span> and <span class="math display">\[b < c\]</span>')
    assert [(check_site.tex_of(formula), formula.display) for formula in page.formulas] == [
        ("a", False),
        ("b < c", True),
    ]
    assert page.prose == " and "


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](tutorials/introduction.ipynb)", f"[a]({WEBSITE}/tutorials/introduction.html)"),
        ("[a](api/01_so3.ipynb#hat)", f"[a]({WEBSITE}/api/so3.html#hat)"),
        ("[a](changelog.md)", f"[a]({WEBSITE}/changelog.html)"),
        ("[a](../CONTRIBUTING.md)", "[a](CONTRIBUTING.md)"),
        ("![a](images/logo.png)", "![a](nbs/images/logo.png)"),
        ('<img src="images/logo.png" width="300">', '<img src="nbs/images/logo.png" width="300">'),
        ("[a](https://example.org/x.ipynb)", "[a](https://example.org/x.ipynb)"),
        ("[a](#here)", "[a](#here)"),
    ],
)
def test_readme_links(link: str, expected: str):
    assert readme.relink(link, WEBSITE) == expected


def test_readme_callouts():
    source = "before\n\n::: {.callout-note}\n\n## Title\n\nOne\n\ntwo\n:::\n\nafter"
    assert readme.convert_prose(source, WEBSITE) == "before\n\n> [!NOTE]\n> **Title**\n>\n> One\n>\n> two\n\nafter"


def test_readme_cards_are_a_list():
    source = "before\n\n::: {.cards}\n\n- **A** b\n- **C** d\n\n:::\n\nafter"
    assert readme.convert_prose(source, WEBSITE) == "before\n\n- **A** b\n- **C** d\n\nafter"


def test_readme_refuses_what_github_cannot_show():
    with pytest.raises(ValueError, match="block other than a callout"):
        readme.convert_prose("::: {.panel-tabset}\n## A\n:::", WEBSITE)


def code_cell(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


def notebook(*cells: dict) -> dict:
    return {"cells": list(cells)}


TEXT = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
RESULT = {"output_type": "execute_result", "data": {"text/plain": ["3"]}}
PICTURE = {
    "output_type": "display_data",
    "data": {"image/png": base64.b64encode(PNG).decode(), "text/plain": ["<Figure>"]},
}


def test_readme_code():
    made = readme.convert(notebook(code_cell("print()\n1 + 2", TEXT, RESULT)), WEBSITE)
    assert "```python\nprint()\n1 + 2\n```\n\n```text\none\ntwo\n3\n```" in made.text


@pytest.mark.parametrize(
    ("source", "code_shown", "output_shown"),
    [
        ("#| hide\nx", False, False),
        ("#| echo: false\nx", False, True),
        ("#| output: false\nx", True, False),
        ("#| include: false\nx", False, False),
    ],
)
def test_readme_directives(source: str, code_shown: bool, output_shown: bool):
    made = readme.convert(notebook(code_cell(source, TEXT)), WEBSITE).text
    assert ("```python\nx\n```" in made) == code_shown
    assert ("one\ntwo" in made) == output_shown
    assert "#|" not in made


def test_readme_pictures(tmp_path: Path):
    made = readme.convert(
        notebook(code_cell("#| fig-alt: A spine\nshow()", PICTURE), code_cell("show()", PICTURE)), WEBSITE
    )
    assert "![A spine](nbs/images/index-1.png)" in made.text and "![Figure](nbs/images/index-2.png)" in made.text
    assert "<Figure>" not in made.text
    stale = tmp_path / "nbs/images/index-3.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(PNG)
    assert readme.differences(tmp_path, made) == [
        "README.md",
        "nbs/images/index-1.png",
        "nbs/images/index-2.png",
        "nbs/images/index-3.png",
    ]
    readme.write(tmp_path, made)
    assert readme.differences(tmp_path, made) == []
    assert (tmp_path / "nbs/images/index-2.png").read_bytes() == PNG and not stale.exists()
    (tmp_path / "README.md").write_text("edited")
    assert readme.differences(tmp_path, made) == ["README.md"]


def example(
    first,
    /,
    second: int | None = None,  # another | one
    *,
    third: str = "a, b",
) -> float:  # the sum
    "Add."


def test_documented_signature():
    assert (
        docs_renderer.call_text("example", inspect.signature(example))
        == "example(first, /, second=None, *, third='a, b')"
    )
    long = docs_renderer.call_text("x" * 80, inspect.signature(example))
    assert long.splitlines()[1:-1] == ["    first,", "    /,", "    second=None,", "    *,", "    third='a, b',"]


def test_documented_parameters():
    shown = docs_renderer.TableRenderer(example)._repr_markdown_().split("```\n\n")[1]
    assert shown.splitlines() == [
        "Add.",
        "",
        "::: {.parameters}",
        "| Parameter | Type | Default | Details |",
        "| --- | --- | --- | --- |",
        "| `first` |  |  |  |",
        r"| `second` | `int \| None` | `None` | another \| one |",
        "| `third` | `str` | `'a, b'` |  |",
        "| **returns** | `float` |  | the sum |",
        ":::",
    ]


class Holder:
    "Hold."

    def __init__(
        self,
        subject: Subject,  # noqa: F821 (a name for type checkers only)
    ):
        pass

    @property
    def width(self) -> int:
        "Tell the width."
        return 1

    def turn(
        self,
        angle: float,  # how far
        *,
        degrees: bool = False,  # instead of radians
        **options,  # of the motor
    ) -> None:
        """Turn it.

        Twice."""

    def _hidden(self) -> None:
        "Not shown."


def test_documented_class():
    shown = docs_renderer.TableRenderer(Holder)._repr_markdown_()
    assert (
        "### Holder\n\n```python\nHolder(subject)\n```\n\nHold.\n\n::: {.parameters}\n| Parameter | Type | Details |"
        in shown
    )
    assert "\n\n::: {.methods}\n| Methods and properties | Details |" in shown
    assert "| `subject` | `Subject` | " in shown
    assert '| <a id="holder.width"></a>`width` | Tell the width. |' in shown
    assert '| <a id="holder.turn"></a>`turn(angle, *, degrees=False, **options)` | Turn it. |' in shown
    assert shown.endswith(
        "\n\n**`Holder.turn`**\n\nTwice.\n\n::: {.parameters}\n| Parameter | Type | Default | Details |\n| --- | --- "
        "| --- | --- |\n| `angle` | `float` |  | how far |\n| `degrees` | `bool` | `False` | instead of radians |\n| "
        "`options` |  |  | of the motor |\n:::"
    )
    assert "hidden" not in shown


def write_notebook(path: Path, *sources: str) -> None:
    cells = [
        {
            "cell_type": "code",
            "id": f"c{number}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for number, source in enumerate(sources)
    ]
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )


def test_notebooks_are_run(tmp_path: Path):
    path = tmp_path / "small.ipynb"
    write_notebook(path, "x = 2", "#| eval: false\nx = 1 / 0", "#| slow\nx = 7", "print(x)")
    nbrun.store(path, nbrun.run(path, {"slow"}))
    outputs = [cell["outputs"] for cell in json.loads(path.read_text())["cells"]]
    assert outputs[:3] == [[], [], []]
    assert "".join(outputs[3][0]["text"]) == "2\n"


def test_failing_notebook_stays(tmp_path: Path):
    path = tmp_path / "small.ipynb"
    write_notebook(path, "1 / 0")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        nbrun.store(path, nbrun.run(path, set()))
    assert path.read_bytes() == before


def sidebar_pages(entries: list) -> list[str]:
    "List the pages in a sidebar, in order."
    pages = []
    for entry in entries:
        pages += (
            [entry]
            if isinstance(entry, str)
            else sidebar_pages(entry["contents"])
            if "contents" in entry
            else [entry["href"]]
        )
    return pages


def notebooks() -> list[Path]:
    found = (path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb"))
    return sorted(path for path in found if not any(part.startswith((".", "_")) for part in path.parts))


def test_every_notebook_has_its_place_in_the_sidebar():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    pages = sidebar_pages(config["website"]["sidebar"]["contents"])
    assert len(pages) == len(set(pages))
    assert {page for page in pages if page.endswith(".ipynb")} == {path.as_posix() for path in notebooks()}


@pytest.mark.parametrize("path", notebooks(), ids=str)
def test_first_cell_holds_title_and_description_only(path: Path):
    first = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))["cells"][0]
    source = "".join(first["source"]).strip()
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+(\n\n?- [\w-]+: [^\n]+)*", source), (
        "nbdev drops from the website what follows in this cell"
    )


def test_links_of_git_to_configuration():
    assert (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert (ROOT / "nbs/changelog.md").resolve() == ROOT / "CHANGELOG.md"


@pytest.mark.parametrize(
    ("page", "table"), [("api/001_front_door", "table_of_names"), ("explanations/architecture", "table_of_rooms")]
)
def test_tables_made_from_the_code_are_up_to_date(page: str, table: str):
    "A name or a page that came, went or moved must be seen in the tables of names and of rooms."
    cells = json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for source in ("".join(cell["source"]) for cell in cells):
        if source.startswith("#| hide\n") and "nbdev_export" not in source:
            exec(source, names)
    (shown,) = (
        output for cell in cells for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})
    )
    assert "".join(shown["data"]["text/markdown"]) == names[table](), f"run python -m tools.nbrun nbs/{page}.ipynb"


RECIPES = sorted((ROOT / "nbs/gallery").glob("*.ipynb"))


def test_gallery_lists_every_recipe_once():
    pages = gallery.listed_pages(ROOT / "nbs")
    assert len(pages) == len(set(pages)) and set(RECIPES) <= set(pages)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_has_a_picture(path: Path):
    recipe = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in recipe["cells"] if cell["cell_type"] == "code"]
    lines = [line for source in sources if "#| hide" not in source for line in source.splitlines()]
    code = [line for line in lines if line.strip() and not line.startswith(("#|", "import ", "from "))]
    assert 5 <= len(code) <= 20
    assert gallery.first_picture(recipe).alt


def test_gallery_tiles(tmp_path: Path):
    film, small = io.BytesIO(), io.BytesIO()
    frames = [Image.new("L", (900, 300), grey) for grey in (10, 250)]
    frames[0].save(film, "gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(small, "png")
    (tmp_path / "gallery").mkdir()
    (tmp_path / gallery.INDEX).write_text(
        "---\nlisting:\n  - id: a\n    contents: [film.ipynb, ../b.ipynb, c.ipynb]\n---\n"
    )
    shown = {"gallery/film": {"image/gif": film}, "b": {"image/png": small}, "gallery/c": {}}
    for name, data in shown.items():
        data = {kind: base64.b64encode(file.getvalue()).decode() for kind, file in data.items()}
        cell = code_cell(f'#| fig-alt: "This: {name}"\nx', {"output_type": "display_data", "data": data})
        header = {"cell_type": "raw", "source": ["---\n", "description: 'a: b'\n", "title: A\n", "\n", "---\n"]}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook(header, cell)))
    assert gallery.add_tiles(tmp_path) == ["c.ipynb: the gallery lists it, but it shows no picture"]
    for name, size, grey in (("film", (480, 160), 10), ("b", (30, 30), 255)):
        with Image.open(tmp_path / gallery.TILES / f"{name}.jpg") as tile:
            assert tile.size == size and abs(tile.convert("L").getpixel((5, 5)) - grey) < 4
    front = json.loads((tmp_path / "b.ipynb").read_text())["cells"][0]["source"].strip("-\n")
    assert yaml.safe_load(front) == {
        "description": "a: b",
        "title": "A",
        "image": "gallery/tiles/b.jpg",
        "image-alt": "This: b",
    }
