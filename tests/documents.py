"""The fenced blocks of the documents that people type from, in order, as a Markdown parser finds them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block; `not_run` is the reason in the comment directly above it, empty where it is to be run."""

    where: str
    language: str
    text: str
    not_run: str = ""


def blocks(page: str) -> Iterator[Block]:
    """Those of one page, named by its path in the checkout."""
    reason = ""
    for token in MarkdownIt().parse((ROOT / page).read_text("utf-8")):
        if token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            yield Block(f"{page}:{line}", token.info.strip(), token.content, reason)
        found = _NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        reason = found[1] if found else ""
