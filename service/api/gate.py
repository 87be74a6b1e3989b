"""Whether a candidate is shown to be worse than the incumbent, on rows that neither was trained or chosen on.

The rows are the candidate's test rows, without every text that stood in train or validation of either model's job.
Shown is what a report would call a win, by the same tests; but an incumbent that is not shown to beat the constant
answer loses its win only where the candidate is shown to have the better macro-F1.
"""

import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from starlette.concurrency import run_in_threadpool

from service.api.context import Context
from service.api.evidence import records
from service.api.jobs import artifact_of
from service.api.predict import scored, served_model
from service.api.schemas import GateOut, GateSkippedOut
from service.core.errors import BaseNotServed, Conflict, ModelDamaged, NotFound
from service.db import jobs
from service.db.models import Dataset, Model
from service.ml.columns import shown
from service.ml.dataset import TableFormat, read_rows
from service.ml.evidence import SIGNIFICANCE, beats, compare, holm, same_texts, withhold
from service.ml.findings import LISTED_LABELS, fold
from service.ml.split import ALGORITHM, stratified_subset
from service.storage import StoredText

LEAST_TEXTS = 20
MOST_ASKED = 2_000
TEXTS_A_CALL = 64
"""Few, so that a large base on a CPU answers in time and other callers' texts come in between."""


Gone = Callable[[], Awaitable[bool]]
"""Whether the caller has left: the engine's time is then somebody else's."""


class _CannotTell(Exception):
    """Why the two cannot be compared, and what to do."""


class Tested(NamedTuple):
    """A test row: its id in the upload, its text, its true label, and the model's answer, empty for none."""

    row_id: str
    text: str
    label: str
    answer: str


@dataclass(frozen=True)
class Origin:
    """What a model's job worked on.

    Args:
        job_id: The job's.
        dataset_id: Of the upload, which may be gone.
        files: sha256 of the dataset's bytes and of split.csv.
        algorithm: How the rows were dealt out.
        seed: Of that.
        tested: The test rows with the model's answers; None once they are deleted.
    """

    job_id: str
    dataset_id: str
    files: tuple[str, str]
    algorithm: str
    seed: int
    tested: list[Tested] | None


@dataclass(frozen=True)
class FairRows:
    """Test rows of the candidate that are new to both models.

    Args:
        rows: With the candidate's answers.
        incumbent_answers: To the same rows; None where it has yet to be asked.
        seed: Of the candidate's split.
        notes: Sentences on what was left out.
    """

    rows: list[Tested]
    incumbent_answers: list[str] | None
    seed: int
    notes: list[str]


async def check(ctx: Context, candidate: Model, incumbent: Model, gone: Gone) -> GateOut | GateSkippedOut:
    """Compares the two.

    Raises:
        Conflict: the caller is gone.
        AppError: what the engine raises while it cannot answer yet; waiting helps with all of that.
    """
    try:
        fair = await run_in_threadpool(_fair_rows, ctx, candidate, incumbent)
        if fair.incumbent_answers is None:
            fair = replace(fair, incumbent_answers=await _asked(ctx, incumbent, fair, gone))
    except _CannotTell as reason:
        return GateSkippedOut(note=f"Not checked: {reason}")
    return await run_in_threadpool(_judged, fair)


def refusal(found: GateOut, alias: str, candidate_id: str, incumbent_id: str) -> str:
    low, high = (f"{100 * bound:+.1f}" for bound in found.accuracy_delta_ci95)
    return (
        f"{candidate_id} is shown to be worse than {incumbent_id}, which {alias!r} points to: on {found.n:,} rows that "
        f"neither was trained on it is right on {found.candidate_accuracy:.1%}, the other on "
        f"{found.incumbent_accuracy:.1%}; {100 * found.accuracy_delta:+.1f} points, 95 % interval {low} to {high}, "
        f'McNemar p = {found.mcnemar_p:.2g}. The alias stays. Send "force": true to point it there all the same.'
    )


