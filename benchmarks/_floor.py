"""pydantic where it is not installed, as on a machine with the ML libraries alone: a spec's fields and their defaults.

Nothing is checked; what is asked for here is written here. With pydantic at hand this does nothing.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Model:
    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)

    def model_copy(self, update: dict[str, Any]) -> Any:
        return type(self)(**vars(self) | update)

    def model_dump(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).__annotations__ if hasattr(self, name)}


class _StandIn(ModuleType):
    """Any name is something to call or to annotate with."""

    BaseModel, ConfigDict = _Model, dict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None})

    @staticmethod
    def Field(default: Any = ..., **_: Any) -> Any:  # noqa: N802 -- pydantic's name
        return default

    @staticmethod
    def field_validator(*_: Any, **__: Any) -> Any:
        return lambda function: function

    model_validator = field_validator


def stand_in() -> None:
    """To be called before `service.core.spec` is imported."""
    if importlib.util.find_spec("pydantic") is None:
        sys.modules["pydantic"] = _StandIn("pydantic")
