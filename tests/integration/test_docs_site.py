"""The documentation as `make docs` builds it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.more

_FETCHED = re.compile(
    r"""(?:src|srcset)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import\s+["']?(?:url\()?["']?https?:"""
)
_LINK = re.compile(r"<link\b[^>]*>")


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = re.search(r"\$\(BIN\)/(sphinx-build .*) docs site$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert command
    words = ["-m", "sphinx", *command[1].split()[1:], str(docs), str(site)]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_and_every_decision_is_built(site: Path) -> None:
    written = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert {file.relative_to(site) for file in site.rglob("*.html")} >= written
    assert "TUNEPROOF_DATA_DIR" in (site / "settings.html").read_text("utf-8")


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for file in (file for kind in ("*.html", "*.css") for file in site.rglob(kind)):
        text = file.read_text("utf-8")
        assert not _FETCHED.search(text), file
        assert not [link for link in _LINK.findall(text) if "//" in link], file


@pytest.mark.parametrize("link", ["[no](such-page.md)", "[no](faq.md#such-heading)", "![no](pictures/such.png)"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("conf.py", "site.css"):
        shutil.copy(ROOT / "docs" / name, docs)
    (docs / "faq.md").write_text("# FAQ\n\n## Known\n")
    (docs / "index.md").write_text("# Start\n\n[yes](faq.md#known)\n\n```{toctree}\nfaq\n```\n")
    assert build(docs, tmp_path / "sound").returncode == 0
    (docs / "index.md").write_text(f"# Start\n\n{link}\n\n```{{toctree}}\nfaq\n```\n")
    assert build(docs, tmp_path / "broken").returncode != 0