def _fair_rows(ctx: Context, candidate: Model, incumbent: Model) -> FairRows:
    ours, theirs = _origin(ctx, candidate), _origin(ctx, incumbent)
    if ours is None or ours.tested is None:
        raise _CannotTell(
            f"the test rows of {candidate.id} went with its job or its dataset. Upload the file and train it again to "
            "have it checked."
        )
    if theirs is None:
        raise _gone(incumbent.id)
    common = {*candidate.labels} & {*incumbent.labels}
    known = [row for row in ours.tested if row.label in common]
    answers = _answers_to_the_same_rows(ours, theirs)
    # Our own split puts equal texts into one part, and is the same only for the same texts; a file's own may not be.
    told_by_split = ours.algorithm == ALGORITHM
    learned_by = {} if told_by_split else {candidate.id: ours}
    if answers is None and not (told_by_split and ours.files == theirs.files):
        learned_by[incumbent.id] = theirs
    texts = {fold(row.text) for row in known}
    learned = {text for name, job in learned_by.items() for text in _learned(ctx, name, job, texts)}
    fair = [row for row in known if fold(row.text) not in learned]
    notes = [*_differences(candidate, incumbent), *_notes(len(ours.tested) - len(known), len(known) - len(fair))]
    if answers is None:
        fair, told = _askable(fair, ctx.settings.predict_max_chars, ours.seed)
        notes += told
    n_texts = len({fold(row.text) for row in fair})
    if n_texts < LEAST_TEXTS:
        todo = "Train both on one file with the same split and seed to have them checked."
        if len({fold(row.text) for row in ours.tested}) < LEAST_TEXTS:
            todo = f"{candidate.id} was tested on fewer itself: train it on more rows, or with a larger `split.test`."
        raise _CannotTell(" ".join([
            f"only {n_texts} distinct texts are left that neither model was trained on, and at least {LEAST_TEXTS} are "
            f"needed. {todo}", *notes,
        ]))  # fmt: skip
    given = None if answers is None else [answers[row.row_id] for row in fair]
    return FairRows(fair, given, ours.seed, notes)


def _origin(ctx: Context, model: Model) -> Origin | None:
    """None where the model's job or its files are gone."""
    try:
        metrics_file, split_file = (artifact_of(ctx, model.job_id, name) for name in ("metrics.json", "split.csv"))
        metrics: dict[str, Any] = json.loads(b"".join(ctx.storage.chunks(metrics_file.storage_key)))
        with ctx.db.read() as session:
            dataset_id = jobs.get(session, model.job_id).dataset_id
    except (NotFound, FileNotFoundError):
        return None
    split, files = metrics["split"], (metrics["dataset"]["sha256"], split_file.sha256)
    tested = _tested(ctx, model)
    return Origin(model.job_id, dataset_id, files, split["algorithm"], split["seed"], tested)


def _tested(ctx: Context, model: Model) -> list[Tested] | None:
    try:
        with contextlib.closing(records(ctx, artifact_of(ctx, model.job_id, "predictions.csv"))) as lines:
            return [
                Tested(line["row_id"], line["text"], line["label"], line[model.method])
                for line in lines
                if line["split"] == "test"
            ]
    except NotFound:
        return None


def _answers_to_the_same_rows(ours: Origin, theirs: Origin) -> dict[str, str] | None:
    """The incumbent's answers by row id, where its own job scored the very rows the candidate's did."""
    if ours.files != theirs.files or ours.tested is None or theirs.tested is None:
        return None
    if [row[:2] for row in ours.tested] != [row[:2] for row in theirs.tested]:
        return None  # another text column of the same file
    return {row.row_id: row.answer for row in theirs.tested}


def _learned(ctx: Context, model_id: str, job: Origin, texts: set[str]) -> set[str]:
    """Those of the folded `texts` that stand in train or validation of a model's job. Raises _CannotTell."""
    with ctx.db.read() as session:
        dataset = session.get(Dataset, job.dataset_id)
    if dataset is None:
        raise _gone(model_id)
    try:
        with contextlib.closing(records(ctx, artifact_of(ctx, job.job_id, "split.csv"))) as lines:
            ids = (int(line["row_id"]) for line in lines if line["split"] in ("train", "validation"))
            row_ids = np.fromiter(ids, np.int64)
        used = np.zeros(row_ids.max() + 1, dtype=bool)
        used[row_ids] = True
        rows = read_rows(StoredText(ctx.storage, dataset.storage_key), TableFormat(**dataset.profile["format"]))
        return {key for row in rows if row.row_id < len(used) and used[row.row_id] and (key := fold(row.text)) in texts}
    except (NotFound, FileNotFoundError):
        raise _gone(model_id) from None


def _gone(model_id: str) -> _CannotTell:
    return _CannotTell(
        f"what {model_id} was trained on can no longer be told, its job or its dataset was deleted, so no row is sure "
        "to be new to it. Train it again on the same file to have the two compared."
    )


