"""Remote models that an operator lets jobs prompt: OpenAI-compatible endpoints, by name."""

import os
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)

from service.core.spec import ENDPOINT_PREFIX

EndpointName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Endpoint(BaseModel):
    """Where a remote model answers, and what asking it may cost.

    Args:
        base_url: What `/chat/completions` is put behind, usually ending in `/v1`; no credentials in it.
        model: Its name there.
        api_key_env: Name of the variable that holds the key, in the worker's environment; none sends no key.
        input_price_per_million: Per million prompt tokens, in a currency of the operator's choice.
        output_price_per_million: Per million answered tokens.
        max_concurrency: Most calls at a time.
        timeout_seconds: Of silence in one try; a call is ended when its tries have taken as long as all may.
        max_retries: Of one call, after 408, 409, 429, 5xx, a timeout, a lost connection or nonsense.
        max_answer_tokens: Where an answer is cut; models that think before they answer need more.
        budget_tokens: After so many tokens no further text of the run is sent.
        budget_cost: The same, in the prices' currency.
    """

    # Whoever misspells a field is not shown what was in it: it may have been a key.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    base_url: HttpUrl
    model: Annotated[str, Field(min_length=1, max_length=200)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    input_price_per_million: Annotated[float, Field(ge=0)] = 0.0
    output_price_per_million: Annotated[float, Field(ge=0)] = 0.0
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    max_retries: Annotated[int, Field(ge=0, le=20)] = 5
    max_answer_tokens: Annotated[int, Field(ge=1, le=100_000)] = 256
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    budget_cost: Annotated[float, Field(gt=0)] | None = None

    @field_validator("base_url")
    @classmethod
    def _is_an_address_alone(cls, url: HttpUrl) -> HttpUrl:
        if url.username or url.password or url.query or url.fragment:
            raise ValueError("expected no user, password, query or fragment; a key goes into the api_key_env variable")
        return url

    @model_validator(mode="after")
    def _cost_can_be_told(self) -> "Endpoint":
        if self.budget_cost is not None and not (self.input_price_per_million or self.output_price_per_million):
            raise ValueError("budget_cost needs input_price_per_million or output_price_per_million")
        return self

    @property
    def host(self) -> str:
        return f"{self.base_url.host}:{self.base_url.port}"

    def api_key(self) -> SecretStr | None:
        """From this process's environment; None where it is not set or empty."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return SecretStr(key) if key else None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In the prices' currency."""
        dear = prompt_tokens * self.input_price_per_million + completion_tokens * self.output_price_per_million
        return dear / 1e6

    def as_json(self) -> dict[str, Any]:
        """What a worker's child is told: no secret, for there is none in it."""
        return self.model_dump(mode="json")


def endpoint_name(prompt_model: str) -> str | None:
    """The endpoint a job names by `remote:NAME`; None where it names a model of this machine."""
    return prompt_model.removeprefix(ENDPOINT_PREFIX) if prompt_model.startswith(ENDPOINT_PREFIX) else None
