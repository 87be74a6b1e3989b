"""What is worth knowing of a dataset and a split before anything is computed on them.

`look` reads, splits and encodes as a job would. It imports what training imports, so the API runs it in a process of
its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.core.errors import ModelUnavailable
from service.ml.columns import shown
from service.ml.dataset import TableFormat
from service.ml.encode import Tokenizer, load_tokenizer, token_counts
from service.ml.eta import Work
from service.ml.findings import LISTED_LABELS, DatasetWarning, warn
from service.ml.split import PARTS, Part, Split, Table, read_split
from service.ml.table import TextSource

LISTED_PAIRS = 20
MAX_ROWS = 100_000
MAX_CHARS = 10_000_000
"""Of more rows or characters than these, every second, third, … row is looked at; all of them are split."""


@dataclass(frozen=True)
class NearPair:
    """Two rows of the upload, the one of the earlier part first; texts that are almost the same."""

    rows: tuple[int, int]
    parts: tuple[Part, Part]
    similarity: float
    labels_differ: bool


@dataclass(frozen=True)
class NearDuplicates:
    """`count` pairs stand across parts, the most similar are listed; `sampled` where there may be more of them."""

    count: int
    pairs: tuple[NearPair, ...]
    sampled: bool


@dataclass(frozen=True)
class LabelTruncation:
    """A label some of whose texts are longer than `max_length`."""

    label: str
    n_truncated: int
    share_of_tokens_lost: float


@dataclass(frozen=True)
class Truncation:
    """Tokens that no method reads; labels without any are left out, the worst come first."""

    base_model: str
    max_length: int
    n_texts: int
    n_truncated: int
    by_label: tuple[LabelTruncation, ...]


@dataclass(frozen=True)
class Preflight:
    """Everything that was found; `truncation` is None where the base model's tokenizer is not at hand."""

    algorithm: str
    work: Work
    warnings: tuple[DatasetWarning, ...]
    near_duplicates: NearDuplicates
    truncation: Truncation | None


def look(
    file: TextSource, table_format: TableFormat, shares: Mapping[Part, float], seed: int, base_model: str,
    folder: Path | None, max_length: int,
) -> Preflight:  # fmt: skip
    """Looks at the split that a job with these values makes.

    Args:
        file: The upload.
        table_format: How to read it.
        shares: By part, summing to 1.
        seed: Of the split.
        base_model: Its name.
        folder: Its files, where they are at hand.
        max_length: In tokens, special tokens included.

    Raises:
        InvalidData: the rows cannot be split as asked.
    """
    table, split, algorithm = read_split(file, table_format, shares, seed)
    parts, n_chars, sample, stride = _sampled(table, split)
    near, leaks = near_duplicates(table, split)
    warnings = [_missing_labels(table, split), leaks]
    truncation, tokens = None, None
    try:
        counts = token_counts(_tokenizer(base_model, folder), [table.texts[i] for i in sample.tolist()])
    except ModelUnavailable as error:
        warnings.append(DatasetWarning("base_model_not_at_hand", error.detail, 0, ()))
    else:
        truncation = _truncation(base_model, max_length, table, sample, counts)
        message = f"Texts are longer than {max_length} tokens; what lies beyond is not read."
        warnings.append(warn("truncated_text", message, table.row_ids[sample[counts > max_length]]))
        read = np.minimum(counts, max_length)
        tokens = {part: int(read[parts[sample] == i].sum()) * stride for i, part in enumerate(PARTS)}
    rows = {part: len(split.part(part)) for part in PARTS}
    work = Work(rows, tokens, int(n_chars[split.train].sum()), len(table.labels))
    found = tuple(warning for warning in warnings if warning.count or warning.code == "base_model_not_at_hand")
    return Preflight(algorithm, work, found, near, truncation)


