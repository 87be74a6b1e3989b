"""Who is next: rows of calls in turns, so that a large call cannot keep the others waiting."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Call = TypeVar("Call", bound=Hashable)


class Schedule(Generic[Call]):
    """Rows that wait, by call, each with what it costs. Data alone: no threads, no clock.

    Calls take turns, first come first served. A turn is up to `quantum` of a call's rows, in their order; a call with
    rows left then goes behind the others. Source: Shreedhar and Varghese 1995 (deficit round robin, without deficits).
    """

    def __init__(self, quantum: int) -> None:
        self.cost = 0
        """Of all rows that wait."""
        self._quantum = quantum
        self._calls: OrderedDict[Call, deque[tuple[int, int]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def push(self, call: Call, costs: Iterable[int]) -> None:
        """Puts a new call behind all others; its rows are numbered from 0 on."""
        self._calls[call] = deque(enumerate(costs))
        self.cost += sum(cost for _row, cost in self._calls[call])

    def take(self, budget: int) -> list[tuple[Call, int]]:
        """The next rows, `budget`'s worth of them; the first is taken however much it costs."""
        taken: list[tuple[Call, int]] = []
        while self._calls and (not taken or self._first_cost() <= budget):
            call, rows = self._calls.popitem(last=False)
            turn = 0
            while rows and (not taken or rows[0][1] <= budget) and (not turn or turn + rows[0][1] <= self._quantum):
                row, cost = rows.popleft()
                taken.append((call, row))
                turn, budget, self.cost = turn + cost, budget - cost, self.cost - cost
            if rows:
                self._calls[call] = rows
        return taken

    def drop(self, call: Call) -> None:
        """Forgets what is left of a call."""
        self.cost -= sum(cost for _row, cost in self._calls.pop(call, ()))

    def _first_cost(self) -> int:
        return next(iter(self._calls.values()))[0][1]
