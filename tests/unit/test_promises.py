"""`docs/promises.md`: every promise has tests, each is there, and runs where the page says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text("utf-8")
PROMISES = 17
TARGETS = {
    "more": "test-more",
    "chaos": "chaos",
    "calibrate": "calibrate",
    "acceptance": "acceptance",
    "gpu": "test-gpu",
}
_ROW = re.compile(r"^\| (?P<what>.+?) \| `(?P<file>tests/[\w/]+\.py)::(?P<test>\w+)` \| `make (?P<target>[\w-]+)` \|$")
_HEADING = re.compile(r"^## (?P<number>\d+)\. (?P<title>.+)$")


def sections() -> dict[int, list[str]]:
    """The lines below each promise's heading, by its number."""
    found: dict[int, list[str]] = {}
    for line in PAGE.splitlines():
        if (heading := _HEADING.match(line)) is not None:
            assert int(heading["number"]) not in found
            found[int(heading["number"])] = []
        elif found:
            found[max(found)].append(line)
    return found


ROWS = [match.groupdict() for lines in sections().values() for line in lines if (match := _ROW.match(line)) is not None]


@cache
def targets(file: str) -> dict[str, str]:
    """By the name of each test in a file, the target that runs it."""

    def marks(nodes: list[ast.expr]) -> list[str]:
        """Those of the whole test: some of its parameters may have marks of their own."""
        named = [ast.unparse(node.func if isinstance(node, ast.Call) else node) for node in nodes]
        return [name.removeprefix("pytest.mark.") for name in named]

    tree = ast.parse((ROOT / file).read_text("utf-8"))
    whole = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            whole = marks(node.value.elts if isinstance(node.value, ast.List) else [node.value])
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            named = [*marks(node.decorator_list), *whole]
            found[node.name] = next((TARGETS[mark] for mark in named if mark in TARGETS), "test")
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):  # a state machine's `TestX`
            name = node.targets[0].id
            if name.startswith("Test") and ast.unparse(node.value).endswith(".TestCase"):
                found[name] = "test"
    return found


def test_every_promise_is_there_in_order_and_has_tests() -> None:
    found = sections()
    assert list(found) == list(range(1, PROMISES + 1))
    for number, lines in found.items():
        prose = [line for line in lines if line and not line.startswith("|")]
        assert prose, f"promise {number} is not put into words"
        assert any(_ROW.match(line) for line in lines), f"promise {number} has no test"


def test_every_row_can_be_read() -> None:
    rows = [line for lines in sections().values() for line in lines if line.startswith("|")]
    for line in rows:
        assert _ROW.match(line) or line in ("| what | held by | run by |", "|---|---|---|"), line


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["test"])
def test_what_a_row_names_is_there_and_run_by_that_target(row: dict[str, str]) -> None:
    assert targets(row["file"])[row["test"]] == row["target"]


def test_no_test_stands_twice_below_one_promise() -> None:
    for number, lines in sections().items():
        named = [match["test"] for line in lines if (match := _ROW.match(line)) is not None]
        assert len(named) == len(set(named)), f"promise {number}"
