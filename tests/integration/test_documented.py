"""What the documentation names is there, and what is there is named: settings, codes, metrics, routes, files."""

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from markdown_it import MarkdownIt

from service.api.problems import status_of
from service.core.errors import InvalidData
from service.core.settings import Settings
from tests.documents import ROOT
from tests.problems import every_error

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OF_THE_CLIENT = {"TUNEPROOF_URL", "TUNEPROOF_API_KEY"}


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return page(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def first_cells(table: str) -> set[str]:
    """Names in code type in the first column."""
    return {name for row in re.findall(r"^\|([^|]+)\|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def without_names(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "{}", path)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_setting_that_a_page_names_is_one(file: Path) -> None:
    known = {f"TUNEPROOF_{name.upper()}" for name in Settings.model_fields} | OF_THE_CLIENT
    named = set(re.findall(r"TUNEPROOF_[A-Z][A-Z_]*[A-Z]", file.read_text("utf-8")))
    assert named <= known


def test_every_error_code_is_listed_with_its_status() -> None:
    table = page("api.md").partition("| status | codes |")[2].partition("\n\n")[0]
    listed = {
        (status, code)
        for row in table.splitlines()
        for status in re.findall(r"\b[45]\d\d\b", row)
        for code in re.findall(r"`([a-z_]+)`", row)
    }
    for error in every_error():
        if error.code in ("lease_lost", *JOB_CODES):
            continue
        assert (str(status_of(error)), error.code) in listed, error
    assert {code for code in JOB_CODES if f"`{code}`" not in section("api.md", "Jobs")} == set()


JOB_CODES = ("model_unavailable", "endpoint_unavailable", "budget_spent", "out_of_memory", "round_trip_failed")


def test_every_reason_to_refuse_a_file_is_explained() -> None:
    explained = first_cells(section("your-own-csv.md", "What is refused"))
    family = {error.code for error in InvalidData.__subclasses__()}
    assert explained == family | {"unsupported_media_type", "too_large"}


def test_every_warning_about_a_file_is_explained() -> None:
    code = "".join((ROOT / "service" / "ml" / name).read_text("utf-8") for name in ("dataset.py", "findings.py"))
    given = set(re.findall(r'\bwarn\("([a-z_]+)"', code))
    assert len(given) > 5
    assert first_cells(section("your-own-csv.md", "What you are warned about")) == given


def test_the_faq_names_no_code_that_does_not_exist() -> None:
    known = {error.code for error in every_error()} | {"not_found", "worker_lost"}
    asked = {code for line in re.findall(r"\*\*(.+?)\*\*", page("faq.md")) for code in re.findall(r"`([a-z_]+)`", line)}
    assert len(asked) > 10
    assert {name for name in asked if "_" in name} <= known


def test_every_metric_is_documented(shared: TestClient) -> None:
    """By the code, as some are told only where there is a GPU; what an API tells keeps that honest."""
    sources = [file.read_text("utf-8") for file in (ROOT / "service").rglob("*.py")]
    made = {name for code in sources if "prometheus_client" in code for name in re.findall(r'"(tuneproof_\w+)"', code)}
    documented = first_cells(section("operations.md", "Metrics"))
    assert {name.removesuffix("_total") for name in documented} == made
    told = set(re.findall(r"^# TYPE (\w+)", shared.get("/metrics").text, re.MULTILINE))
    assert len(told) > 3
    assert {name for name in told if not name.endswith("_created")} <= documented
    assert set(re.findall(r"\btuneproof_\w+\b", section("production.md", "Being told"))) <= documented


def test_every_route_is_documented(shared: TestClient) -> None:
    told = {without_names(path) for path in re.findall(r"(/[a-z][a-z./{}_-]*)", page("api.md"))}
    there = {without_names(path) for path in shared.get("/openapi.json").json()["paths"]}
    assert there - told == set()


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    inline = [
        token
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(PAGES[0].read_text("utf-8"))
        if token.children
    ]
    links = [
        str(child.attrs.get("href") or child.attrs.get("src"))
        for token in inline
        for child in token.children or ()
        if child.type in ("link_open", "image")
    ]
    assert len(links) > 15
    here = [link.partition("#") for link in links if "://" not in link]
    assert [path for path, _, _ in here if not (ROOT / path).exists()] == []
    for path, _, anchor in here:
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{path}#{anchor}"
