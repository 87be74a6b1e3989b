"""Prints lines of code and of docstring by room; fails where the code, tests and benchmarks aside, is over budget."""

import ast
import sys
from collections import Counter
from pathlib import Path

BUDGET = 15_350
"""Lines of code, tests and benchmarks aside: docstrings say what a caller must know, and are not what a budget should
make dearer (decision 12)."""
EVIDENCE = ("tests", "benchmarks")
PRODUCT = "all but evidence"
SCRIPTS_BUDGET = 2_200
"""Of the web pages, another language with its own reader."""
ROOT = Path(__file__).parent.parent
MADE = ROOT / "tuneproof" / "sync"
"""Written by tools/make_sync.py; nobody keeps it."""
ROOMS = ("tuneproof", "service", "worker", "migrations", "tools", "benchmarks", "tests")


def lines_of(path: Path) -> tuple[int, int]:
    """Lines of code, and lines of docstring; neither blank ones nor those that are a comment alone."""
    source = path.read_text("utf-8")
    docstrings = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    filled = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    return len(filled - docstrings), len(filled & docstrings)


def room(path: Path) -> str:
    """`service/ml` for `service/ml/encode.py`; a room's own folder for what lies directly in it."""
    return "/".join(path.relative_to(ROOT).parts[:-1][:2])


def scripts() -> int:
    """Lines of the pages' scripts, without the vendored libraries."""
    ours = (path for path in (ROOT / "service/web/static").rglob("*.js") if path.parent.name != "vendor")
    lines = (line.strip() for path in ours for line in path.read_text("utf-8").splitlines())
    return sum(bool(line) and not line.startswith(("//", "/*", "*")) for line in lines)


def main() -> int:
    code: Counter[str] = Counter()
    docstrings: Counter[str] = Counter()
    for name in ROOMS:
        for path in (path for path in (ROOT / name).rglob("*.py") if MADE not in path.parents):
            lines = lines_of(path)
            for of in (room(path), *([PRODUCT] if name not in EVIDENCE else [])):
                code[of], docstrings[of] = code[of] + lines[0], docstrings[of] + lines[1]
    table = [f"{'':<20}{'code':>8}{'docstrings':>12}"]
    table += [
        f"{name:<20}{code[name]:>8,}{docstrings[name]:>12,}" for name in sorted(code, key=lambda n: (n == PRODUCT, n))
    ]
    table += [f"{'budget':<20}{BUDGET:>8,}"]
    table += [f"{'scripts of pages':<20}{scripts():>8,}", f"{'their budget':<20}{SCRIPTS_BUDGET:>8,}"]
    sys.stdout.write("\n".join(table) + "\n")
    return int(code[PRODUCT] > BUDGET or scripts() > SCRIPTS_BUDGET)


if __name__ == "__main__":
    sys.exit(main())
