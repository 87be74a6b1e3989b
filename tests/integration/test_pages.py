"""The web pages as files: what a browser does with them is in tests/browser."""

import re
from pathlib import Path

import pytest

import service.web
from worker.compare import PLAIN_NAMES

STATIC = Path(service.web.__file__).parent / "static"
OURS = sorted(
    path for path in STATIC.rglob("*") if path.suffix in {".js", ".css", ".html"} and path.parent.name != "vendor"
)


def test_the_root_leads_to_the_pages_and_they_need_no_key(start):
    client = start()
    assert client.get("/").headers["location"] == "ui/"
    client.app.state.context._keys_exist = True
    page = client.get("/ui/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("path", ["/ui/", "/ui/app.js", "/ui/vendor/preact.js"])
def test_only_our_own_scripts_may_run_and_nobody_may_frame_a_page(shared, path):
    policy = shared.get(path).headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"


def test_a_page_that_is_not_there_is_a_problem_like_any_other(shared):
    answer = shared.get("/ui/nothing-here")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize("path", ["/ui/../pages.py", "/ui/%2e%2e/pages.py", "/ui/..%2fpages.py", "/ui//etc/passwd"])
def test_nothing_outside_the_folder_is_served(shared, path):
    assert shared.get(path).status_code == 404


@pytest.mark.parametrize("file", OURS, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(file):
    source = file.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|from|import|url)\s*[=(]?\s*["'(]?\s*(?:https?:)?//[a-z]""", source)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)


@pytest.mark.parametrize(
    "file", [f for f in OURS if f.suffix == ".js"], ids=lambda path: path.relative_to(STATIC).as_posix()
)
def test_every_import_names_a_file_that_is_there(file):
    named = re.findall(r"""(?:from|import)\s*\(?\s*["'](\.[^"'`]+)["']""", file.read_text(encoding="utf-8"))
    assert all((file.parent / name).is_file() for name in named)


def test_methods_have_the_workers_names_and_order():
    listed = re.search(r"METHODS = \{(.*?)\n\};", (STATIC / "figures.js").read_text(encoding="utf-8"), re.DOTALL)
    named = re.findall(r'(\w+): "(.+)",', listed[1])
    assert [(slug, name.lower()) for slug, name in named] == [(s, name.lower()) for s, name in PLAIN_NAMES.items()]
