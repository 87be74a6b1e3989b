"""No training at all: a prompted model, or the similarity of text and label name where only an encoder is at hand."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError

from service.core.errors import InvalidData, ModelUnavailable
from service.core.spec import Decoding
from service.ml.base_models import Located
from service.ml.device import DTYPES, training_precision
from service.ml.encode import markup_is_special
from service.ml.labels import LabelSet
from worker.methods.decoding import Constrained, Free, generate
from worker.methods.frozen import FrozenBase
from worker.methods.label_trie import LabelTrie
from worker.methods.prompts import PromptTemplate, described, parse_answer
from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import NO_ANSWER, Predictions, Spent

# Stand for the messages while the chat template is written around them.
_PLACES = ("[[the system message]]", "[[the user message]]")
_ANSWER = "[[the answer]]"


@dataclass(frozen=True)
class Similarity:
    """The label whose name, and description, lies nearest to the text: cosine of pooled states. Not a prompt."""

    base: FrozenBase
    labels: LabelSet
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        start = time.perf_counter()
        names = tuple(described(n, self.descriptions, n.replace("_", " ").replace("-", " ")) for n in self.labels.names)
        label_states = self.base.states(names)["pooled"]
        states = self.base.states(tuple(texts), on_progress)["pooled"]
        seconds = (time.perf_counter() - start) / max(len(texts), 1)
        return Predictions((states @ label_states.T).argmax(1), seconds_per_row=seconds)


class Answerer(Protocol):
    """A generative model, on this machine or another."""

    @property
    def facts(self) -> dict[str, Any]:
        """Which model it is, for prompt.json."""

    def cut(self, text: str, max_tokens: int) -> str:
        """The text's first `max_tokens` tokens: a prompt is to read no more of it than the other methods do."""

    def answer(
        self, prompts: Sequence[tuple[str, str]], labels: Sequence[str], on_progress: OnProgress
    ) -> tuple[list[str], Spent | None]:
        """Generated texts for N prompts, each a system and a user message, and what they took elsewhere."""


