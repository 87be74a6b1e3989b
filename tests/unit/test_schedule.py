"""The order in which waiting calls are scored, by the pure schedule alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.inference.schedule import Schedule

QUANTUM = 20
COSTS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


class Scheduling(RuleBasedStateMachine):
    """Calls come, go and are taken in any order; `waiting` is what must still come, written down plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule: Schedule[int] = Schedule(QUANTUM)
        self.waiting: dict[int, dict[int, int]] = {}
        self.pushed = 0

    @rule(costs=COSTS)
    def push(self, costs: list[int]) -> None:
        self.schedule.push(self.pushed, costs)
        self.waiting[self.pushed] = dict(enumerate(costs))
        self.pushed += 1

    @rule(budget=st.integers(1, 100))
    def take(self, budget: int) -> None:
        taken = self.schedule.take(budget)
        assert bool(taken) == bool(self.waiting), "something is taken wherever something waits"
        spent = 0
        for call, row in taken:
            # Its lowest row that still waits: nothing is lost, taken twice, or out of order.
            assert row == min(self.waiting[call])
            spent += self.waiting[call].pop(row)
            if not self.waiting[call]:
                del self.waiting[call]
        assert spent <= budget or len(taken) == 1

    @rule(call=st.integers(0, 50))
    def drop(self, call: int) -> None:
        self.schedule.drop(call)
        self.waiting.pop(call, None)

    @invariant()
    def what_waits_is_counted(self) -> None:
        assert self.schedule.cost == sum(sum(rows.values()) for rows in self.waiting.values())
        assert bool(self.schedule) == bool(self.waiting)


TestScheduling = Scheduling.TestCase


@given(st.lists(st.integers(1, QUANTUM), min_size=1, max_size=40), st.integers(1, 100))
def test_calls_of_one_turn_are_served_first_come_first_served(costs: list[int], budget: int) -> None:
    schedule: Schedule[int] = Schedule(QUANTUM)
    for call, cost in enumerate(costs):
        schedule.push(call, [cost])
    served = [call for _ in costs for call, _row in schedule.take(budget)]
    assert served == list(range(len(costs)))


@given(st.lists(COSTS, min_size=2, max_size=8), st.integers(1, 100))
def test_between_two_turns_of_a_call_every_other_one_that_waits_has_a_turn(calls: list[list[int]], budget: int) -> None:
    schedule: Schedule[int] = Schedule(QUANTUM)
    for call, costs in enumerate(calls):
        schedule.push(call, costs)
    left, turns, spent = Counter({call: len(costs) for call, costs in enumerate(calls)}), [], 0
    while schedule:
        for call, row in schedule.take(budget):
            cost = calls[call][row]
            if turns and turns[-1] == call and (spent + cost <= QUANTUM or left.total() == left[call]):
                spent += cost
            else:
                since = turns[len(turns) - 1 - turns[::-1].index(call) + 1 :] if call in turns else None
                assert since is None or set(since) >= {other for other in left if left[other] and other != call}
                turns.append(call)
                spent = cost
            left[call] -= 1


def test_a_large_call_leaves_single_texts_their_place_in_the_next_batch() -> None:
    schedule: Schedule[str] = Schedule(256)
    schedule.push("large", [16] * 1024)
    assert schedule.take(1024) == [("large", row) for row in range(64)], "alone it has the engine for itself"
    for i in range(8):
        schedule.push(f"single {i}", [16])
    batch = Counter(call for call, _row in schedule.take(1024))
    assert batch == {"large": 56} | {f"single {i}": 1 for i in range(8)}


def test_what_is_left_of_a_dropped_call_is_never_taken() -> None:
    schedule: Schedule[str] = Schedule(QUANTUM)
    schedule.push("gone", [10] * 9)
    schedule.push("there", [10])
    assert schedule.take(20) == [("gone", 0), ("gone", 1)]
    schedule.drop("gone")
    assert (schedule.take(100), schedule.cost) == ([("there", 0)], 0)
