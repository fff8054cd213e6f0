"""Draws docs/architecture.svg, the rooms of davae and the arrows between them, from the imports in src/davae.

python docs/architecture.py    draws it anew; tests/test_architecture.py fails while it differs from the imports
"""

import ast
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "davae"
DRAWING = DOCS / "architecture.svg"

ROOMS = {
    "cli": ("the verbs of the command line", 1),
    "serving": ("a pipeline for clients and browsers", 1),
    "job": ("the whole job, one command", 0),
    "demo": ("the whole job on the shipped pair", 2),
    "cost": ("what it costs, counted and timed", 0),
    "evaluation": ("numbers and pages", 2),
    "training": ("both stages, and what they share", 0),
    "pipelines": ("a pipeline in, a pipeline out", 1),
    "backbones": ("one row for each transformer", 0),
    "data": ("any image to the right pixels", 2),
    "method": ("the paper as functions", 0),
    "run": ("one run, whatever it trains", 2),
    "models": ("what ships beside weights", 0),
}
"""What each room is for, and its column in the drawing, from left to right."""

COLUMNS, ROW_HEIGHT, TOP = (170, 490, 810), 116, 20
WIDTH, BOX_WIDTH, BOX_HEIGHT = 980, 300, 66
MOST_NAMES = 6
"""In a box; more would not fit."""
PORT_DISTANCE = 56
"""Between two arrows at one box; all in pixels."""

STYLE = """
text { font-family: system-ui, sans-serif; text-anchor: middle; fill: #1f2328 }
.name { font-size: 17px; font-weight: 600 }
.purpose { font-size: 13px }
.also { font-size: 11.5px; fill: #59636e }
rect.room { fill: #f6f8fa; stroke: #59636e }
path.arrow { fill: none; stroke: #0969da; stroke-width: 1.6; marker-end: url(#head) }
"""

Arrow = tuple[str, str]
"""A room, and one that it imports."""


def find_arrows() -> set[Arrow]:
    """All arrows between rooms, by the imports of all files at any depth of their code."""
    arrows = set()
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                for module in imported_modules(node):
                    other = module.removeprefix("davae.").partition(".")[0]
                    if module.startswith("davae.") and other in ROOMS and other != room:
                        arrows.add((room, other))
    return arrows


def imported_modules(node: ast.AST) -> list[str]:
    """The modules that a node of a syntax tree imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    if node.module == "davae":
        return [f"davae.{alias.name}" for alias in node.names]
    return [node.module]


def find_reachable(room: str, arrows: set[Arrow]) -> set[str]:
    """All rooms that one imports, over others or directly."""
    reached: set[str] = set()
    waiting = [room]
    while waiting:
        current = waiting.pop()
        fresh = {imported for importer, imported in arrows if importer == current} - reached
        reached |= fresh
        waiting += fresh
    return reached


def drop_implied(arrows: set[Arrow]) -> set[Arrow]:
    """The arrows that do not follow from others: A -> C goes if there is a way from A over B to C."""
    return {arrow for arrow in arrows if arrow[1] not in find_reachable(arrow[0], arrows - {arrow})}


def find_rows(arrows: set[Arrow]) -> dict[str, int]:
    """Each room's row from the top: one below the lowest room that imports it."""
    rows = dict.fromkeys(ROOMS, 0)
    for _ in ROOMS:
        for importer, imported in sorted(arrows):
            rows[imported] = max(rows[imported], rows[importer] + 1)
    if max(rows.values()) >= len(ROOMS):
        raise ValueError("the rooms import each other in a circle")
    return rows


def draw() -> str:
    """The drawing as SVG."""
    arrows = find_arrows()
    drawn = drop_implied(arrows)
    rows = find_rows(drawn)
    places = {room: (COLUMNS[column], TOP + ROW_HEIGHT * rows[room]) for room, (_, column) in ROOMS.items()}
    height = max(y for _, y in places.values()) + BOX_HEIGHT + TOP

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>The rooms of davae</title><style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="#0969da"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for importer, imported in sorted(drawn):
        x, y = find_port(importer, imported, [b for a, b in drawn if a == importer], places)
        to_x, to_y = find_port(imported, importer, [a for a, b in drawn if b == imported], places)
        y, middle = y + BOX_HEIGHT, (y + BOX_HEIGHT + to_y) // 2
        parts.append(f'<path class="arrow" d="M{x} {y}C{x} {middle} {to_x} {middle} {to_x} {to_y - 2}"/>')
    for room, (x, y) in places.items():
        further = [other for other in ROOMS if (room, other) in arrows - drawn]
        parts.append(draw_room(room, x, y, further))
    return "\n".join([*parts, "</svg>", ""])


def find_port(room: str, other: str, neighbours: list[str], places: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Where the arrow between two rooms meets the first one's box: in the order of the rooms at the other ends."""
    neighbours = sorted(neighbours, key=lambda name: places[name])
    shift = PORT_DISTANCE * (2 * neighbours.index(other) - len(neighbours) + 1) // 2
    x, y = places[room]
    return x + shift, y


def draw_room(room: str, x: int, y: int, further: list[str]) -> str:
    """A box with the room's name, what it is for, and the rooms that it imports without an arrow of their own."""
    lines = [("name", room), ("purpose", ROOMS[room][0])]
    if further:
        names = ", ".join(further) if len(further) <= MOST_NAMES else f"{len(further)} rooms below"
        lines.append(("also", f"also {names}"))
    text_y = y + (BOX_HEIGHT - 18 * len(lines)) // 2 + 14
    parts = [f'<rect class="room" x="{x - BOX_WIDTH // 2}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>']
    for number, (kind, text) in enumerate(lines):
        parts.append(f'<text class="{kind}" x="{x}" y="{text_y + 18 * number}">{escape(text)}</text>')
    return "\n".join(parts)


if __name__ == "__main__":
    DRAWING.write_text(draw())
