"""A model behind an OpenAI-compatible endpoint. Texts leave this machine here and nowhere else."""

import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import numpy as np
from anyio.from_thread import start_blocking_portal
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    BadRequestError,
    DefaultAsyncHttpxClient,
    Omit,
)
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from service.core.endpoints import Endpoint
from service.core.errors import BudgetSpent, EndpointUnavailable
from service.core.spec import ENDPOINT_PREFIX
from service.ml.encode import Tokenizer
from worker.methods.protocol import OnProgress, silent
from worker.predictions import Spent

# The longest Retry-After that the client waits out; a longer one ends the call.
_LONGEST_WAIT_SECONDS = 120.0
_HEARS_SIGNALS_SECONDS = 0.2
_PROBE = ("You answer with one word.", "Say: ready")
_HINTS = {
    400: "The model has to take temperature, seed and max_tokens. Look at `model`.",
    401: "Look at the key in the variable that api_key_env names, in the worker's environment.",
    403: "Look at the key in the variable that api_key_env names, and at what it may do.",
    404: "Look at base_url, which usually ends in /v1, and at `model`, which has to be served there.",
    429: "Wait, or lower max_concurrency.",
}


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Completion(BaseModel):
    """What is read of an answer. Servers differ in the rest."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


@dataclass
class _Tally:
    """What a number of calls came to."""

    sent: int = 0
    refused: int = 0
    cut: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, usage: _Usage | None) -> None:
        if usage is None:
            self.uncounted += 1
        else:
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens

    def cost(self, endpoint: Endpoint) -> float:
        return endpoint.cost(self.prompt_tokens, self.completion_tokens)

    def spent(self, endpoint: Endpoint) -> Spent:
        typical, slow = np.quantile(self.seconds, (0.5, 0.95)).tolist()
        if self.uncounted:
            return Spent(None, None, None, typical, slow)
        return Spent(self.prompt_tokens, self.completion_tokens, self.cost(endpoint), typical, slow)


class RemoteModel:
    """Asks one endpoint, many texts at a time, within its budget.

    Args:
        endpoint: Where, how often and how dear.
        name: The endpoint's.
        seed: Sent with every call.
        tokenizer: The base model's: it cuts a text where the other methods stop reading.
    """

    def __init__(self, endpoint: Endpoint, name: str, seed: int, tokenizer: Tokenizer) -> None:
        self.endpoint, self.name, self.seed, self.tokenizer = endpoint, name, seed, tokenizer
        self._key = endpoint.api_key()
        # The library would also send keys and names of an OpenAI account that it finds in the environment.
        self._headers: Any = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if self._key is None:
            self._headers["Authorization"] = Omit()
        self._whole, self._last = _Tally(), _Tally()
        if endpoint.api_key_env and self._key is None:
            raise self._failed(f"needs a key, and the worker's environment has none in {endpoint.api_key_env}", 401)
        if self._key is not None and not self._key.get_secret_value().isascii():
            raise self._failed("has a key that is not plain ASCII; it may have been pasted with a quotation mark", 401)

    @property
    def facts(self) -> dict[str, Any]:
        """For prompt.json: what was asked, and where."""
        asked = {"model": self.endpoint.model, "host": self.endpoint.host, "decoding": "free"}
        return {"prompt_model": ENDPOINT_PREFIX + self.name} | asked

    def check(self) -> None:
        """One call with a neutral text and one token to answer with.

        Raises:
            EndpointUnavailable: it is down, refuses the key or the model, or speaks something else.
        """

        async def probe() -> None:
            async with self._client() as client:
                await self._ask(client, _PROBE, max_tokens=1)

        try:
            self._run(probe)
        except BadRequestError as error:
            raise self._failed("answered with status 400", 400) from error

    def cut(self, text: str, max_tokens: int) -> str:
        """The text's first `max_tokens` tokens, as the base model counts them."""
        spans = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return text if len(spans) <= max_tokens else text[: spans[max_tokens - 1][1]]

    def answer(
        self, prompts: Sequence[tuple[str, str]], _labels: Sequence[str], on_progress: OnProgress = silent
    ) -> tuple[list[str], Spent]:
        """Answers to N prompts, each a system and a user message. A text the endpoint refuses gets an empty one.

        Raises:
            EndpointUnavailable: a call failed, with all its retries; the rest is not sent.
            BudgetSpent: not every text was asked about.
        """
        tally = self._last = _Tally()
        answers = [""] * len(prompts)
        waiting = iter(enumerate(prompts))

        async def work(client: AsyncOpenAI) -> None:
            while not self._budget_is_spent() and (next_one := next(waiting, None)) is not None:
                i, prompt = next_one
                answers[i] = await self._tallied(client, prompt, tally)
                done = len(tally.seconds)
                on_progress(done / len(prompts), f"{self.endpoint.model} answered {done}/{len(prompts)} prompts")

        async def ask_all() -> None:
            async with self._client() as client, anyio.create_task_group() as group:
                for _ in range(min(self.endpoint.max_concurrency, len(prompts))):
                    group.start_soon(work, client)

        self._run(ask_all)
        if len(tally.seconds) < len(prompts):
            raise BudgetSpent(
                f"The budget of endpoint {self.name!r} was spent after {len(tally.seconds)} of {len(prompts)} texts.",
                hint="Raise its budget_tokens or budget_cost, or lower baseline.sample_size or few_shot.",
            )
        if tally.refused == len(prompts):
            raise self._failed(f"refused every one of {len(prompts)} texts (status 400)", 400)
        return answers, tally.spent(self.endpoint)

    def account(self) -> str:
        """One line on the last `answer`: how many texts went where, and what that cost."""
        tally = self._last
        line = f"{tally.sent} texts were sent to model {self.endpoint.model!r} at {self.endpoint.host}: "
        if tally.uncounted:
            line += "it reported no token counts."
        else:
            cost = tally.cost(self.endpoint)
            line += f"{tally.prompt_tokens} + {tally.completion_tokens} tokens{f', cost {cost:.4g}' if cost else ''}."
        if tally.refused:
            line += f" It refused {tally.refused} of them, which count as wrong."
        if tally.cut:
            line += f" {tally.cut} answers were cut at {self.endpoint.max_answer_tokens} tokens (max_answer_tokens)."
        return line

    def _client(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=str(self.endpoint.base_url),
            api_key=self._key.get_secret_value() if self._key else "none",
            timeout=self.endpoint.timeout_seconds,
            max_retries=self.endpoint.max_retries,
            # A redirect to another host would take the text there.
            http_client=DefaultAsyncHttpxClient(follow_redirects=False, timeout=self.endpoint.timeout_seconds),
        )

    async def _tallied(self, client: AsyncOpenAI, prompt: tuple[str, str], tally: _Tally) -> str:
        start, tally.sent = time.perf_counter(), tally.sent + 1
        answer = ""
        try:
            completion = await self._ask(client, prompt, self.endpoint.max_answer_tokens)
        except BadRequestError:  # the probe was taken, so it is this text that is not
            tally.refused += 1
        else:
            tally.add(completion.usage)
            tally.cut += completion.choices[0].finish_reason == "length"
            answer = completion.choices[0].message.content or ""
        tally.seconds.append(time.perf_counter() - start)
        return answer

    async def _ask(self, client: AsyncOpenAI, prompt: tuple[str, str], max_tokens: int) -> _Completion:
        """One answer. Raises BadRequestError, which is about this prompt, or EndpointUnavailable."""
        tries = self.endpoint.max_retries + 1
        try:
            # The client's own limit is for each silence; a server that keeps the line busy is ended by this one.
            with anyio.fail_after(tries * self.endpoint.timeout_seconds + (tries - 1) * _LONGEST_WAIT_SECONDS):
                completion = await self._completion(client, prompt, max_tokens)
        except BadRequestError:
            raise
        except APIStatusError as error:
            raise self._failed(f"answered with status {error.status_code}", error.status_code) from error
        except (APITimeoutError, TimeoutError) as error:
            raise self._failed("did not answer in time (timeout_seconds)") from error
        except APIConnectionError as error:
            raise self._failed("cannot be reached, or hung up") from error
        except ValidationError as error:
            raise self._failed("answered with something that is no chat completion") from error
        if completion.usage is None and (self.endpoint.budget_tokens or self.endpoint.budget_cost):
            raise self._failed("reports no token counts, so that its budget cannot be kept")
        self._whole.add(completion.usage)
        return completion

    async def _completion(self, client: AsyncOpenAI, prompt: tuple[str, str], max_tokens: int) -> _Completion:
        """A well-formed answer; a proxy's hiccup that comes as a 200 is asked again, as the client does with a 5xx."""
        for left in range(self.endpoint.max_retries, -1, -1):
            answer = await client.chat.completions.with_raw_response.create(
                model=self.endpoint.model, temperature=0, seed=self.seed, max_tokens=max_tokens,
                extra_headers=self._headers,
                messages=[{"role": "system", "content": prompt[0]}, {"role": "user", "content": prompt[1]}],
            )  # fmt: skip
            try:
                return _Completion.model_validate_json(answer.content)
            except ValidationError:
                if not left:
                    raise
        raise AssertionError  # the last try returns or raises

    def _budget_is_spent(self) -> bool:
        tokens, cost = self._whole.prompt_tokens + self._whole.completion_tokens, self._whole.cost(self.endpoint)
        return tokens >= (self.endpoint.budget_tokens or np.inf) or cost >= (self.endpoint.budget_cost or np.inf)

    def _failed(self, what: str, status: int = 0) -> EndpointUnavailable:
        hint = _HINTS.get(status, "Look at TUNEPROOF_PROMPT_ENDPOINTS and at the server there; then retry the job.")
        return EndpointUnavailable(f"Endpoint {self.name!r} ({self.endpoint.host}) {what}.", hint=hint)

    @staticmethod
    def _run(calls: Callable[[], Awaitable[None]]) -> None:
        """Runs them in a thread, so that a signal finds this one waiting, and ends them at once.

        A signal that comes between the check for one and the wait itself is not heard by a wait without an end.
        """
        try:
            with start_blocking_portal() as portal:
                running = portal.start_task_soon(calls)
                while not wait([running], timeout=_HEARS_SIGNALS_SECONDS).done:
                    pass
                running.result()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
