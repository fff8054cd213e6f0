"""Tables in Markdown, aligned so that they are easy to read on a terminal, too."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The lines of a table; columns of numbers are flush right, except the first, which names the row."""
    columns: list[list[str]] = []
    for name, *values in zip(header, *rows, strict=True):
        cells = list(map(_escape, values))
        numbers = bool(columns) and all(cell[:1] in "+-0123456789" for cell in cells)
        columns.append(_align([_escape(name), *cells], numbers=numbers))

    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _escape(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _align(cells: list[str], *, numbers: bool) -> list[str]:
    """The cells at one width, with the rule below the first."""
    width = max(3, *map(len, cells))
    head, *rest = (cell.rjust(width) if numbers else cell.ljust(width) for cell in cells)
    rule = "-" * (width - 1) + ":" if numbers else "-" * width
    return [head, rule, *rest]
