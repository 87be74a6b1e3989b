"""The prompt's text, by version, and what an answer to it means.

A template's words are part of a result: a change makes version 2 and keeps version 1.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.predictions import Outcome

SYSTEM_V1 = "You sort texts into categories. You answer with the name of one category and nothing else."
USER_V1 = """Categories:
{labels}

Which of these categories does the text below belong to? Answer with the category's name only, spelled as above.
{examples}
Text: {text}"""

VERSION, VERSION_DESCRIBED = "zero-shot-v1", "zero-shot-v2"
_LABEL_PREFIX = re.compile(
    r"^(?:the\s+)?(?:label|category|class|answer|intent|topic)(?:\s+is)?\s*[:=\-]?\s+", re.IGNORECASE
)
# A block whose beginning stood in the prompt is closed without having been opened.
_THINKING = re.compile(r"\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class PromptTemplate:
    """A system and a user message with the places `{labels}`, `{text}` and, optionally, `{examples}`.

    Version 2 is version 1 with labels that are described; labels without a description stand as in version 1.
    """

    user: str = USER_V1
    system: str = SYSTEM_V1
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        if (self.user, self.system) != (USER_V1, SYSTEM_V1):
            return "own"
        return VERSION_DESCRIBED if self.descriptions else VERSION

    def fill(self, labels: Sequence[str], text: str, examples: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
        """The two messages for one text. What stands in a text is data: places in it are not filled again."""
        shown = "".join(f"\nText: {example}\nCategory: {label}\n" for example, label in examples)
        listed = "\n".join(f"- {described(label, self.descriptions)}" for label in labels)
        values = {"labels": listed, "examples": shown, "text": text}
        template = self.user if "{examples}" in self.user else self.user.replace("{text}", "{examples}{text}")
        return self.system, re.sub(r"\{(labels|examples|text)\}", lambda match: values[match[1]], template)


def described(label: str, descriptions: Mapping[str, str], shown_as: str | None = None) -> str:
    """`label: its description` in one line, or the label alone where it has none."""
    words = [label if shown_as is None else shown_as, " ".join(descriptions.get(label, "").split())]
    return ": ".join(filter(None, words))


@dataclass(frozen=True)
class Answer:
    """A parsed answer: the label it names, or why there is none."""

    label: str | None
    outcome: Outcome


def parse_answer(raw: str, labels: Sequence[str]) -> Answer:
    """The one label a generated text names.

    In this order: the whole answer, first as it is spelled; its first line; the answer without quotes, punctuation and
    a prefix such as "Label:"; a label named inside a sentence. Case, accents of punctuation and `_`, `-` and spaces
    count as equal. Two different labels named are ambiguous, even where one of them would be right; a label that is
    part of another one named at the same place does not count.
    """
    if raw in labels:
        return Answer(raw, "valid")
    text = _THINKING.sub("", raw).strip()
    if not text:
        return Answer(None, "empty")
    folded: dict[str, list[str]] = {}
    for label in labels:
        folded.setdefault(_fold(label), []).append(label)
    for candidate in (text, text.splitlines()[0], _LABEL_PREFIX.sub("", text.splitlines()[0].strip(" \t*#>-\"'`"))):
        exact = [label for label in labels if label == candidate.strip(" \t\"'`*.,:;!")]
        named = exact or folded.get(_fold(candidate), [])
        if len(named) == 1:
            return Answer(named[0], "valid")
    inside = _labels_inside(_fold(text), folded)
    if len(inside) == 1:
        return Answer(inside[0], "valid")
    return Answer(None, "ambiguous" if inside else "invalid")


def _labels_inside(text: str, folded: dict[str, list[str]]) -> list[str]:
    """Labels that stand in the text as whole words, the longest first so that parts of them do not count again."""
    found: list[str] = []
    for key in sorted((key for key in folded if key and key in text), key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(key)}(?!\w)"
        if re.search(pattern, text):
            found += folded[key]
            text = re.sub(pattern, "\0", text)
    return found


def _fold(text: str) -> str:
    """Case-folded, compatibility forms unified, every run of separators and punctuation one space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w+#&%$€£/@]+|_+", " ", plain).strip()
    return words or plain.strip()
