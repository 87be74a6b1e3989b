"""Prints the README's table of settings; `--write` puts it there, between its two marks."""

import sys
from pathlib import Path

from service.core.settings import Settings

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"


def settings_table() -> str:
    """One row per field of `Settings`, in its order: variable, default, description."""
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    prefix = Settings.model_config["env_prefix"]
    for name, field in Settings.model_fields.items():
        default = f"`{field.default}`" if field.default not in (None, "") else "–"
        rows.append(f"| `{prefix}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """`text` with the table between the marks. Raises ValueError where a mark is missing."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected {BEGIN} and {END}, found no such place")
    return f"{before}{BEGIN}\n{settings_table()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(with_table(README.read_text("utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(settings_table() + "\n")
