"""Text -> token ids, the same at training, at serving, and for whoever loads the saved tokenizer with stock tools."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

Tokenizer = Any
"""A `transformers` fast tokenizer; one per thread, the Rust object behind it is not to be shared."""

# The tokenizer keeps strings, offsets and masks of every token of a call, many times the ids that are wanted.
_TEXTS_AT_ONCE = 4096
_BRACKETS = ("<", "[", "{", "|")


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

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not any((folder / name).is_file() for name in tokenizer.vocab_files_names.values()):
        raise ValueError("There is no vocabulary, and transformers makes up an empty one.")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if decoder:
        _end_with_one_eos(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    markup_is_special(tokenizer)
    # Said in the saved tokenizer_config.json too, so that markup in a text is text to stock users as well.
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def markup_is_special(tokenizer: Tokenizer) -> None:
    """Counts all markup among the special tokens, which alone can be split where they stand in a text.

    Qwen3's makers added `<think>` and `<tool_call>` without calling them special. What others added without a bracket,
    words and runs of spaces, stays the token that their model knows.
    """
    added = tokenizer.added_tokens_decoder.values()
    markup = [token for token in added if not token.special and token.content.lstrip().startswith(_BRACKETS)]
    tokenizer.add_tokens(markup, special_tokens=True)


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


def token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """`(N,)` tokens of N texts as `encode` counts them before it cuts, without keeping any."""
    pieces = (texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE))
    return np.array([len(row) for piece in pieces for row in _ids(tokenizer, piece)], dtype=np.int64)


def token_batches(
    lengths: NDArray[np.int64], token_budget: int, max_rows: int, *, padded: bool = True
) -> Iterator[NDArray[np.int64]]:
    """Positions of the rows, batch by batch, sorted by length so that little is padding.

    Args:
        lengths: `(N,)` tokens per row.
        token_budget: Most tokens in a batch; a single longer row is a batch of its own.
        max_rows: Most rows in a batch.
        padded: Whether every row is padded to the longest of its batch, and padding counts.
    """
    order = np.argsort(lengths, kind="stable")
    start = tokens = 0
    for stop, row in enumerate(order.tolist()):
        length = int(lengths[row])
        # Sorted: this row would be the longest.
        with_it = (stop - start + 1) * length if padded else tokens + length
        if stop > start and (with_it > token_budget or stop - start == max_rows):
            yield order[start:stop]
            start, tokens = stop, 0
        tokens += length
    if start < len(order):
        yield order[start:]


def _ids(tokenizer: Tokenizer, texts: Sequence[str], **cut: Any) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        answer = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]), return_attention_mask=False, return_token_type_ids=False,
            split_special_tokens=True, verbose=False, **cut,
        )  # fmt: skip
        rows += answer["input_ids"]
    return rows


def _end_with_one_eos(tokenizer: Tokenizer) -> None:
    """Has the post-processor append EOS, unless the tokenizer's own files already do.

    Raises:
        ValueError: the tokenizer has no EOS token, or a post-processor of a kind that this cannot add to.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer of a decoder needs an EOS token.")
    before = _ids(tokenizer, ["a"])[0]
    if before[-1:] == [tokenizer.eos_token_id]:
        return
    backend = tokenizer.backend_tokenizer
    body = json.loads(backend.to_str())
    body["post_processor"] = _with_eos(body["post_processor"], str(tokenizer.eos_token), tokenizer.eos_token_id)
    backend.post_processor = Backend.from_str(json.dumps(body)).post_processor
    if _ids(tokenizer, ["a"])[0] != [*before, tokenizer.eos_token_id]:
        raise ValueError("The tokenizer's post-processor cannot be made to append an EOS token.")


def _with_eos(post_processor: dict[str, Any] | None, eos: str, eos_id: int) -> dict[str, Any]:
    """`post_processor`, as tokenizer.json has it, with EOS at its template's end.

    A second template behind the first would not do: it takes what the first put before the text for a text of its own.
    """
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    plain = {"type": "TemplateProcessing", "single": text, "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}]}
    steps = [] if post_processor is None else post_processor.get("processors", [post_processor])
    if not any(step["type"] == "TemplateProcessing" for step in steps):
        steps = [*steps, plain | {"special_tokens": {}}]
    for step in steps:
        if step["type"] == "TemplateProcessing":
            for kind, type_id in (("single", 0), ("pair", 1)):
                step[kind] = [*step[kind], {"SpecialToken": {"id": eos, "type_id": type_id}}]
            step["special_tokens"][eos] = {"id": eos, "ids": [eos_id], "tokens": [eos]}
    return {"type": "Sequence", "processors": steps}