def _askable(rows: list[Tested], max_chars: int, seed: int) -> tuple[list[Tested], list[str]]:
    """The rows to ask a model about: none that `/predict` would refuse, and not too many."""
    short = [row for row in rows if len(row.text) <= max_chars]
    notes = [f"{len(rows) - len(short):,} texts longer than /predict takes were left out."] if short != rows else []
    if len(short) <= MOST_ASKED:
        return short, notes
    label_ids = np.unique([row.label for row in short], return_inverse=True)[1]
    drawn = stratified_subset([row.text for row in short], label_ids, MOST_ASKED, seed)
    return [short[i] for i in drawn], [*notes, f"{MOST_ASKED:,} of {len(short):,} rows were drawn by seed {seed}."]


async def _asked(ctx: Context, model: Model, fair: FairRows, gone: Gone) -> list[str]:
    """The model's answers as `/predict` gives them. Raises _CannotTell where it will never answer here."""
    served, answers, texts = served_model(model), list[str](), [row.text for row in fair.rows]
    try:
        for start in range(0, len(texts), TEXTS_A_CALL):
            if await gone():
                raise Conflict("The caller left before the two were compared.")
            scores = await scored(ctx, served, model.labels, texts[start : start + TEXTS_A_CALL])
            answers += [model.labels[i] for i in np.argmax(np.asarray(scores.probabilities), axis=1)]
    except (BaseNotServed, ModelDamaged) as error:
        raise _CannotTell(f"{model.id} cannot be asked. {error.detail}") from None
    return answers


def _judged(fair: FairRows) -> GateOut:
    assert fair.incumbent_answers is not None  # it has been asked by now
    texts, truth, candidate = ([getattr(row, name) for row in fair.rows] for name in ("text", "label", "answer"))
    names = sorted({*truth, *candidate, *fair.incumbent_answers} - {""})
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    true_ids, ids, other_ids = (
        np.array([number[name] for name in side]) for side in (truth, candidate, fair.incumbent_answers)
    )
    text_ids = same_texts(texts)
    raw = compare(
        "candidate", "incumbent", "test", true_ids, ids, other_ids, len(names), fair.seed, text_ids=text_ids
    )  # fmt: skip
    sides = {"candidate": ids, "incumbent": other_ids}
    unproven = {name for name, given in sides.items() if not beats(true_ids, given, None, text_ids)}
    # Where one label is nearly all, a good incumbent may not be shown to beat the constant answer either: it gives way
    # to none but a candidate that is shown to tell the labels apart better.
    if raw.macro_f1_delta_ci95[0] <= 0:
        unproven.discard("incumbent")
    [pair] = withhold(holm([raw]), unproven)
    notes = list(fair.notes)
    if raw.winner in unproven:
        more = ", and the candidate is shown to have the better macro-F1" if raw.winner == "incumbent" else ""
        notes.append(f"No win for the {raw.winner}: it is not shown to beat always giving the most common label{more}.")
    elif raw.winner is None and pair.mcnemar_p < SIGNIFICANCE:
        notes.append("Repeated texts make the p small; with each counted once, nothing is shown.")
    return GateOut(
        n=pair.n, candidate_accuracy=np.mean(true_ids == ids), incumbent_accuracy=np.mean(true_ids == other_ids),
        accuracy_delta=pair.accuracy_delta, accuracy_delta_ci95=pair.accuracy_delta_ci95, mcnemar_p=pair.mcnemar_p,
        verdict="incumbent_wins" if pair.verdict == "baseline_wins" else pair.verdict, note=" ".join(notes) or None,
    )  # fmt: skip


def _differences(candidate: Model, incumbent: Model) -> list[str]:
    """That programs which call the alias meet other labels than before."""
    pairs = (("new", candidate, incumbent), ("gone", incumbent, candidate))
    found = [(which, [label for label in one.labels if label not in other.labels]) for which, one, other in pairs]
    listed = [
        f"{len(labels)} {which} ({', '.join(map(shown, labels[:LISTED_LABELS]))}"
        f"{', …' if len(labels) > LISTED_LABELS else ''})"
        for which, labels in found
        if labels
    ]
    return [f"The labels differ: {', '.join(listed)}. Only rows of the others are compared."] if listed else []


def _notes(n_unknown: int, n_learned: int) -> list[str]:
    found = {
        "whose label one of the two does not know": n_unknown,
        "whose text one of the two was trained or chosen on": n_learned,
    }
    return [f"{n:,} test rows {which} were left out." for which, n in found.items() if n]
