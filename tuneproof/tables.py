"""Files and pandas frames as the client takes and gives them. pandas is imported where it is used, and only there."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypedDict, cast

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import TypeIs

    from tuneproof.results import Prediction

Source: TypeAlias = "str | PathLike[str] | BinaryIO | pd.DataFrame"


class TableOptions(TypedDict, total=False):
    """What can be said about a file; what is left out, or None, is recognised by the server.

    A column is a name, or a 0-based index. Without a header, columns are called `column_0`, `column_1`, …
    """

    name: str | None
    text_column: str | int | None
    label_column: str | int | None
    split_column: str | int | None
    delimiter: str | None
    has_header: bool | None
    encoding: str | None
    labelled: bool | None
    rare_labels: str | None


@contextmanager
def opened(source: Source) -> Iterator[tuple[tuple[str, BinaryIO, str], Mapping[str, Any]]]:
    """`((name, bytes, media type), what is known of the table)`, to be sent as often as it takes.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, str | PathLike):
        with Path(source).open("rb") as file:
            yield (Path(source).name, file, "text/csv"), {}
    elif _is_frame(source):
        known = {"delimiter": ",", "has_header": True, "encoding": "utf-8"}
        yield ("dataframe.csv", io.BytesIO(csv_of(source)), "text/csv"), known
    else:
        again = source if source.seekable() else io.BytesIO(source.read())
        yield (Path(str(getattr(source, "name", "upload.csv"))).name, again, "text/csv"), {}


def _is_frame(source: str | PathLike[str] | BinaryIO | pd.DataFrame) -> TypeIs[pd.DataFrame]:
    return hasattr(source, "to_csv")


def csv_of(frame: pd.DataFrame) -> bytes:
    """Every text in quotes, column names as strings, no index; what is missing is empty.

    Raises:
        ValueError: it is a Series, or holds text that UTF-8 cannot.
    """
    if not hasattr(frame, "columns"):
        raise ValueError("Expected a DataFrame with a column of texts and one of labels, found a Series.")
    named = frame.apply(_whole).set_axis([str(column) for column in frame.columns], axis=1)
    try:
        return named.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "A text or label holds half of a surrogate pair (U+D800 to U+DFFF), which UTF-8 cannot; take those "
            "out, for example with frame['text'].str.encode('utf-8', 'ignore').str.decode('utf-8')."
        ) from error


def _whole(column: pd.Series[Any]) -> pd.Series[Any]:
    """1 and 2 where a missing one made pandas keep them as 1.0 and 2.0."""
    there = column.dropna()
    if not 0 < len(there) < len(column) or not all(isinstance(value, float) for value in there.tolist()):
        return column
    numbers = there.astype("float64")
    # From 2**53 on, a float no longer holds every whole number.
    whole = ((numbers % 1 == 0) & (numbers.abs() < 2**53)).all()
    return column.astype("object").where(column.notna(), None).astype("Float64").astype("Int64") if whole else column


def form_fields(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """As multipart fields: None is left out, a column's index or name is text."""
    given = {name: value for name, value in options.items() if value is not None}
    columns = {name: str(value) for name, value in given.items() if name.endswith("_column")}
    return {**known, **given, **columns}


def texts_of(table: pd.DataFrame | pd.Series[Any], text_column: Any) -> pd.Series[Any]:
    """The column of texts; a Series is one already.

    Raises:
        ValueError: it is not said which column, or there is none of that name.
    """
    if not hasattr(table, "columns"):
        return cast("pd.Series[Any]", table)
    if text_column is None or text_column not in table.columns:
        columns = ", ".join(map(str, table.columns))
        raise ValueError(f"text_column must name one of the frame's columns ({columns}), found {text_column!r}.")
    return cast("pd.Series[Any]", table[text_column])


def with_text(texts: pd.Series[Any]) -> list[tuple[int, str]]:
    """`(position, text)` of each row that has one: neither missing nor empty."""
    present = texts.notna()
    return [(i, str(text)) for i, text in enumerate(texts) if present.iloc[i] and str(text)]


def prediction_frame(texts: pd.Series[Any], predictions: Mapping[int, Prediction]) -> pd.DataFrame:
    """`label` and `confidence` on the index of `texts`, by position; None and NaN where there is none."""
    import pandas as pd

    rows: Sequence[Prediction | None] = [predictions.get(i) for i in range(len(texts))]
    labels = [row.label if row else None for row in rows]
    confidences = [row.confidence if row else None for row in rows]
    return pd.DataFrame(
        {
            "label": pd.Series(labels, index=texts.index, dtype="object"),
            "confidence": pd.Series(confidences, index=texts.index, dtype="float64"),
        }
    )


def read_predictions(content: bytes) -> pd.DataFrame:
    """`predictions.csv`: texts and labels as strings (a label may be called "NA"), figures as numbers.

    An empty answer is missing: a method gave none or was not asked, or the row has no text.
    """
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    for column in frame.columns:
        if column in ("row_id", "in_baseline_subset"):
            frame[column] = frame[column].astype("int64")
        elif column.endswith(("confidence", "_label_probability")) or column.startswith("probability_"):
            frame[column] = pd.to_numeric(frame[column].mask(frame[column] == "")).astype("float64")
        elif column not in ("split", "text") and not column.endswith("_raw"):
            frame[column] = frame[column].mask(frame[column] == "")
    return frame.astype({"in_baseline_subset": bool}) if "in_baseline_subset" in frame else frame