def _missing_labels(table: Table, split: Split) -> DatasetWarning:
    """Labels that are too rare, or too entangled with others, to stand in every part."""
    n_labels = len(table.labels)
    absent = {part: np.bincount(table.label_ids[split.part(part)], minlength=n_labels) == 0 for part in PARTS}
    rare = np.flatnonzero(np.logical_or.reduce(list(absent.values())))
    listed = "; ".join(
        f"{shown(table.labels.names[i])} (none in {', '.join(part for part in PARTS if absent[part][i])})"
        for i in rare[:LISTED_LABELS].tolist()
    )
    message = f"Labels do not stand in every part, so they are not learned or not judged: {listed}."
    return warn("label_missing_from_part", message, table.row_ids[np.isin(table.label_ids, rare)])


def _sampled(table: Table, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Each row's part and number of characters; and the rows looked at closer: every so many."""
    parts = np.zeros(len(table.texts), dtype=np.int64)
    for i, part in enumerate(PARTS):
        parts[split.part(part)] = i
    n_chars = np.array([len(text) for text in table.texts])
    stride = max(-(-len(parts) // MAX_ROWS), -(-int(n_chars.sum()) // MAX_CHARS))
    return parts, n_chars, np.arange(0, len(parts), stride), stride


def near_duplicates(table: Table, split: Split) -> tuple[NearDuplicates, DatasetWarning]:
    """What was found, and the warning of it, with the ids of all rows concerned, ascending."""
    from service.ml.near_duplicates import pairs_across

    parts, _, sample, _ = _sampled(table, split)
    found = pairs_across([table.texts[i] for i in sample.tolist()], parts[sample])
    first, second = sample[found.first], sample[found.second]
    ids, labels = table.row_ids, table.label_ids
    listed = tuple(
        NearPair((int(ids[a]), int(ids[b])), (PARTS[parts[a]], PARTS[parts[b]]), float(similarity),
                 bool(labels[a] != labels[b]))
        for a, b, similarity in zip(first[:LISTED_PAIRS].tolist(), second[:LISTED_PAIRS].tolist(), found.similarity,
                                    strict=False)
    )  # fmt: skip
    sampled = len(sample) < len(parts) or not found.complete
    message = "Rows have almost the text of a row in another part of the split; figures on the later part will flatter."
    message += " Not all rows were compared: there may be more." * sampled
    warning = warn("near_duplicate_across_parts", message, np.unique(ids[np.concatenate([first, second])]))
    return NearDuplicates(len(first), listed, sampled), warning


def _tokenizer(base_model: str, folder: Path | None) -> Tokenizer:
    """The one that training uses. Raises ModelUnavailable."""
    if folder is None:
        raise ModelUnavailable(f"The files of base model {base_model!r} are not at hand: its tokens are not counted.")
    from transformers import AutoConfig

    from service.ml.backbone import is_decoder

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return load_tokenizer(folder, decoder=is_decoder(config))
    except Exception as error:
        raise ModelUnavailable(
            f"The tokenizer of base model {base_model!r} cannot be loaded ({type(error).__name__}): its tokens are "
            "not counted, and a job on it would fail."
        ) from error


def _truncation(
    base_model: str, max_length: int, table: Table, sample: NDArray[np.int64], counts: NDArray[np.int64]
) -> Truncation:
    truncated, lost = counts > max_length, np.maximum(counts - max_length, 0)
    label_ids, n_labels = table.label_ids[sample], len(table.labels)
    n_truncated = np.bincount(label_ids[truncated], minlength=n_labels)
    share = np.bincount(label_ids, lost, n_labels) / np.maximum(np.bincount(label_ids, counts, n_labels), 1)
    by_label = tuple(
        LabelTruncation(table.labels.names[i], int(n_truncated[i]), float(share[i]))
        for i in np.argsort(-share, kind="stable").tolist()
        if n_truncated[i]
    )
    return Truncation(base_model, max_length, len(sample), int(truncated.sum()), by_label)
