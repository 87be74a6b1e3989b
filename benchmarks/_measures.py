"""How the benchmarks take and tell figures: rates by rounds that run every variant once, and ratios of one round."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A figure's values, one a round; its value is their median. Without a bound it is told and not judged."""

    name: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--quick", action="store_true", help="a short run")
    return made


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_rounds(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each variant gave in each round; all run in every round, so that a busy moment hits them alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            taken[name].append(run())
    return taken


def ratio(taken: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """One variant by another, round by round."""
    return [a / b for a, b in zip(taken[name], taken[to], strict=True)]


def show(title: str, measures: Sequence[Measure]) -> None:
    """A table with each figure's median, its range over the rounds, and its bound."""
    print(f"{title}\n{'':32}{'median':>10}{'lowest':>10}{'highest':>10}  bound")
    for measure in measures:
        figures = "".join(f"{x:>10.4g}" for x in (measure.value, min(measure.values), max(measure.values)))
        bounds = ((">=", measure.at_least), ("<=", measure.at_most))
        bound = "".join(f"  {sign} {x:g}{'' if measure.met else ', missed'}" for sign, x in bounds if x is not None)
        print(f"{measure.name:32}{figures}{bound}")


def write(file: Path | None, measures: Sequence[Measure], **machine: Any) -> None:
    """The figures as JSON, with what is to be known of the machine."""
    if file is None:
        return
    told = []
    for measure in measures:
        bounds = {"at_least": measure.at_least, "at_most": measure.at_most}
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        told.append({"name": measure.name, "value": measure.value} | given)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count()} | machine
    file.write_text(json.dumps({"machine": machine, "measures": told}, indent=1) + "\n", encoding="utf-8")