class PromptedModel:
    """A generative model, asked for the label alone: greedy text, or greedy among the labels."""

    def __init__(self, source: Located, device: torch.device, decoding: Decoding = "free") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
            model: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=DTYPES[training_precision(device)],
            )
        except Exception as error:
            raise ModelUnavailable(
                f"Prompt model {source.base.name!r} cannot be loaded ({type(error).__name__}).",
                hint="Name a model whose config.json says …ForCausalLM, with undamaged safetensors and a tokenizer.",
            ) from error
        # Not in an answer's words. `<think>` is, to tell the thoughts from the answer.
        self._unsaid = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        markup_is_special(self.tokenizer)
        self.model = model.to(device).eval()
        self.name, self.max_length = source.base.name, source.base.max_length
        self.decoding = decoding
        self.facts = {"prompt_model": source.base.name, "revision": source.revision, "decoding": decoding}
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]

    def encode_prompt(self, system: str, user: str) -> list[int]:
        """Ids of one prompt: through the model's chat template where it has one, with no EOS at the end.

        Markup in the messages, such as a text's `<|im_end|>`, is text: it ends no turn and starts none.
        """
        ids: list[int]
        if not self.tokenizer.chat_template:
            ids = self.tokenizer(f"{system}\n\n{user}\nLabel:", split_special_tokens=True)["input_ids"]
            while ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            return ids
        plain = partial(self.tokenizer, add_special_tokens=False, verbose=False)
        if all(self._text_ids(said) == plain(said)["input_ids"] for said in (system, user)):
            return list(plain(self._chat(system, user))["input_ids"])  # the template writes the markup itself
        said = dict(zip(_PLACES, (system, user), strict=True))
        pieces = re.split("|".join(f"({re.escape(place)})" for place in _PLACES), self._chat(*_PLACES))
        ids = []
        for piece in filter(None, pieces):
            text, is_said = said.get(piece, piece), piece in said
            ids += plain(text, split_special_tokens=is_said)["input_ids"]
        return ids

    def _chat(self, system: str, user: str, answer: str | None = None) -> str:
        """The conversation up to the answer, or with it."""
        answered = [] if answer is None else [{"role": "assistant", "content": answer}]
        said = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self._templated(said + answered)
        except TemplateError:  # Gemma's template takes no system message
            return self._templated([{"role": "user", "content": f"{system}\n\n{user}"}, *answered])

    def _templated(self, messages: list[dict[str, str]]) -> str:
        prompt: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user", enable_thinking=False
        )
        return prompt

    def cut(self, text: str, max_tokens: int) -> str:
        ids = self._text_ids(text)
        return text if len(ids) <= max_tokens else str(self.tokenizer.decode(ids[:max_tokens]))

    def answer(
        self, prompts: Sequence[tuple[str, str]], labels: Sequence[str], on_progress: OnProgress
    ) -> tuple[list[str], None]:
        ids, n = [self.encode_prompt(system, user) for system, user in prompts], len(prompts)
        longest = max(map(len, ids)) + self.label_tokens(labels)
        if longest > self.max_length:
            raise InvalidData(
                f"A prompt with its answer takes {longest} tokens, and {self.name!r} reads {self.max_length}.",
                hint="Lower baseline.few_shot or train.max_length, shorten label_descriptions, or name another model.",
            )

        def done(finished: int) -> None:
            on_progress(finished / n, f"{self.name} answered {finished}/{n} prompts")

        if self.decoding == "free":
            free = Free(self.model, n, self.label_tokens(labels), self.ends)
            generate(self.model, ids, free, done)
            said = [[token for token in answer if token not in self._unsaid] for answer in free.answers]
            return self.tokenizer.batch_decode(said), None
        constrained = Constrained(self.model, n, LabelTrie(self.label_paths(labels), self.ends))
        generate(self.model, ids, constrained, done)
        return ["" if label is None else labels[label] for label in constrained.labels], None

    def label_tokens(self, labels: Sequence[str]) -> int:
        """Tokens of the longest label, with room for a prefix such as `Label:`, quotes and the end."""
        return max(map(len, self.label_paths(labels))) + 8

    def label_paths(self, labels: Sequence[str]) -> list[list[int]]:
        """Token ids of K labels as they would follow a prompt: with a space where one belongs between the two."""
        before, space = "Label:", " "
        if self.tokenizer.chat_template:
            before = self._chat(*_PLACES).rpartition(_PLACES[1])[2]
            answered = self._chat(*_PLACES, _ANSWER).rpartition(_ANSWER)[0]
            space = " " if answered.endswith(f"{before} ") else ""
        lead = self._text_ids(before)
        whole = [self._text_ids(before + space + label) for label in labels]
        return [
            ids[len(lead) :] if ids[: len(lead)] == lead else self._text_ids(space + label)
            for ids, label in zip(whole, labels, strict=True)
        ]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of plain text, in which markup is text too."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return ids


@dataclass(frozen=True)
class Prompted:
    """Zero-shot prompting, or few-shot with examples from the train rows."""

    model: Answerer
    template: PromptTemplate
    labels: LabelSet
    examples: tuple[tuple[str, str], ...] = ()
    max_text_tokens: int = 192

    def messages(self, text: str) -> tuple[str, str]:
        """System and user message for one text."""
        return self.template.fill(self.labels.names, self.model.cut(text, self.max_text_tokens), self._cut_examples)

    @cached_property
    def _cut_examples(self) -> list[tuple[str, str]]:
        return [(self.model.cut(example, self.max_text_tokens), label) for example, label in self.examples]

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        start = time.perf_counter()
        raw, spent = self.model.answer([self.messages(text) for text in texts], self.labels.names, on_progress)
        seconds = (time.perf_counter() - start) / max(len(texts), 1)
        parsed = [parse_answer(answer, self.labels.names) for answer in raw]
        ids = [NO_ANSWER if answer.label is None else self.labels.id_of(answer.label) for answer in parsed]
        outcomes = tuple(answer.outcome for answer in parsed)
        return Predictions(np.array(ids, dtype=np.int64), None, tuple(raw), outcomes, seconds, spent=spent)


def draw_examples(train: Rows, n: int, seed: int) -> tuple[tuple[str, str], ...]:
    """`n` train rows as `(text, label)`, label by label in turn so that they are balanced; seeded."""
    rng = np.random.default_rng([seed, n])
    by_label = [rng.permutation(np.flatnonzero(train.label_ids == i)) for i in rng.permutation(len(train.labels))]
    rounds = (rows[turn] for turn in range(n) for rows in by_label if turn < len(rows))
    chosen = [int(row) for row, _ in zip(rounds, range(n), strict=False)]
    return tuple((train.texts[i], train.labels.names[train.label_ids[i]]) for i in chosen)
