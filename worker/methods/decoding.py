"""Greedy answers to prompts, as free text or over the labels' trie: fast where all begin alike, else by stock code."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from service.ml.encode import token_batches
from worker.methods.label_trie import ROOT, LabelTrie
from worker.methods.shared_prefix import SharedPrefix

Done = Callable[[int], None]
"""Called often, with the number of rows that are finished."""


class Rule(Protocol):
    """What may be generated; keeps what was, by row.

    Args:
        max_new_tokens: Most tokens of an answer.
        stem: Tokens that every answer begins with.
        ends: Tokens that end an answer.
    """

    max_new_tokens: int
    stem: list[int]
    ends: frozenset[int]

    def choose(self, hidden: Tensor, rows: list[int]) -> list[list[int]]:
        """As `shared_prefix.Choose`."""

    def stock(self, n_prompt: int) -> dict[str, Any]:
        """What stock `generate` has to be told, behind prompts of `n_prompt` tokens."""

    def take(self, row: int, generated: list[int]) -> None:
        """What stock `generate` answered."""


class Free:
    """The likeliest token each time, until one ends the answer.

    Args:
        model: The causal model.
        n: Rows.
        max_new_tokens: Most tokens of an answer.
        ends: Tokens that end an answer.
    """

    def __init__(self, model: Any, n: int, max_new_tokens: int, ends: Sequence[int]) -> None:
        self.head, self.max_new_tokens, self.ends = model.get_output_embeddings(), max_new_tokens, frozenset(ends)
        self.stem: list[int] = []
        self.answers: list[list[int]] = [[] for _ in range(n)]

    def choose(self, hidden: Tensor, rows: list[int]) -> list[list[int]]:
        going = []
        for row, token in zip(rows, self.head(hidden).argmax(-1).tolist(), strict=True):
            self.answers[row].append(token)
            ended = token in self.ends or len(self.answers[row]) == self.max_new_tokens
            going.append([] if ended else [token])
        return going

    def stock(self, n_prompt: int) -> dict[str, Any]:
        return {}

    def take(self, row: int, generated: list[int]) -> None:
        self.answers[row] = generated


class Constrained:
    """The likeliest token of those that lead to a label, until only one label is left.

    Args:
        model: The causal model.
        n: Rows.
        trie: Of the labels; its end tokens end an answer.
    """

    def __init__(self, model: Any, n: int, trie: LabelTrie) -> None:
        self.head, self.trie, self.max_new_tokens = model.get_output_embeddings(), trie, trie.longest + 1
        self.stem, start = trie.forced(ROOT)
        self.ends = trie.ends
        self._nodes = [start] * n
        self.labels: list[int | None] = [None] * n

    def choose(self, hidden: Tensor, rows: list[int]) -> list[list[int]]:
        allowed = {node: self.trie.allowed(node) for node in {self._nodes[row] for row in rows}}
        columns = sorted(set().union(*allowed.values()))
        place = {token: i for i, token in enumerate(columns)}
        forbidden = np.ones((len(rows), len(columns)), dtype=bool)
        for i, row in enumerate(rows):
            forbidden[i, [place[token] for token in allowed[self._nodes[row]]]] = False
        # Only these tokens' rows of the language-model head: a few dozen of some 150,000.
        at = torch.tensor(columns, device=hidden.device)
        bias = self.head.bias if self.head.bias is None else self.head.bias[at]
        logits = linear(hidden, self.head.weight[at], bias)
        chosen = logits.masked_fill(torch.from_numpy(forbidden).to(hidden.device), -torch.inf).argmax(1)
        going = []
        for row, column in zip(rows, chosen.tolist(), strict=True):
            node, token = self._nodes[row], columns[column]
            self.labels[row] = self.trie.label(node, token)
            if self.labels[row] is None:
                fed, self._nodes[row] = self.trie.step(node, token)
                going.append(fed)
            else:
                going.append([])
        return going

    def stock(self, n_prompt: int) -> dict[str, Any]:
        return {"prefix_allowed_tokens_fn": lambda _row, ids: self.trie.allowed_after(ids[n_prompt:].tolist())}

    def take(self, row: int, generated: list[int]) -> None:
        self.labels[row] = self.trie.label_of(generated)


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[list[int]], rule: Rule, done: Done) -> None:
    """Has `rule` answer N prompts, in batches of like length."""
    stems = [[*ids, *rule.stem] for ids in prompts]
    shared = SharedPrefix.of(model, stems, rule.max_new_tokens)
    if shared is None:
        stock_generate(model, prompts, rule, done)
        return
    finished = 0
    lengths = np.array([len(ids) - shared.length for ids in stems])
    with shared.attending():
        for rows in token_batches(lengths, *((2048, 256) if model.device.type == "cpu" else (16_384, 2048))):
            shared.decode(stems, rows.tolist(), rule.choose, partial(done, finished))
            finished += len(rows)
            done(finished)


@torch.inference_mode()
def stock_generate(model: Any, prompts: Sequence[list[int]], rule: Rule, done: Done) -> None:
    """The same by the model's own `generate`, padded on the left: for models that attend in a way of their own."""
    lengths = np.array([len(ids) for ids in prompts])
    ends = sorted(rule.ends)
    finished = 0
    for rows in token_batches(lengths, 4096 if model.device.type == "cpu" else 32_768, 64):
        longest = int(lengths[rows].max())
        padded = torch.tensor([[ends[0]] * (longest - len(prompts[i])) + prompts[i] for i in rows])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        generated = model.generate(
            input_ids=padded.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=rule.max_new_tokens, repetition_penalty=1.0, num_beams=1, temperature=None, top_p=None,
            top_k=None, pad_token_id=ends[0], eos_token_id=ends, **rule.stock(longest),
        )  # fmt: skip
        for row, ids in zip(rows.tolist(), generated[:, longest:].tolist(), strict=True):
            rule.take(row, ids)
        finished += len(rows)
        done(finished)
