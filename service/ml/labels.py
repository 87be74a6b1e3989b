"""The labels of a dataset and their integer ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelSet:
    """K labels; a label's id is its place. The order is by code point, so it does not depend on the rows' order."""

    names: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {name: i for i, name in enumerate(self.names)})

    @classmethod
    def of(cls, labels: Iterable[str]) -> "LabelSet":
        return cls(tuple(sorted(set(labels))))

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """`(N,)` ids of N labels; KeyError on an unknown one."""
        return np.fromiter((self._ids[label] for label in labels), dtype=np.int64, count=len(labels))

    def id_of(self, label: str) -> int | None:
        return self._ids.get(label)
