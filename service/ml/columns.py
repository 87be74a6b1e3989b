"""Recognising a table's header and columns, by name first, then by shape."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from service.core.errors import ColumnNotFound, DuplicateColumns

_TEXT_NAMES = """
    text texts sentence sentences message messages utterance utterances query queries question questions content body
    comment comments review reviews review_text description document documents tweet post sms email mail ticket input
    prompt request headline subject title summary phrase transcript feedback complaint narrative v2
    texte texto nachricht anfrage frage mensaje"""
_LABEL_NAMES = """
    label labels label_name label_text category categories category_name class classes class_name intent intents target
    sentiment topic emotion polarity queue department y v1
    kategorie klasse etikett catégorie étiquette categoría categoria etiqueta"""
TEXT_NAMES = frozenset(_TEXT_NAMES.split())
LABEL_NAMES = frozenset(_LABEL_NAMES.split())
SPLIT_NAMES = frozenset({"split", "partition", "subset", "fold"})
ID_NAMES = frozenset({"id", "ids", "nr", "uuid", "guid"})
_NUMBER = re.compile(r"[TZAPM\W_]*\d[\dTZAPM\W_]*")
_ID = re.compile(r"[^\s\d@]*[\d@]\S*")  # one way to match, so that a long cell takes no square of its length
NAME_WORDS = 5  # more are a sentence
MOST_TOLD = 1_000  # columns; a table of texts has a few
LONGEST_LABEL = 100  # characters; by shape alone, anything longer is taken for a text

Rows = Sequence[Sequence[str]]


def shown(name: str) -> str:
    """A column or label as messages name it: shortened, and without bytes that no JSON can hold."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= 60 else name[:59] + "…"


def told(names: Sequence[str]) -> list[str]:
    """The names as a caller may choose from them: whole, but without bytes that no JSON can hold."""
    return [name.encode(errors="backslashreplace").decode() for name in names[:MOST_TOLD]]


def column_names(first: Sequence[str], *, has_header: bool) -> list[str]:
    """The names in the first row, or `column_0`, `column_1`, … where there is no header or a name is empty.

    Raises:
        DuplicateColumns: two names are equal.
    """
    names = [(_clean(cell) if has_header else "") or f"column_{i}" for i, cell in enumerate(first)]
    if twice := [shown(name) for name, n in Counter(names).items() if n > 1]:
        raise DuplicateColumns(
            f"Expected column names that differ, found more than one {', '.join(twice[:20])}. Rename them, or pass "
            "has_header=false if the first row is data."
        )
    return names


