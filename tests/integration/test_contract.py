"""The OpenAPI document that the service generates, held to a golden file and to the contract's names."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

GOLDEN = Path(__file__).parents[1] / "golden" / "openapi.json"
FORM = "name text_column label_column split_column delimiter has_header encoding labelled rare_labels"
# What other programs may rely on: fields may be added, these keep their names.
FIELDS = {
    "DatasetOut": "id name created_at sha256 size_bytes n_rows n_usable_rows text_column label_column split_column "
    "delimiter has_header encoding inferred labels text_length warnings columns",
    "TextLengthOut": "p50_chars p95_chars max_chars",
    "WarningOut": "code message count rows",
    "LabelCountOut": "label count",
    "RowOut": "row_id text label",
    "DatasetUpload": f"file {FORM}",
    "JobUpload": f"file spec {FORM}",
    "JobSpec": "dataset_id kind name base_model seed split baseline train margin metadata model",
    "SplitSpec": "train validation test",
    "BaselineSpec": "methods sample_size prompt_model prompt_template few_shot decoding label_descriptions",
    "TrainSpec": "epochs batch_size learning_rate max_length lora_rank lora_alpha lora_dropout target_modules "
    "precision gradient_checkpointing class_weights early_stopping_patience",
    "JobOut": "id kind name status terminal stage progress attempt created_at started_at finished_at "
    "dataset_id model_id spec error metadata summary artifacts",
    "ProgressOut": "fraction message eta_seconds",
    "ArtifactOut": "name size_bytes sha256 url",
    "EventOut": "id job_id created_at level type message data",
    "FlipOut": "id candidate baseline row_id text label candidate_answer baseline_answer flip",
    "CompareOut": "dataset_sha256 split methods comparison",
    "PairedComparison": "candidate baseline on n n_texts accuracy_delta accuracy_delta_ci95 macro_f1_delta "
    "macro_f1_delta_ci95 n_fixed n_broken mcnemar_p mcnemar_p_texts mcnemar_p_holm minimum_detectable_difference "
    "verdict",
    "ModelOut": "id name version method job_id base_model base_revision labels created_at aliases metrics size_bytes",
    "AliasIn": "model_id force",
    "AliasMovedOut": "alias model_id updated_at gate",
    "GateOut": "checked n candidate_accuracy incumbent_accuracy accuracy_delta accuracy_delta_ci95 mcnemar_p "
    "verdict note",
    "GateSkippedOut": "checked note",
    "PredictIn": "model texts text top_k min_confidence target_precision",
    "PredictOut": "model_id predictions usage threshold",
    "ThresholdOut": "min_confidence validation_precision validation_coverage validation_rows",
    "PredictionOut": "label confidence probabilities abstained truncated",
    "UsageOut": "texts tokens",
    "SessionIn": "key",
    "KeyIn": "name scope expires_days",
    "KeyOut": "id name scope created_at expires_at revoked_at",
    "NewKeyOut": "id name scope created_at expires_at revoked_at key",
    "BaseModelOut": "name max_length generative at_hand",
    "BaseModelsOut": "data has_more auto_prompt_model prompt_endpoints",
    "SessionOut": "scope key keys_exist",
    "SessionKeyOut": "id name",
    "Problem": "type title status detail code errors request_id columns",
}
SUCCESS = {
    "POST /datasets": "201",
    "POST /jobs": "202",
    "POST /jobs/{job_id}/cancel": "202",
    "POST /jobs/{job_id}/retry": "202",
    "DELETE /datasets/{dataset_id}": "204",
    "DELETE /jobs/{job_id}": "204",
    "DELETE /models/{model_id}": "204",
    "DELETE /aliases/{alias}": "204",
    "POST /keys": "201",
    "DELETE /keys/{key_id}": "204",
    "POST /session": "204",
    "DELETE /session": "204",
}


@pytest.fixture(scope="module")
def document(shared: TestClient) -> dict[str, Any]:
    return shared.get("/openapi.json").json()  # type: ignore[no-any-return]


def test_the_document_is_the_golden_one(document: dict[str, Any]) -> None:
    """After a change that was meant: `TUNEPROOF_WRITE_GOLDEN=1 pytest tests/integration/test_contract.py`."""
    written = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("TUNEPROOF_WRITE_GOLDEN"):
        GOLDEN.write_text(written, "utf-8")
    assert json.loads(GOLDEN.read_text("utf-8")) == document


@pytest.mark.parametrize("schema", FIELDS)
def test_what_the_contract_names_is_there(document: dict[str, Any], schema: str) -> None:
    assert set(FIELDS[schema].split()) <= set(document["components"]["schemas"][schema]["properties"])


def test_words_with_a_fixed_meaning_are_the_contracts(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    job = schemas["JobOut"]["properties"]
    assert job["status"]["enum"] == ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    assert job["stage"]["anyOf"][0]["enum"] == ["prepare", "baseline", "train", "evaluate", "publish"]
    assert schemas["JobSpec"]["properties"]["kind"]["enum"] == ["experiment", "train", "baseline", "predict"]
    assert schemas["EventOut"]["properties"]["type"]["enum"] == ["status", "progress", "metric", "message"]
    assert schemas["DatasetUpload"]["properties"]["rare_labels"]["enum"] == ["refuse", "drop"]
    assert schemas["DatasetUpload"]["required"] == ["file"]


def test_every_route_says_how_it_succeeds_and_every_error_is_a_problem(document: dict[str, Any]) -> None:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            responses, name = route["responses"], f"{method.upper()} {path}"
            assert SUCCESS.get(name, "200") in responses, name
            for status in ("4XX", "5XX"):
                assert responses[status]["content"] == problem, name
            others = set(responses) - {"4XX", "5XX", SUCCESS.get(name, "200")}
            assert others == {"/readyz": {"503"}, "/jobs/{job_id}/events": {"204"}}.get(path, set()), name


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    known = document["components"]["schemas"]

    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for part in node for found in references(part)]
        if isinstance(node, dict):
            return [found for key, part in node.items() for found in ([part] if key == "$ref" else references(part))]
        return []

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in known


def test_bodies_that_a_route_reads_itself_are_described(document: dict[str, Any]) -> None:
    for path, method, kinds in (
        ("/datasets", "post", {"multipart/form-data"}),
        ("/jobs", "post", {"application/json", "multipart/form-data"}),
        ("/predict", "post", {"application/json"}),
        ("/aliases/{alias}", "put", {"application/json"}),
        ("/session", "post", {"application/json"}),
        ("/keys", "post", {"application/json"}),
    ):
        body = document["paths"][path][method]["requestBody"]
        assert (set(body["content"]), body["required"]) == (kinds, True)


def test_the_ranges_of_a_spec_are_told(document: dict[str, Any]) -> None:
    train = document["components"]["schemas"]["TrainSpec"]["properties"]
    assert {key: train["lora_rank"][key] for key in ("minimum", "maximum", "default")} == {
        "minimum": 1, "maximum": 256, "default": 16
    }  # fmt: skip
    assert train["epochs"]["default"] == "auto"


def test_the_reference_page_loads_everything_from_this_service(shared: TestClient) -> None:
    page = shared.get("/docs").text
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(files) >= 2
    assert all(shared.get(file).status_code == 200 for file in files)  # from here: a path, not another host
