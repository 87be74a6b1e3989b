"""How fast predictions are: the engine against stock PEFT and against its own base, HTTP against a plain server.

On a CPU, MiniLM as it comes with the package and texts as long as BANKING77's. Ratios within one run, medians of
rounds that run every side once. The engine alone and the plain server use every core, as torch does by default; the
service is told to by TUNEPROOF_SERVE_THREADS, as on a machine that only serves. PEFT wants the same number of labels
of all adapters, so whatever is compared with it has 77, as have our sides of those ratios; elsewhere they differ.

`--device cuda`, or `--shape tiny` on any machine: a Qwen3 of random weights, the engine against the raw forward of
the same base.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from _measures import parser, show, write


def arguments() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked.add_argument("--shape", choices=("0.6b", "tiny"), help="of a Qwen3; by default 0.6b with CUDA, none without")
    asked.add_argument("--rounds", type=int)
    asked.add_argument("--seconds", type=float, help="of each server's load in a round")
    asked.add_argument("--models", type=int, default=1000, help="adapters asked for by Zipf's law")
    given = asked.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.seconds = given.seconds or (2.0 if given.quick else 6.0)
    return given


def on_cpu(given: argparse.Namespace, folder: Path) -> tuple[str, list[Any], dict[str, Any]]:
    """Title, measures, and what is to be known of the machine."""
    from _bulk import bulk_measures
    from _engine_alone import Alone, engine_measures
    from _over_http import http_measures

    alone = Alone.over(folder / "adapters")
    measures = engine_measures(alone, given.rounds) + http_measures(alone, folder, given)
    measures += bulk_measures(alone, folder, given.rounds, int(2048 * min(1, given.seconds / 2)))
    known = {"device": "cpu", "precision": alone.precision, "threads": alone.threads, "serve_threads": alone.threads}
    title = f"MiniLM, {alone.precision}, {alone.threads} threads; texts of {alone.mean_tokens:.1f} tokens"
    return title, measures, known


def main() -> None:
    given = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if given.device == "cuda" or given.shape:
        from _raw_forward import forward_measures

        title, measures, known = forward_measures(given.device, given.shape or "0.6b", given.rounds, given.quick)
    else:
        with tempfile.TemporaryDirectory(prefix="tuneproof-bench-") as folder:
            title, measures, known = on_cpu(given, Path(folder))
    show(title, measures)
    write(given.json, measures, **known)


if __name__ == "__main__":
    main()
