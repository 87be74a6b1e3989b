"""What can be said about a file, whether it is to learn from or to label."""

from typing import Annotated

import typer

TextColumn = Annotated[str | None, typer.Option(help="Of the file: name or 0-based index.")]
HasHeader = Annotated[bool | None, typer.Option("--has-header/--no-header", help="Whether row one names the columns.")]
Delimiter = Annotated[str | None, typer.Option(help=r"Of the file: one character; \t is a tab.")]
Encoding = Annotated[str | None, typer.Option(help="Of the file: UTF-8 by default; e.g. cp1252.")]
