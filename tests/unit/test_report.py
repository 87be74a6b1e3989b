import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from worker.compare import MethodAnswers, compare_all, unproven
from worker.metrics import score
from worker.predictions import Predictions
from worker.report import MATRIX_LIMIT, most_confused, render
from worker.verdict import judge

HOSTILE = '<script>alert("1")</script>" onmouseover="alert(2) {{ 7 * 7 }}{% raw %}'
VOID = {"meta", "link", "rect", "br"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text; complains about tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.pieces = [], [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            self.pieces.append(data)

    @property
    def words(self):
        """The text with a space between cells."""
        return " ".join(" ".join(self.pieces).split())

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def job(accuracies, labels=("refund", "other", "fee"), n=120):
    """What a job with these methods would hand to the report; prompts are run on the first half only."""
    K, rng = len(labels), np.random.default_rng(0)
    true_ids, half = np.arange(n) % K, np.arange(n // 2)
    answers, methods = {}, {}
    for method, accuracy in accuracies.items():
        prompted = method.endswith("_prompt")
        ids = np.where(rng.random(n) < accuracy, true_ids, (true_ids + 1) % K)
        if method == "majority":
            ids = np.zeros(n, dtype=np.int64)
        outcomes = ("valid",) * n if prompted else None
        predictions = Predictions(ids, None, outcomes, outcomes, 0.002)
        methods[method] = {"baseline_subset": score(predictions.take(half), true_ids[half], labels)}
        if not prompted:
            methods[method] |= {"test": score(predictions, true_ids, labels)}
        answers[method] = MethodAnswers(true_ids, true_ids[half], None if prompted else ids, ids[half])
    comparisons = compare_all(answers, K, 0)
    headline, recommendation = judge(answers, comparisons, 0.02, K, 0, 0.1)
    metrics = {
        "schema_version": 1,
        "job_id": "job_1",
        "dataset": {"id": "ds_1", "sha256": "ab" * 32, "n_rows": 10 * n},
        "labels": list(labels),
        "split": {"seed": 7, "algorithm": "grouped-1", "n_train": 960, "n_validation": n, "n_test": n, "n_dropped": 0},
        "baseline_subset": {"n": n // 2, "drawn_from": "test", "seed": 7},
        "methods": methods,
        "comparison": [asdict(c) for c in comparisons],
        "training": {
            "epochs_run": 3,
            "best_epoch": 2,
            "best_validation_macro_f1": 0.9,
            "trainable_parameters": 7,
            "total_parameters": 1000,
            "train_seconds": 61.7,
            "tokens_per_second": 3120.4,
            "peak_memory_bytes": 2**30,
            "precision": "bf16",
            "gradient_checkpointing": False,
            "truncated_texts": 4,
        },
        "learning_curve": [],
        "overtakes": None,
        "environment": {"python": "3.11.7", "libraries": {"torch": "2.13.0", "peft": "0.21.0"}},
    }
    summary = {
        "headline": headline,
        "recommendation": asdict(recommendation),
        "methods": {},
    }
    notes = {
        "job_name": "tickets",
        "dataset_name": "tickets.csv",
        "warnings": [{"code": "duplicate_text", "message": "12 rows repeat a text.", "count": 12, "rows": [3, 17]}],
        "messages": ["The prompt model is Qwen/Qwen3-0.6B."],
        "spec": {"kind": "experiment", "seed": 7},
        "unproven": unproven(answers, comparisons),
    }
    return metrics, summary, notes


USUAL = {"majority": 0, "tfidf_logreg": 0.7, "zero_shot_prompt": 0.5, "lora": 0.97}


def test_the_verdict_comes_before_every_table_and_all_parts_follow():
    metrics, summary, notes = job(USUAL)
    html = render(metrics, summary, notes)
    parts = [
        summary["headline"],
        summary["recommendation"]["reason"],
        "The ladder of methods",
        "Pair by pair",
        "What LoRA fine-tuning mixes up",
        "Confusion matrix",
        "Label by label",
        "The training",
        "12 rows repeat a text.",
        "How to reproduce",
        "ab" * 32,
        "grouped-1, seed 7",
        "torch 2.13.0, peft 0.21.0",
    ]
    places = [Page(html).text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_what_is_to_be_typed_stands_as_code_and_no_backtick_is_shown():
    metrics, summary, notes = job(USUAL)
    summary["recommendation"]["reason"] = "Too few: set `baseline.sample_size` to 190 <b>."
    html = render(metrics, summary, notes | {"messages": ["Fetch one with `tuneproof models pull x`."]})
    assert "<p>Too few: set <code>baseline.sample_size</code> to 190 &lt;b&gt;.</p>" in html
    assert "<li>Fetch one with <code>tuneproof models pull x</code>.</li>" in html


def test_labels_names_and_messages_cannot_become_markup():
    metrics, summary, notes = job(USUAL, labels=(HOSTILE, "other", "fee"))
    notes |= {"job_name": HOSTILE, "dataset_name": HOSTILE, "messages": [HOSTILE], "spec": {"name": HOSTILE}}
    notes["warnings"][0]["message"] = HOSTILE
    page = Page(render(metrics, summary, notes))
    assert page.all("script") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) > 6


def test_the_page_asks_the_network_for_nothing():
    html = render(*job(USUAL))
    page = Page(html)
    addresses = [attributes.get(name) for _, attributes in page.tags for name in ("src", "href", "data", "action")]
    # An empty icon keeps browsers from asking for /favicon.ico.
    assert [address for address in addresses if address] == ["data:,"]
    assert re.findall(r"@import|https?:|url\((?!#)", html) == []


def test_every_table_has_a_caption_and_every_header_a_scope():
    html = render(*job(USUAL))
    page = Page(html)
    assert len(page.all("table")) == len(page.all("caption")) == 6
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row"}
    assert html.count("<h1") == 1


def test_the_matrix_shows_every_count_and_frames_the_right_answers():
    metrics, summary, notes = job(USUAL)
    page = Page(render(metrics, summary, notes))
    assert len([cell for cell in page.all("td") if cell.get("class", "").startswith("hit")]) == 3
    assert page.text.count("(no answer)") == 1


def test_a_matrix_too_large_to_read_is_left_out():
    labels = [f"label {i}" for i in range(MATRIX_LIMIT + 1)]
    html = render(*job({"tfidf_logreg": 0.9}, labels, n=402))
    assert "Too many labels (201) to show here" in html
    assert len(html) < 200_000


def test_the_most_confused_pairs_stand_in_order_and_hold_the_rows_without_an_answer():
    matrix = [[5, 3, 0, 2], [0, 9, 1, 0], [0, 0, 0, 0]]
    assert most_confused(matrix, ["a", "b", "c"]) == [
        ("a", "b", 3, 0.3),
        ("a", "(no answer)", 2, 0.2),
        ("b", "c", 1, 0.1),
    ]
    assert most_confused([[3, 0, 0], [0, 2, 0]], ["a", "b"]) == []


def test_a_perfect_method_is_said_to_mix_up_nothing():
    assert "every one of the 120 test rows is right" in Page(render(*job({"tfidf_logreg": 1.0}))).text


def test_a_prompt_is_not_beaten_by_what_does_not_beat_the_most_common_label_and_the_page_says_so():
    text = Page(render(*job({"majority": 0, "zero_shot_prompt": 0.0, "lora": 0.36}))).text
    assert "not clear: lora is not shown to beat the most common label" in " ".join(text.split())


@pytest.mark.parametrize("accuracies", [{"zero_shot_similarity": 0.9, "lora": 0.5}, {"zero_shot_similarity": 0.9}])
def test_a_similarity_is_never_called_prompting(accuracies):
    metrics, summary, notes = job(accuracies)
    assert "prompt" not in render(metrics, summary, notes | {"messages": []}).lower()


def test_a_job_without_training_and_without_comparisons_has_a_report_too():
    metrics, summary, notes = job({"zero_shot_prompt": 0.8})
    del metrics["training"]
    text = Page(render(metrics, summary, notes | {"warnings": [], "messages": []})).text
    assert "60 baseline subset rows" in " ".join(text.split())
    for absent in ("The training", "Pair by pair", "Notes on the data"):
        assert absent not in text


def test_figures_that_are_null_are_shown_as_a_dash():
    metrics, summary, notes = job(USUAL)
    metrics["methods"]["tfidf_logreg"]["test"] |= {"accuracy": None, "macro_f1": None}
    metrics["dataset"] |= {"n_rows": None, "sha256": "unknown"}
    assert "None" not in Page(render(metrics, summary, notes)).text


def flip(row_id, *, fixed, candidate="lora", baseline="zero_shot_prompt", text="where is my card"):
    answers = ("refund", "fee") if fixed else ("fee", "refund")
    kind = "fixed" if fixed else "broken"
    sides = dict(zip(("candidate_answer", "baseline_answer"), answers, strict=True))
    return {"candidate": candidate, "baseline": baseline, "row_id": str(row_id), "text": text, "label": "refund",
            "flip": kind} | sides  # fmt: skip


def test_every_method_stands_in_the_ladder_with_wilsons_interval():
    metrics, summary, notes = job(USUAL)
    html = render(metrics, summary, notes)
    described = re.search(r'<desc id="ladder-description">(.*?)</desc>', html)[1]
    for method, parts in metrics["methods"].items():
        figures = parts.get("test", parts["baseline_subset"])
        low, high = proportion_confint(round(figures["accuracy"] * figures["n"]), figures["n"], method="wilson")
        assert f"{figures['accuracy']:.1%} ({low:.1%} to {high:.1%})" in described
        assert f"{100 * low:.1f}\xa0% to {100 * high:.1f}\xa0%" in Page(html).text, method


def test_labels_stand_by_how_much_they_changed_from_the_prompt():
    metrics, summary, notes = job(USUAL)
    own, before = (metrics["methods"][m]["baseline_subset"]["per_label"] for m in ("lora", "zero_shot_prompt"))
    change = {label: own[label]["f1"] - before[label]["f1"] for label in own}
    text = Page(render(metrics, summary, notes)).text
    shown = re.findall(r"[+-]\d+\.\d", text[text.index("F1 before") : text.index("The training")])
    assert shown == [f"{100 * d:+.1f}" for d in sorted(change.values(), key=abs, reverse=True)]


def test_flips_are_told_from_the_side_of_the_dearer_method_whichever_is_recommended():
    metrics, summary, notes = job(USUAL)
    assert summary["recommendation"]["method"] == "lora"
    flips = [flip(3, fixed=True, text=HOSTILE), flip(8, fixed=False), flip(9, fixed=True, baseline="majority")]
    page = Page(render(metrics, summary, notes, flips))
    words = page.words[page.words.index("Rows that changed sides") :]
    assert f"3 {HOSTILE} refund fee refund fixed" in words
    assert "8 where is my card refund refund fee broken" in words
    assert " 9 where is my card" not in words
    summary["recommendation"]["method"] = "zero_shot_prompt"
    words = Page(render(metrics, summary, notes, flips)).words
    assert "8 where is my card refund refund fee broken" in words
    assert "LoRA fine-tuning against zero-shot prompting" in words
    own = metrics["methods"]["zero_shot_prompt"]["baseline_subset"]["per_label"]["fee"]
    assert "What changed most first, from LoRA fine-tuning to zero-shot prompting" in words
    assert re.search(rf"fee \S+ % \S+ % \S+ {100 * own['precision']:.1f} % {100 * own['recall']:.1f} % ", words)


def test_learning_curve_and_reliability_are_drawn_and_told_where_there_are_figures():
    metrics, summary, notes = job(USUAL)
    bins = [{"low": i / 10, "high": (i + 1) / 10, "n": i, "mean_confidence": i / 10 + 0.05, "accuracy": i / 10}
            for i in range(10)]  # fmt: skip
    metrics["methods"]["lora"]["test"] |= {
        "calibration": {"bins": bins},
        "coverage": [{"threshold": 0.5, "coverage": 0.8, "accuracy": 0.99}],
        "expected_calibration_error": 0.05,
        "temperature": 1.2,
    }
    points = [(0.1, 96, 0.41), (1.0, 960, 0.97)]
    metrics["learning_curve"] = [
        {"share": s, "n_train": n, "methods": {"lora": {"accuracy": a, "macro_f1": a}}} for s, n, a in points
    ]
    metrics["overtakes"] = {"method": "lora", "n_train": 960, "prompt": "zero_shot_prompt", "prompt_accuracy": 0.55,
                            "n": 60, "caveat": "A point estimate."}  # fmt: skip
    html = render(metrics, summary, notes)
    assert "LoRA fine-tuning: 41.0% at 96 rows, 97.0% at 960 rows" in html
    assert "passes zero-shot prompting (55.0% of 60 rows) with 960 train rows. A point estimate." in html
    assert "80% right at 85%" in html
    assert "99.0% right of 80%" in html
    assert "LoRA fine-tuning 0.050." in " ".join(Page(html).text.split())
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_what_a_remote_prompt_cost_stands_in_the_ladder():
    metrics, summary, notes = job(USUAL)
    asked = metrics["methods"]["zero_shot_prompt"]["baseline_subset"]
    asked |= {"prompt_tokens": 30_000, "completion_tokens": 300, "cost": 0.06}
    words = Page(render(metrics, summary, notes)).words
    assert "Cost per 1,000" in words
    assert " 505000 1 " in words.replace(",", "")
    del asked["prompt_tokens"]
    assert "Cost per 1,000" not in Page(render(metrics, summary, notes)).text
