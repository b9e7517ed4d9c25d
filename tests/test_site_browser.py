"""The website in a browser, built from a copy of the project: every page, light and dark, wide and narrow; search,
menus, formulas."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from search_queries import QUERIES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SOURCES = ("nbs", "diffdrr", "tools", "settings.ini", "_quarto.yml", "CHANGELOG.md")
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
LEFT_BEHIND = "net::ERR_ABORTED"  # the failure of a request that the page no longer waits for, because it was left
FIRST_RESULTS = {
    "DRR": "api/rendering/drr.html",
    "pose_from_view": "api/geometry/views.html#pose_from_view",
    "DICOM": "tutorials/own_data.html",
    "gradient correlation": "api/compare/edges.html",
}
AUDIT = r"""async () => {
  await document.fonts.ready;
  const problems = [], main = document.querySelector("main"), edge = main.getBoundingClientRect().right + 1;
  const name = (element) => `<${element.tagName.toLowerCase()} class="${element.className}"> ${element.textContent.trim().slice(0, 50)}`;
  const once = (f, known = new Map()) => (x) => known.has(x) ? known.get(x) : known.set(x, f(x)).get(x);

  for (const image of document.images) image.loading = "eager";  // also those that wait until they are scrolled to
  await Promise.all([...document.images].map((image) => image.decode().catch(() => null)));
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) problems.push(`broken picture: ${image.src.slice(0, 80)}`);
  for (const formula of document.querySelectorAll(".math"))
    if (!formula.querySelector(".katex-html") || formula.querySelector(".katex-error")) problems.push(`formula: ${formula.textContent}`);
  const here = document.querySelector("#quarto-sidebar .sidebar-link.active");
  if (innerWidth > 991 && !(here?.getBoundingClientRect().bottom < innerHeight)) problems.push("the sidebar does not show where the reader is");

  // Code: 120 columns can be seen on a desktop, and a bar says where there is more
  for (const code of main.querySelectorAll("pre")) {
    const columns = Math.max(...code.innerText.split("\n").map((line) => line.length));
    if (code.scrollWidth <= code.clientWidth + 1 + parseFloat(getComputedStyle(code).paddingRight)) continue;
    if (innerWidth > 991 && columns <= 120) problems.push(`code cut within ${columns} columns: ${name(code)}`);
    if (code.offsetHeight - code.clientHeight < 6) problems.push(`nothing says that code goes on: ${name(code)}`);
  }

  // What sticks out at the right, unless it stands in a box that scrolls
  const scrolls = once((box) => box !== main && (["auto", "scroll"].includes(getComputedStyle(box).overflowX) || scrolls(box.parentElement)));
  if (document.documentElement.scrollWidth > innerWidth) problems.push("the page scrolls sideways");
  for (const element of main.querySelectorAll(":not(.katex-mathml, .katex-mathml *, .base *, svg *)"))
    if (element.getBoundingClientRect().right > edge && !scrolls(element.parentElement)) problems.push(`sticks out: ${name(element)}`);

  // Contrast, as the Web Content Accessibility Guidelines (2.2, 1.4.3) define it
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = once((color) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = color;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  });
  const over = (under, [r, g, b, alpha]) => [r, g, b].map((value, i) => alpha * value + (1 - alpha) * under[i]);
  const background = once((box) => box ? over(background(box.parentElement), rgba(getComputedStyle(box).backgroundColor)) : [1, 1, 1]);
  const opacity = once((box) => box ? opacity(box.parentElement) * getComputedStyle(box).opacity : 1);
  const luminance = (rgb) => rgb.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const checkContrast = once((element) => {
    const style = getComputedStyle(element), size = parseFloat(style.fontSize), [r, g, b, alpha] = rgba(style.color);
    const shades = [background(element), over(background(element), [r, g, b, alpha * opacity(element)])];
    const [dark, light] = shades.map(luminance).sort((a, b) => a - b), ratio = (light + 0.05) / (dark + 0.05);
    const isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) problems.push(`faint (${ratio.toFixed(1)}): ${name(element)}`);
  });
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = new Range();
  while (texts.nextNode()) {
    const text = texts.currentNode, element = text.parentElement;
    if (!text.data.trim() || element.closest("script, style, svg, .katex-mathml") || !element.checkVisibility({ visibilityProperty: true })) continue;
    checkContrast(element);
    range.selectNodeContents(text);
    if (main.contains(element) && range.getBoundingClientRect().right > edge && !scrolls(element) && !element.closest(".base")) problems.push(`sticks out: ${name(element)}`);
  }
  return problems;
}"""


@pytest.fixture(scope="session")
def site(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Build the website from a copy of the project, unless SITE is where it has been built; return its folder."
    if "SITE" in os.environ:
        return ROOT / os.environ["SITE"]
    project = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, project / name)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (project / ".cache").symlink_to(ROOT / ".cache")
    paths = os.pathsep.join(
        [str(project), str(ROOT)]
    )  # the copy goes first; what is installed may be known from the checkout only
    built = subprocess.run(
        [sys.executable, "-m", "tools.docs"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout
    return project / "_docs"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    "Serve the website below the root of a server, as GitHub does."
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{site.name}/"
        server.shutdown()


@contextmanager
def opened(browser, address: str, **options: object) -> Iterator[tuple]:
    "Open a window; give it and the list of what goes wrong in it."
    problems: list[str] = []
    page = browser.new_page(**options)
    page.on(
        "console",
        lambda message: (
            message.type in ("error", "warning")
            and "GL Driver Message" not in message.text  # of drawing without a GPU
            and problems.append(message.text)
        ),
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "requestfailed",
        lambda request: request.failure == LEFT_BEHIND or problems.append(f"failed: {request.url[:80]}"),
    )
    page.on("response", lambda response: response.status < 400 or problems.append(f"{response.status}: {response.url}"))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("data:", address)) or problems.append(f"leaves the website: {request.url}")
        ),
    )
    yield page, problems
    page.close()


def is_dark(page) -> bool:
    "Tell whether a page is dark, by its own word and by its background."
    said = page.evaluate("document.documentElement.classList.contains('quarto-dark')")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert said == (max(map(int, re.findall(r"\d+", background)[:3])) < 64)
    return said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page(browser, site: Path, address: str, scheme: str):
    found = {}
    with opened(browser, address, color_scheme=scheme) as (page, problems):
        for path in sorted(site.rglob("*.html")):
            page.set_viewport_size(DESKTOP)
            page.goto(address + path.relative_to(site).as_posix())
            assert is_dark(page) == (scheme == "dark")
            problems += page.evaluate(AUDIT)
            page.set_viewport_size(PHONE)
            problems += page.evaluate(AUDIT)
            if problems:
                found[path.name] = list(problems)
                problems.clear()
    assert found == {}


def test_audit_can_fail(browser, address: str):
    with opened(browser, address, viewport=PHONE) as (page, problems):
        page.goto(address)
        page.evaluate("""document.querySelector("main").innerHTML = `
            <img src="gone.png"><p style="color: #999">grey</p><p style="opacity: 0.5">pale</p><p style="white-space: nowrap">${"long ".repeat(40)}</p>
            <span class="math">x</span><pre>${"scrolls ".repeat(40)}</pre>
            <pre style="scrollbar-width: none">${"goes on ".repeat(40)}</pre>`""")
        page.wait_for_load_state("networkidle")
        problems += page.evaluate(AUDIT)
    for problem in (
        "404: ",
        "broken picture",
        'faint (2.8): <p class=""> grey',
        "> pale",
        "sticks out: <p",
        "formula: x",
        "nothing says that code goes on",
    ):
        assert any(problem in found for found in problems), problem
    assert not any("scrolls" in found for found in problems)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_search(browser, address: str, viewport: dict, scheme: str):
    with opened(browser, address, viewport=viewport, color_scheme=scheme) as (page, problems):
        page.goto(address + "api/geometry/so3.html")
        if viewport is PHONE:
            page.locator(".navbar-toggler").click()
        field, results = page.locator(".smalldocs-search input"), page.locator(".search-result")
        for query, first in FIRST_RESULTS.items():
            field.fill(query)
            page.locator(f".search-result:first-child[href*='{first}']").wait_for()
        field.fill("Siddon")
        found = page.locator(".search-result:nth-child(-n + 3)[href*='rendering/renderers.html#siddon']").first
        found.wait_for()
        assert results.count() > 5
        problems += page.evaluate(AUDIT)
        found.click()
        page.wait_for_url("**/api/rendering/renderers.html#siddon*")
        assert page.locator("main").filter(has_text="Siddon").is_visible()
    assert problems == []


def test_search_answers_newcomers(browser, address: str):
    found = """async queries => {
        const fuse = new Fuse(await (await fetch("search.json")).json());
        return queries.map(query => fuse.search(query, { limit: 5 }).map(({ item }) => item.href.replace(".html", "")));
    }"""
    with opened(browser, address) as (page, problems):
        page.goto(address)
        results = dict(zip(QUERIES, page.evaluate(found, list(QUERIES))))
    assert problems == []
    missed = {
        query: hrefs for query, hrefs in results.items() if not any(h.startswith(tuple(QUERIES[query])) for h in hrefs)
    }
    assert missed == {} and len(QUERIES) >= 65


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reader_turns_the_light_off_and_on(browser, address: str, scheme: str):
    still = dict(reduced_motion="reduce")  # colours change at once
    with opened(browser, address, viewport=DESKTOP, color_scheme=scheme, **still) as (page, problems):
        page.goto(address)
        dark = scheme == "dark"
        assert is_dark(page) == dark
        for _ in range(2):
            dark = not dark
            page.locator(".quarto-color-scheme-toggle").click()
            page.wait_for_function(
                "dark => document.documentElement.classList.contains('quarto-dark') == dark", arg=dark
            )
            assert is_dark(page) == dark
            problems += page.evaluate(AUDIT)
            page.goto(address + "changelog.html")
            assert is_dark(page) == dark
    assert problems == []


def test_menu_on_a_phone(browser, address: str):
    with opened(browser, address, viewport=PHONE) as (page, problems):
        page.goto(address + "api/rendering/drr.html")
        page.locator(".quarto-btn-toggle").first.click()
        page.locator("#quarto-sidebar.show .sidebar-link.active").filter(has_text="drr").wait_for()
        page.locator("#quarto-sidebar").get_by_text("Changelog").click()
        page.wait_for_url("**/changelog.html")
    assert problems == []
