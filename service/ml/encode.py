"""Text -> token ids, the same at training, at serving, and for whoever loads the saved tokenizer with stock tools."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import processors

Tokenizer = Any
"""A `transformers` fast tokenizer; one per thread, the Rust object behind it is not to be shared."""


@dataclass(frozen=True)
class Encoded:
    """N texts as token ids, special tokens included.

    Args:
        ids: N lists of token ids, each at most `max_length` long.
        truncated: `(N,)` bool, whether the text was longer.
    """

    ids: list[list[int]]
    truncated: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.fromiter((len(row) for row in self.ids), dtype=np.int64, count=len(self.ids))


def load_tokenizer(folder: Path, *, decoder: bool) -> Tokenizer:
    """The tokenizer of a base model, made fit for classification.

    It pads on the right with its pad token (falling back to EOS), truncates on the right, and for a decoder ends
    every text with exactly one EOS, whether or not its files do so themselves. The change is in the tokenizer, not
    around it, so the copy saved beside an adapter gives stock users the same ids.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if decoder:
        _end_with_one_eos(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Encoded:
    """Token ids of N texts. Markup such as `<|im_end|>` inside a text is plain text, never a special token."""
    ids = _ids(tokenizer, texts)
    truncated = np.fromiter((len(row) > max_length for row in ids), dtype=np.bool_, count=len(ids))
    long_rows = np.flatnonzero(truncated)
    if len(long_rows):
        # Cut by the tokenizer, which knows how much room the special tokens at the end need.
        cut = _ids(tokenizer, [texts[i] for i in long_rows.tolist()], truncation=True, max_length=max_length)
        for row, shorter in zip(long_rows.tolist(), cut, strict=True):
            ids[row] = shorter
    return Encoded(ids, truncated)


def token_batches(lengths: NDArray[np.int64], token_budget: int, max_rows: int) -> Iterator[NDArray[np.int64]]:
    """Positions of the rows, batch by batch, sorted by length so that little is padding.

    Args:
        lengths: `(N,)` tokens per row.
        token_budget: Most tokens in a batch, padding included; a single longer row is a batch of its own.
        max_rows: Most rows in a batch.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    for stop in range(1, len(order) + 1):
        full = stop - start == max_rows
        # Sorted: the next row would be the longest, and all are padded to it.
        if stop == len(order) or full or (stop - start + 1) * int(lengths[order[stop]]) > token_budget:
            yield order[start:stop]
            start = stop


def _ids(tokenizer: Tokenizer, texts: Sequence[str], **cut: Any) -> list[list[int]]:
    if not texts:
        return []
    answer = tokenizer(
        list(texts), return_attention_mask=False, return_token_type_ids=False, split_special_tokens=True,
        verbose=False, **cut,
    )  # fmt: skip
    rows: list[list[int]] = answer["input_ids"]
    return rows


def _end_with_one_eos(tokenizer: Tokenizer) -> None:
    """Has the post-processor append EOS, unless the tokenizer's own files already do."""
    eos = tokenizer.eos_token
    if _ids(tokenizer, ["a"])[0][-1:] == [tokenizer.eos_token_id]:
        return
    append = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = append if before is None else processors.Sequence([before, append])
