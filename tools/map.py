"""Draw the map of the house from the table in tools/rooms.py: a block of text in CONTRIBUTING.md, and
nbs/images/rooms.svg.

Usage: python -m tools.map [--check]"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from xml.sax.saxutils import escape

from tools.rooms import BASE, CONTENTS, ROOMS, ROOT

PAGE = ROOT / "CONTRIBUTING.md"
PICTURE = ROOT / "nbs" / "images" / "rooms.svg"
BEGIN, END = "<!-- map: made by `python -m tools.map` from tools/rooms.py -->", "<!-- end of map -->"

BOX = (212, 54)  # width and height, px
GAP = (20, 46)
MARGIN = 16
STYLE = """
  text { font-family: system-ui, sans-serif; text-anchor: middle; fill: #14283c; }
  .name { font-size: 15px; font-weight: 600; }
  .what { font-size: 12px; fill: #40566b; }
  rect.room { fill: #e6eef6; stroke: #5c7c9c; }
  rect.base { fill: #f1efe6; stroke: #9c9272; }
  path { fill: none; stroke: #5c7c9c; stroke-width: 1.4; }
"""


def levels() -> dict[str, int]:
    """Number the rows of the map: a room stands below all that it imports from, and as close as it can above those that
    import it."""
    found: dict[str, int] = {}
    for room, others in ROOMS.items():
        found[room] = 1 + max((found[other] for other in others), default=-1)
    for room in reversed(ROOMS):
        found[room] = min((found[user] for user in users_of(room)), default=found[room] + 1) - 1
    return found


def users_of(room: str) -> list[str]:
    "List the rooms that an arrow leads to from a room."
    return [user for user in ROOMS if room in drawn_arrows(user)]


def rank(room: str) -> tuple[float, int]:
    "Order the rooms of a row by where their arrows lead."
    order = list(ROOMS)
    users = [order.index(user) for user in users_of(room)]
    return (sum(users) / len(users) if users else len(order), -order.index(room))


def everything_below(room: str) -> set[str]:
    "Return all rooms that a room imports from, directly or through others."
    return ROOMS[room].union(*map(everything_below, ROOMS[room]))


def drawn_arrows(room: str) -> list[str]:
    "List the rooms that a room imports from, without those that it also reaches through another."
    reached = set().union(*map(everything_below, ROOMS[room]))
    return [other for other in ROOMS if other in ROOMS[room] - reached]


def text_map() -> str:
    "Write the table as a block of text."
    width = max(map(len, CONTENTS))
    lines = [
        f"{room:{width}}  {CONTENTS[room]:36}  {'imported by every room' if room in BASE else ''}".rstrip()
        for room in BASE
    ]
    for room, others in ROOMS.items():
        names = ", ".join(other for other in ROOMS if other in others) or "no other room"
        lines.append(f"{room:{width}}  {CONTENTS[room]:36}  imports {names}")
    return "\n".join(["```", *lines, "```"])


def places() -> dict[str, tuple[float, float]]:
    "Place the boxes in rows, each row in the middle: the upper left corner of each, px."
    rows = defaultdict(list)
    for room, level in levels().items():
        rows[level].append(room)
    rows = defaultdict(list, {level: sorted(row, key=rank) for level, row in rows.items()})
    rows[max(rows) + 1] = list(BASE)
    widest = max(map(len, rows.values()))
    step = BOX[0] + GAP[0]
    return {
        room: (MARGIN + (column + (widest - len(row)) / 2) * step, MARGIN + level * (BOX[1] + GAP[1]))
        for level, row in sorted(rows.items())
        for column, room in enumerate(row)
    }


def arrow(upper: tuple[float, float], lower: tuple[float, float]) -> str:
    """Draw a curve from the lower edge of a box through the gap below it, then straight down to the upper edge of
    another."""
    (x1, y1), (x2, y2) = upper, lower
    x1, y1, x2, bend, y = x1 + BOX[0] / 2, y1 + BOX[1], x2 + BOX[0] / 2, GAP[1] * 0.6, y1 + BOX[1] + GAP[1] - 10
    curve = f"M{x1:g} {y1:g} C{x1:g} {y1 + bend:g} {x2:g} {y - bend:g} {x2:g} {y:g} L{x2:g} {y2:g}"
    return f'<path d="{curve}" marker-end="url(#head)"/>'


def picture() -> str:
    "Draw the map as SVG."
    corners = places()
    width = max(x for x, _ in corners.values()) + BOX[0] + MARGIN
    height = max(y for _, y in corners.values()) + BOX[1] + MARGIN
    title = "The rooms of the package: each imports from those above it that arrows come from"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M1 1 L8 4 L1 7"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#ffffff"/>',
        *(arrow(corners[other], corners[room]) for room in ROOMS for other in drawn_arrows(room)),
    ]
    for room, (x, y) in corners.items():
        name = room if room in ROOMS else f"{room} (for all)"
        parts += [
            f'<rect class="{"room" if room in ROOMS else "base"}" x="{x:g}" y="{y:g}" '
            f'width="{BOX[0]}" height="{BOX[1]}" rx="8"/>',
            f'<text class="name" x="{x + BOX[0] / 2:g}" y="{y + 23:g}">{name}</text>',
            f'<text class="what" x="{x + BOX[0] / 2:g}" y="{y + 42:g}">{escape(CONTENTS[room])}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def with_map(page: str) -> str:
    "Put the block of text between its marks in a page."
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text_map()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the map of the house.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the map is not up to date")
    check = parser.parse_args().check
    wanted = {PAGE: with_map(PAGE.read_text(encoding="utf-8")), PICTURE: picture()}
    for path, text in wanted.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is not the map of tools/rooms.py; run `python -m tools.map`")


if __name__ == "__main__":
    main()