def has_header(rows: Rows, asked: Collection[str | None], learned: str | None, *, labelled: bool) -> tuple[bool, bool]:
    """Whether the first row names the columns, and whether that is in doubt.

    It does where it holds a name asked for, or the model's, or only usual names. Otherwise what stands below decides:
    a label turns up again, a name does not; over numbers, dates and ids a name is none. There a statement is a text
    even so; a question may be a survey's. Over texts alone, names are few words, shorter than nine rows of ten and than
    two thirds of the middle one; so is one chat message in thirty.
    """
    first = [_clean(cell) for cell in rows[0]]
    if any(name in first and not _is_index(name) for name in (*asked, learned) if name is not None):
        return True, False
    if {f"column_{i}" for i, cell in enumerate(first) if cell}.intersection(asked):
        return False, False
    usual = [_key(cell) in TEXT_NAMES | LABEL_NAMES | ID_NAMES for cell in first]
    columns = list(zip(first, _columns(rows[1:]), strict=len(rows) > 1))
    if all(usual) or not columns:
        return any(usual), False
    labels = [cell in values for cell, values in columns if len(first) > 1 and _looks_like_labels(values)]
    if any(labels) or any(usual) or (labels and labelled):
        return not any(labels), False
    codes = [_is_among(cell, values, code) for cell, values in columns if (code := _code_of(values))]
    is_text = any(cell[-1:] in ".!?…。！？" or len(cell.split()) > NAME_WORDS for cell in first if cell)
    if codes or labels:
        is_stated = any(cell[-1] in "。！" or (cell[-1] in ".!…" and len(cell.split()) > 2) for cell in first if cell)
        return not (is_stated or any(codes)), is_text and not any(codes)
    if is_text or any(not cell or cell in values for cell, values in columns):
        return False, False
    n_chars, lengths = sum(map(len, first)), sorted(sum(map(len, row)) for row in rows[1:])
    return n_chars < lengths[len(lengths) // 10] and 3 * n_chars <= 2 * lengths[len(lengths) // 2], True


def find_column(names: Sequence[str], asked: str, role: str) -> int:
    """Position of the column asked for: its name, else its 0-based index.

    Raises:
        ColumnNotFound: neither is there.
    """
    if asked in names:
        return names.index(asked)
    if _is_index(asked) and int(asked) < len(names):
        return int(asked)
    raise _not_found(f"Expected {role} to be a column's name or 0-based index, found {shown(asked)!r}", names, role)


def find_if_asked(names: Sequence[str], asked: str | None, role: str) -> int | None:
    """Position of the column, or None where none is asked for."""
    return None if asked is None else find_column(names, asked, role)


def guess_text(names: Sequence[str], rows: Rows, taken: Collection[int]) -> int:
    """Position of the text: `text`, else another usual name, else the longest column that does not look like labels.

    A column of numbers or dates comes after every other.

    Args:
        names: one per column.
        rows: data rows of the head.
        taken: columns that have another role.

    Raises:
        ColumnNotFound: nothing looks like texts.
    """
    free = [i for i in range(len(names)) if i not in taken]
    columns = _columns(rows)

    def standing(i: int) -> tuple[bool, bool, bool, bool, int]:
        values, key = columns[i] if columns else (), _key(names[i])
        is_words, n_chars = _code_of(values) is not _NUMBER, sum(map(len, values))
        return is_words, key == "text", key in TEXT_NAMES, _is_spaced(values), n_chars

    choice = [i for i in free if _key(names[i]) in TEXT_NAMES or (columns and not _looks_like_labels(columns[i]))]
    if not choice and len(free) != 1:
        raise _not_found("Expected a column of texts, recognised none", names, "text_column")
    return max(choice or free, key=standing)


def guess_label(names: Sequence[str], rows: Rows, taken: Collection[int]) -> int:
    """Position of the label: the only usual name, else the only column of few and short values.

    Raises:
        ColumnNotFound: none, or several that are equally plausible; which one is for the caller to say.
    """
    free = [i for i in range(len(names)) if i not in taken and _key(names[i]) not in SPLIT_NAMES]
    columns = _columns(rows)
    choice = [i for i in free if _key(names[i]) in LABEL_NAMES]
    choice = choice or [i for i in free if columns and _looks_like_labels(columns[i])]
    if len(choice) == 1:
        return choice[0]
    listed = " and ".join(shown(names[i]) for i in choice[:5])
    found = f"{listed} are equally plausible" if choice else "recognised none"
    raise _not_found(f"Expected one column of labels, {found}", names, "label_column")


def _not_found(problem: str, names: Sequence[str], role: str) -> ColumnNotFound:
    listed = ", ".join(map(shown, names[:50])) + (", …" if len(names) > 50 else "")
    advice = f"Pass {role} with one of them" if names[1:] else "Pass delimiter if cells are cut by another character"
    return ColumnNotFound(f"{problem}. The columns are: {listed}. {advice}.", columns=told(names))


def _looks_like_labels(values: Sequence[str]) -> bool:
    distinct = {value.strip() for value in values} - {""}
    return 0 < len(distinct) <= len(values) / 2 and max(map(len, distinct)) <= LONGEST_LABEL


def _code_of(values: Sequence[str]) -> re.Pattern[str] | None:
    """What nine of ten values are: numbers and dates, or ids and addresses; None for words."""
    found = [value for value in values if value.strip()]
    kinds = ((code, sum(code.fullmatch(value) is not None for value in found)) for code in (_NUMBER, _ID))
    return next((code for code, n in kinds if 10 * n >= 9 * len(found) > 0), None)


def _is_among(cell: str, values: Sequence[str], code: re.Pattern[str]) -> bool:
    """Whether a cell is one more of the codes; an id has a mark that all have, as `col1` over `AB-17` has not."""
    marks = set.intersection(*(set(re.sub(r"[^\W_]", "", value)) for value in values if code.fullmatch(value)))
    return cell in values or bool(code.fullmatch(cell) and (code is _NUMBER or not marks or marks & set(cell)))


def _is_spaced(values: Sequence[str]) -> bool:
    """Most values are of several words."""
    return sum(len(value.split()) > 1 for value in values) * 2 > len(values)


def _columns(rows: Rows) -> list[tuple[str, ...]]:
    return list(zip(*rows, strict=True))


def _clean(cell: str) -> str:
    return cell.strip().strip("\ufeff").strip()


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.casefold())


def _is_index(asked: str) -> bool:
    return asked.isascii() and asked.isdecimal()
