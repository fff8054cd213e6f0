"""Counts what keeps the source readable: air, length, and how much of the package a file pulls in.

python tests/house.py            the table for the whole package
python tests/house.py training   the table for one room, with the places that break a rule
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "davae"
LONG_BODY = 15
"""Lines from which a body of a function needs a blank line."""
LONGEST_FUNCTION, LONGEST_FILE = 60, 400
"""In lines."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class House:
    """Counts over some files, and the places that break a rule."""

    files: int = 0
    lines: int = 0
    code_lines: int = 0
    """Lines that are neither blank, nor comments, nor docstrings."""
    comments: int = 0
    """Lines that hold a comment only."""
    comprehensions: int = 0
    long_bodies: int = 0
    walls: list[str] = field(default_factory=list)
    """Long bodies without a blank line."""
    long_functions: list[str] = field(default_factory=list)
    long_files: list[str] = field(default_factory=list)

    @property
    def share_of_walls(self) -> float:
        """Of the long bodies, how many have no blank line, in percent."""
        return 100 * len(self.walls) / max(1, self.long_bodies)

    @property
    def share_of_comments(self) -> float:
        """Of all lines, how many hold a comment only, in percent."""
        return 100 * self.comments / max(1, self.lines)

    @property
    def comprehensions_per_100_lines(self) -> float:
        """Per 100 lines of the files."""
        return 100 * self.comprehensions / max(1, self.lines)

    def table(self) -> str:
        """The counts as lines of text."""
        rows = {
            "files": f"{self.files}",
            "lines": f"{self.lines:,}",
            f"bodies of {LONG_BODY}+ lines without a blank line": (
                f"{self.share_of_walls:.1f} % ({len(self.walls)} of {self.long_bodies})"
            ),
            "full-line comments": f"{self.share_of_comments:.1f} %",
            "comprehensions per 100 lines": f"{self.comprehensions_per_100_lines:.2f}",
            f"functions over {LONGEST_FUNCTION} lines": f"{len(self.long_functions)}",
            f"files over {LONGEST_FILE} lines": f"{len(self.long_files)}",
        }
        return "\n".join(f"{name:<48}{value}" for name, value in rows.items())


def inspect_house(files: list[Path]) -> House:
    """Count over these files."""
    house = House()
    for path in files:
        inspect_file(path, house)
    return house


def inspect_file(path: Path, house: House) -> None:
    """Add one file to the counts."""
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    name = path.relative_to(PACKAGE).as_posix()

    docstrings = docstring_lines(tree)
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    comments = {number for number, line in enumerate(lines, 1) if line.strip().startswith("#")} - docstrings

    house.files += 1
    house.lines += len(lines)
    house.comments += len(comments)
    house.code_lines += len(lines) - len(blank | comments | docstrings)
    house.comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))
    if len(lines) > LONGEST_FILE:
        house.long_files.append(f"{name}: {len(lines)}")

    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > LONGEST_FUNCTION:
            house.long_functions.append(f"{name}:{function.lineno} {function.name}: {length}")

        # The body without its docstring.
        statements = function.body[1:] if is_text(function.body[0]) else function.body
        if not statements:
            continue
        body = range(statements[0].lineno, (function.end_lineno or 0) + 1)
        if len(body) >= LONG_BODY:
            house.long_bodies += 1
            if not blank & set(body):
                house.walls.append(f"{name}:{function.lineno} {function.name}: {len(body)}")


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def is_text(node: ast.stmt) -> bool:
    """A string that stands alone: a docstring, or what documents the line before."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of all lines in docstrings."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and is_text(node):
            numbers |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return numbers


def path_of(module: str) -> Path | None:
    """The file of a module of davae, or None for a name that is no module."""
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.exists():
            return path
    return None


def imported_files(path: Path) -> set[Path]:
    """The files of davae that a file imports when it is imported itself: not inside functions, nor for types only."""
    files: set[Path] = set()
    waiting: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "davae":
            # Each package above the module is imported, too; a name may be a module of the package.
            parts = node.module.split(".")
            modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
            files |= {file for module in modules if (file := path_of(module))}
        elif not isinstance(node, Function):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return files


def closure(path: Path) -> set[Path]:
    """A file, and all files of davae that importing it imports."""
    found, waiting = {path}, [path]
    while waiting:
        for file in imported_files(waiting.pop()) - found:
            found.add(file)
            waiting.append(file)
    return found


def closure_lines(path: Path) -> int:
    """Lines of davae that importing a file pulls in, its own included."""
    return sum(len(file.read_text().splitlines()) for file in closure(path))


if __name__ == "__main__":
    chosen = sorted((PACKAGE / sys.argv[1] if len(sys.argv) > 1 else PACKAGE).rglob("*.py"))
    counted = inspect_house(chosen)
    print(counted.table())  # noqa: T201
    if len(sys.argv) > 1:
        for place in (*counted.long_files, *counted.long_functions, *counted.walls):
            print(place)  # noqa: T201
