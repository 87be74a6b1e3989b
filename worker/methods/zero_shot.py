"""No training at all: a prompted model, or the similarity of text and label name where only an encoder is at hand."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError

from service.core.errors import ModelUnavailable
from service.ml.base_models import Located
from service.ml.device import DTYPES, training_precision
from service.ml.encode import token_batches
from service.ml.labels import LabelSet
from worker.methods.frozen import FrozenBase
from worker.methods.prompts import PromptTemplate, parse_answer
from worker.methods.protocol import OnProgress, Rows, silent
from worker.predictions import NO_ANSWER, Predictions, Spent

# Stand for the messages while the chat template is written around them.
_PLACES = ("[[the system message]]", "[[the user message]]")


@dataclass(frozen=True)
class Similarity:
    """The label whose name lies nearest to the text: cosine of pooled states. A baseline, but not a prompt."""

    base: FrozenBase
    labels: LabelSet

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        start = time.perf_counter()
        names = tuple(name.replace("_", " ").replace("-", " ") for name in self.labels.names)
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
    """A generative model, asked for the label alone: greedy, batched, padded on the left."""

    def __init__(self, source: Located, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False, padding_side="left"
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
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.to(device).eval()
        self.device = device
        self.name = source.base.name
        self.facts = {"prompt_model": source.base.name, "revision": source.revision}

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
        markup = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if not any(token in system or token in user for token in markup):
            # The template writes the special tokens itself.
            return list(self.tokenizer(self._chat(system, user), add_special_tokens=False)["input_ids"])
        said = dict(zip(_PLACES, (system, user), strict=True))
        pieces = re.split("|".join(f"({re.escape(place)})" for place in _PLACES), self._chat(*_PLACES))
        ids = []
        for piece in filter(None, pieces):
            text, is_said = said.get(piece, piece), piece in said
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_said)["input_ids"]
        return ids

    def _chat(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self._templated(messages)
        except TemplateError:  # Gemma's template takes no system message
            return self._templated([{"role": "user", "content": f"{system}\n\n{user}"}])

    def _templated(self, messages: list[dict[str, str]]) -> str:
        prompt: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return prompt

    def cut(self, text: str, max_tokens: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return text if len(ids) <= max_tokens else str(self.tokenizer.decode(ids[:max_tokens]))

    def answer(
        self, prompts: Sequence[tuple[str, str]], labels: Sequence[str], on_progress: OnProgress
    ) -> tuple[list[str], None]:
        ids = [self.encode_prompt(system, user) for system, user in prompts]
        return self.generate(ids, self.label_tokens(labels), on_progress), None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, on_progress: OnProgress) -> list[str]:
        """Greedy answers to N prompts, special tokens left out."""
        answers = [""] * len(prompts)
        lengths = np.array([len(ids) for ids in prompts])
        done = 0
        for rows in token_batches(lengths, 4096 if self.device.type == "cpu" else 32_768, 64):
            longest = int(lengths[rows].max())
            pad = self.tokenizer.pad_token_id
            padded = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            generated = self.model.generate(
                input_ids=padded.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens,
                do_sample=False, repetition_penalty=1.0, num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=pad,
            )  # fmt: skip
            texts = self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            done += len(rows)
            on_progress(done / len(prompts), f"{self.name} answered {done}/{len(prompts)} prompts")
        return answers

    def label_tokens(self, labels: Sequence[str]) -> int:
        """Tokens of the longest label, with room for a prefix such as `Label:`, quotes and the end."""
        longest = max(len(self.tokenizer(name, add_special_tokens=False)["input_ids"]) for name in labels)
        return longest + 8


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
        most = self.max_text_tokens
        examples = [(self.model.cut(example, most), label) for example, label in self.examples]
        return self.template.fill(self.labels.names, self.model.cut(text, most), examples)

    def predict(self, texts: Sequence[str], on_progress: OnProgress = silent) -> Predictions:
        start = time.perf_counter()
        raw, spent = self.model.answer([self.messages(text) for text in texts], self.labels.names, on_progress)
        seconds = (time.perf_counter() - start) / max(len(texts), 1)
        parsed = [parse_answer(answer, self.labels.names) for answer in raw]
        ids = [NO_ANSWER if answer.label is None else self.labels.id_of(answer.label) for answer in parsed]
        outcomes = tuple(answer.outcome for answer in parsed)
        return Predictions(np.array(ids, dtype=np.int64), None, tuple(raw), outcomes, seconds, spent)


def draw_examples(train: Rows, n: int, seed: int) -> tuple[tuple[str, str], ...]:
    """`n` train rows as `(text, label)`, label by label in turn so that they are balanced; seeded."""
    rng = np.random.default_rng([seed, n])
    by_label = [rng.permutation(np.flatnonzero(train.label_ids == i)) for i in rng.permutation(len(train.labels))]
    rounds = (rows[turn] for turn in range(n) for rows in by_label if turn < len(rows))
    chosen = [int(row) for row, _ in zip(rounds, range(n), strict=False)]
    return tuple((train.texts[i], train.labels.names[train.label_ids[i]]) for i in chosen)
