"""Prints how many lines of code each room holds; fails where all of them, tests aside, exceed the budget."""

import sys
from collections import Counter
from pathlib import Path

BUDGET = 9_000
ROOT = Path(__file__).parent.parent
ROOMS = ("tuneproof", "service", "worker", "migrations", "tools", "benchmarks", "tests")


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank nor a comment alone; docstrings count, they are read as well."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def room(path: Path) -> str:
    """`service/ml` for `service/ml/encode.py`; a room's own folder for what lies directly in it."""
    return "/".join(path.relative_to(ROOT).parts[:-1][:2])


def main() -> int:
    lines: Counter[str] = Counter()
    for name in ROOMS:
        for path in (ROOT / name).rglob("*.py"):
            lines[room(path)] += lines_of_code(path)
    total = sum(count for name, count in lines.items() if not name.startswith("tests"))
    table = [f"{name:<24}{count:>7,}" for name, count in sorted(lines.items())]
    table += [f"{'all but tests':<24}{total:>7,}", f"{'budget':<24}{BUDGET:>7,}"]
    sys.stdout.write("\n".join(table) + "\n")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
