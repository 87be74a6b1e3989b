"""What a finished job's pages show, and what one can do with its models and with keys: in a browser, on the real API.

The engine is scripted: what it answers is tested elsewhere.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Route, expect
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint

from service.core.errors import BaseLoading
from service.core.spec import JobSpec
from service.db import catalog, jobs
from service.db.jobs import NewArtifact
from service.inference.handle import Scores
from service.inference.wire import ServedModel
from tests.browser.finished_jobs import Finished, leave
from tests.integration.conftest import QuietEngine, listening, make_app
from tests.rows import GRACE, START, claim

pytestmark = pytest.mark.more

HOSTILE = '<img src=x onerror="window.harmed = 1">'
RTL = "إرجاع البضاعة"
LONG = "Donaudampfschifffahrtsgesellschaft" * 4
LABELS = ("refund", "fee", HOSTILE, RTL, LONG)
METHODS = {"majority": 0.2, "tfidf_logreg": 0.7, "embedding_logreg": 0.75, "zero_shot_prompt": 0.5, "lora": 0.9}
TEXTS = [f"text {i} {(HOSTILE, RTL, LONG, 'it’s')[i % 4]}" for i in range(600)]
MANY = tuple(f"label {i:03d}" for i in range(90))


class ScriptedEngine(QuietEngine):
    """`refund` at 0.8 for every text; `loading` answers that the base is being loaded come first."""

    loading = 0
    labels: tuple[str, ...] = ()

    async def predict(self, model: ServedModel, texts: list[str]) -> Scores:
        if self.loading:
            self.loading -= 1
            raise BaseLoading("Base model 'minilm' is being loaded. Ask again in a moment.")
        rest = 0.2 / (len(LABELS) - 1)
        row = [0.8 if label == "refund" else rest for label in self.labels]
        return Scores(tuple(self.labels), [row] * len(texts), ["cut" in text for text in texts], 7)


@dataclass
class Site:
    """A service with finished jobs, and where it listens."""

    url: str
    context: Any
    engine: ScriptedEngine
    jobs: dict[str, Finished] = field(default_factory=dict)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    app = make_app(folder / "data")
    engine = app.state.context.engine = ScriptedEngine()
    with listening(app) as url:
        made = Site(url, app.state.context, engine)
        left = {
            "whole": {"accuracies": METHODS, "learning_curve": True},
            "train": {"accuracies": {"lora": 0.9}, "kind": "train"},
            "baseline": {"accuracies": {"majority": 0.2, "tfidf_logreg": 0.6}, "kind": "baseline"},
            "worse": {"accuracies": METHODS | {"lora": 0.4}, "name": "worse"},
        }
        for name, given in left.items():
            made.jobs[name] = leave(made.context, url, folder, labels=LABELS, texts=TEXTS, **given)  # type: ignore[arg-type]
        engine.labels = tuple(made.jobs["whole"].labels)
        many = [f"text {i}" for i in range(1800)]
        made.jobs["many"] = leave(made.context, url, folder, {"majority": 0.0, "lora": 0.6}, MANY, many, name="many")
        yield made


@pytest.fixture
def tab(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page whose complaints must be none but those said to be expected."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    expected: list[str] = []

    def complain(said: ConsoleMessage) -> None:
        busy = "429" in said.text and "/preflight?" in said.location["url"]  # another page's is under way
        # Chromium's advice on forms with a password comes as "verbose".
        if said.type in ("error", "warning") and not busy:
            complaints.append(said.text)

    def opened(expect_complaint: str = "", **given: Any) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | given))
        page = contexts[-1].new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        if expect_complaint:
            expected.append(expect_complaint)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in complaints if not any(known in text for known in expected)] == []


def show(page: Page, site: Site, name: str) -> Locator:
    """A job's result, by itself."""
    page.goto(f"{site.url}/ui/#/nowhere")
    page.get_by_role("heading", name="No such page").wait_for()
    page.evaluate(
        """async (id) => {
            const [{ render }, { html }, { get }, { default: Result }] = await Promise.all(
                ["/ui/vendor/preact.js", "/ui/ui.js", "/ui/api.js", "/ui/views/result.js"].map((file) => import(file)));
            const main = document.querySelector("main");
            main.textContent = "";
            render(html`<${Result} job=${await get("/jobs/" + id)} />`, main);
        }""",
        site.jobs[name].id,
    )
    page.get_by_role("heading", name="Everything it left").wait_for()
    page.get_by_role("heading", name="How it was made").wait_for()
    return page.locator("main")


def headings(page: Page) -> list[str]:
    return page.get_by_role("heading", level=2).all_inner_texts()


# Results ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_the_verdict_stands_first_and_nothing_leaves_the_window(
    site: Site, tab: Callable[..., Page], width: int, scheme: str
) -> None:
    page = tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    main = show(page, site, "whole")
    job = httpx.get(f"{site.url}/jobs/{site.jobs['whole'].id}").json()
    expect(page.get_by_role("heading", level=2).first).to_have_text(job["summary"]["headline"])
    expect(main.get_by_text(job["summary"]["recommendation"]["reason"])).to_be_visible()
    for part in (
        "The ladder of methods", "Pair by pair", "Rows that changed sides", "Where it errs", "How many labels it takes",
        "How far to trust a confidence", "What an answer costs", "Call it",
    ):  # fmt: skip
        assert any(part in heading for heading in headings(page)), part
    main.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for picture in ("Accuracy of every", "Accuracy over the", "Share right over the share", "Share right over conf"):
        drawn = main.get_by_role("img", name=re.compile(picture))
        assert drawn.bounding_box()["width"] > 200  # type: ignore[index]
        assert drawn.locator("text").first.evaluate("node => getComputedStyle(node).fontSize") == "12px"
    assert page.evaluate("window.harmed") is None
    assert main.locator("img").count() == 0


def test_the_intervals_are_wilsons(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    page.goto(f"{site.url}/ui/#/nowhere")
    cases = [(0, 7), (7, 7), (1, 2), (290, 300), (17, 1350)]
    found = page.evaluate(
        "async (cases) => (({ wilson }) => cases.map((of) => wilson(...of)))(await import('/ui/figures.js'))", cases
    )
    for (right, n), interval in zip(cases, found, strict=True):
        assert interval == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)


def test_the_matrix_says_its_cells_to_mouse_and_keyboard_alike(site: Site, tab: Callable[..., Page]) -> None:
    page, job = tab(), site.jobs["whole"]
    main = show(page, site, "whole")
    main.get_by_role("combobox", name="Method", exact=True).first.select_option("lora")
    main.get_by_label("Sort the matrix by").select_option("name")
    stock = confusion_matrix(job.true_ids, job.answers["lora"], labels=range(len(LABELS)))
    grid = page.get_by_role("grid")
    shown = grid.locator("tbody th").all_inner_texts()
    assert shown == page.evaluate("labels => labels.sort((a, b) => a.localeCompare(b))", list(LABELS))
    order = [job.labels.index(label) for label in shown]
    rows = [row.locator("td").all_inner_texts() for row in grid.locator("tbody tr").all()]
    cells = [[0 if text == "·" else int(text) for text in row] for row in rows]
    assert [row[:-1] for row in cells] == stock[np.ix_(order, order)].tolist()
    refund, fee = shown.index("refund"), shown.index("fee")
    cell = grid.locator("tbody tr").nth(refund).locator("td").nth(fee)
    n, total = cells[refund][fee], sum(cells[refund])
    cell.hover()
    expect(main.locator(".said")).to_contain_text(f"{n} of {total} rows of refund were called fee")
    assert grid.locator("thead th.at").inner_text() == "fee"
    cell.focus()
    page.keyboard.press("ArrowRight" if fee + 1 < len(shown) else "ArrowLeft")
    page.keyboard.press("Home")
    said = re.compile(rf"{cells[refund][0]} of {total} rows of refund")
    expect(grid.locator("td:focus")).to_have_attribute("aria-label", said)
    assert grid.locator("td[tabindex='0']").count() == 1
    page.keyboard.press("End")
    expect(grid.locator("td:focus")).to_have_attribute("aria-label", re.compile("got no answer"))
    page.keyboard.press("ArrowUp")
    assert len(grid.locator("td[aria-label]").all()) == 1


def test_of_many_labels_the_most_confused_are_shown_and_the_others_stand_in_one_column(
    site: Site, tab: Callable[..., Page]
) -> None:
    page, job = tab(), site.jobs["many"]
    main = show(page, site, "many")
    main.get_by_role("combobox", name="Method", exact=True).first.select_option("lora")
    main.get_by_label("Sort the matrix by").select_option("errors")
    grid = page.get_by_role("grid")
    stock = confusion_matrix(job.true_ids, job.answers["lora"], labels=range(len(MANY)))
    errors = stock.sum(axis=0) + stock.sum(axis=1) - 2 * stock.diagonal()
    worst = sorted(range(len(MANY)), key=lambda i: -errors[i])[:25]
    assert grid.locator("tbody th").all_inner_texts() == [job.labels[i] for i in worst]
    row = grid.locator("tbody tr").first.locator("td").all_inner_texts()
    assert sum(int(text) for text in row if text != "·") == stock[worst[0]].sum()
    main.get_by_label("Labels shown").select_option("90")
    expect(grid.locator("tbody tr")).to_have_count(90)
    seconds = page.evaluate(
        """async () => {
            const start = performance.now();
            for (const cell of [...document.querySelectorAll(".matrix td")].slice(0, 50)) {
                cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
                await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
            }
            return (performance.now() - start) / 1000;
        }"""
    )
    assert seconds / 50 < 0.2  # to point at one of 8,190 cells


def test_flips_are_found_by_comparison_label_and_side_page_by_page(site: Site, tab: Callable[..., Page]) -> None:
    page, job = tab(), site.jobs["whole"]
    main = show(page, site, "whole")
    pairs = job.metrics["comparison"]
    at, pair = next((i, p) for i, p in enumerate(pairs) if (p["candidate"], p["baseline"]) == ("lora", "majority"))
    flips = [f for f in job.flips if (f["candidate"], f["baseline"]) == ("lora", "majority")]
    main.get_by_role("button", name=f"{pair['n_fixed']}, {pair['n_broken']}: show the rows").first.click()
    expect(main.get_by_role("heading", name="Rows that changed sides")).to_be_focused()
    expect(main.get_by_role("combobox", name="Comparison")).to_have_value(str(at))
    main.get_by_label("Which").select_option("fixed")
    shown = main.get_by_role("region", name="LoRA fine-tuning against Always")
    rows = shown.locator("tbody tr")
    found: list[str] = []
    fixed = [f["row_id"] for f in flips if f["flip"] == "fixed"]
    assert len(fixed) > 50
    for number in range(1, -(-len(fixed) // 25) + 1):
        expect(main.get_by_text(f"Page {number}", exact=True)).to_be_visible()
        expect(shown.locator("table")).to_have_attribute("aria-busy", "false")
        expect(rows.first.locator("th")).to_have_text(fixed[len(found)])
        found += rows.locator("th").all_inner_texts()
        if number * 25 < len(fixed):
            main.get_by_role("button", name="Next").click()
    assert found == fixed
    expect(main.get_by_role("button", name="Next")).to_be_disabled()
    main.get_by_label("True label").select_option(HOSTILE)
    of_label = [f["row_id"] for f in flips if f["flip"] == "fixed" and f["label"] == HOSTILE]
    expect(rows.locator("td:nth-child(3)").filter(has_not_text=HOSTILE)).to_have_count(0)
    expect(rows).to_have_count(min(25, len(of_label)))
    expect(main.get_by_text("Page 1", exact=True)).to_be_visible()
    assert rows.locator("th").all_inner_texts() == of_label[:25]


def test_the_slider_says_what_a_threshold_buys(site: Site, tab: Callable[..., Page]) -> None:
    page, job = tab(), site.jobs["whole"]
    main = show(page, site, "whole")
    curve = sorted(job.metrics["methods"]["lora"]["test"]["coverage"], key=lambda point: point["threshold"])
    slider = main.get_by_role("slider", name="min_confidence")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    point = curve[3]
    answered, right = f"{100 * point['coverage']:.0f}\u00a0%", f"{100 * point['accuracy']:.1f}\u00a0%"
    said = f"{answered} of the rows are answered, {right} of those right"
    expect(slider).to_have_attribute("aria-valuetext", f"{point['threshold']:.3f}: {said}")
    expect(main.get_by_text(said)).to_be_visible()


@pytest.mark.parametrize(("kind", "missing"), [("train", "Pair by pair"), ("baseline", "How many labels")])
def test_jobs_of_one_half_show_what_they_have(site: Site, tab: Callable[..., Page], kind: str, missing: str) -> None:
    page = tab()
    main = show(page, site, kind)
    assert not any(missing in heading for heading in headings(page))
    expect(page.get_by_role("grid")).to_be_visible()
    assert not set(main.inner_text().split()) & {"undefined", "null", "NaN", "false", "[object"}
    assert main.evaluate("node => [...node.childNodes].every(one => one.nodeType !== Node.TEXT_NODE || !one.data)")
    if kind == "baseline":
        expect(main.get_by_text("publishes no model")).to_be_visible()
        assert main.get_by_role("tab").count() == 0
    else:
        expect(main.get_by_role("tab", name="curl")).to_be_visible()


def test_a_job_that_predicts_shows_how_many_rows_got_each_label_and_its_file(
    site: Site, tab: Callable[..., Page]
) -> None:
    db, model_id = site.context.db, site.jobs["whole"].model_ids["lora"]
    summary = {
        "headline": "990 of 1,000 rows labelled; 10 without a text.", "model_id": model_id, "n_rows": 1000,
        "labels": [{"label": "<b>refund", "count": 900}, {"label": "fee", "count": 90}], "rows_per_second": 0.314,
    }  # fmt: skip
    with db.write() as session:
        job = jobs.submit(
            session, kind="predict", name="a whole file", dataset_id=site.jobs["whole"].dataset_id, metadata={},
            spec=JobSpec(kind="predict", model=model_id).kept(), now=START, model_id=model_id,
        )  # fmt: skip
    lease = claim(db).lease
    stored = site.context.storage.put(io.BytesIO(b"row_id,text,label,confidence\n"), f"{lease.prefix}/predictions.csv")
    artifact = NewArtifact("predictions.csv", stored.size_bytes, stored.sha256, stored.key, holds_texts=True)
    page = tab()
    page.goto(f"{site.url}/ui/#/job/{job.id}")
    expect(page.get_by_role("list", name="Stages").get_by_role("listitem")).to_have_text(
        [re.compile(name) for name in ("Prepare", "Predictions", "Publishing")]
    )
    jobs.publish(db, lease, [artifact], [], summary, START, GRACE)
    expect(page.get_by_role("heading", name="990 of 1,000 rows labelled")).to_be_visible()
    expect(page.get_by_text("0.31 rows a second")).to_be_visible()
    rows = page.get_by_role("region", name="Rows by label").get_by_role("row")
    assert rows.all_inner_texts() == ["Label\tRows\tShare", "<b>refund\t900\t90.0\xa0%", "fee\t90\t9.0\xa0%"]
    with page.expect_download() as downloaded:
        page.get_by_role("link", name="Download predictions.csv").click()
    assert downloaded.value.path().read_bytes() == b"row_id,text,label,confidence\n"
    assert not set(page.locator("main").inner_text().split()) & {"undefined", "null", "NaN", "[object"}
    page.goto(f"{site.url}/ui/#/jobs")
    expect(page.get_by_role("listitem").filter(has_text="a whole file")).to_contain_text("predict, asked for")


def test_rows_that_went_with_their_dataset_are_said_to_be_gone(
    site: Site, tab: Callable[..., Page], tmp_path: Path
) -> None:
    site.jobs["gone"] = job = leave(site.context, site.url, tmp_path, METHODS, LABELS, TEXTS, name="gone")
    with site.context.db.write() as session:
        catalog.remove_dataset(session, job.dataset_id, START, GRACE)
    page = tab("404")
    main = show(page, site, "gone")
    expect(main.get_by_text("The rows went with the dataset")).to_be_visible()
    expect(main.get_by_text("every file that holds its texts")).to_be_visible()
    expect(main.get_by_role("link", name="predictions.csv")).to_have_count(0)
    expect(page.get_by_role("grid")).to_be_visible()


def test_every_file_can_be_downloaded_and_the_report_opened(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    main = show(page, site, "whole")
    job = httpx.get(f"{site.url}/jobs/{site.jobs['whole'].id}").json()
    links = main.locator(".files a")
    assert links.all_inner_texts() == [file["name"] for file in job["artifacts"]]
    for link, file in zip(links.all(), job["artifacts"], strict=True):
        with page.expect_download() as download:
            link.click()
        assert Path(download.value.path()).stat().st_size == file["size_bytes"]
    main.get_by_role("link", name="Open the report").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(job["summary"]["headline"])


def test_one_method_looks_the_same_in_every_chart_and_is_chosen_first(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    main = show(page, site, "whole")
    expect(main.get_by_role("combobox", name="Method").last).to_have_value("lora")
    drawn = main.locator(".keys li").evaluate_all(
        "all => all.map(one => [one.innerText.trim(), one.querySelector('svg').innerHTML])"
    )
    looks = {name: {look for other, look in drawn if other == name} for name, _ in drawn}
    assert {len(found) for found in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(looks)
    rungs = main.get_by_role("img", name="Accuracy of every method").locator("g:has(path)")
    read = "node => [node.querySelector('text').textContent, node.querySelector('path:last-child').getAttribute('d')]"
    marks = {said.split(":")[0]: mark for said, mark in (rung.evaluate(read) for rung in rungs.all())}
    assert len(marks) == len(set(marks.values())) == len(METHODS)
    keyed = {name: look for name, (look,) in looks.items() if name in marks}
    assert len(keyed) == 3  # the trained ones; a line for a prompt has no marks
    assert all(f'd="{marks[name]}"' in look for name, look in keyed.items())


def test_a_wide_table_shows_that_there_is_more_and_where_the_keyboard_is(site: Site, tab: Callable[..., Page]) -> None:
    page = tab(viewport={"width": 360, "height": 800})
    main = show(page, site, "whole")
    table = main.get_by_role("region", name="Methods", exact=True)
    expect(table).to_have_class(re.compile(r"\bmore\b"))
    assert table.evaluate("node => getComputedStyle(node).boxShadow") != "none"
    main.get_by_role("link", name="stand below").focus()
    page.keyboard.press("Tab")
    expect(table).to_be_focused()
    place = table.bounding_box()
    beside = {"x": place["x"] - 4, "y": place["y"] + 20, "width": 4, "height": 20}  # type: ignore[index]
    focused = page.screenshot(clip=beside)  # type: ignore[arg-type]
    table.evaluate("node => node.blur()")  # the way back, as coming to be focused may scroll the page, and this may not
    assert table.bounding_box() == place
    assert page.screenshot(clip=beside) != focused  # type: ignore[arg-type]


def test_a_method_that_is_not_known_here_has_a_mark_of_its_own(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    page.goto(f"{site.url}/ui/#/nowhere")
    drawn = page.evaluate(
        """async () => {
            const [{ render }, { html }, { Mark, ofMethod }] = await Promise.all(
                ["/ui/vendor/preact.js", "/ui/ui.js", "/ui/charts.js"].map((file) => import(file)));
            const svg = document.createElement("svg");
            const one = (name) => html`<${Mark} ...${ofMethod(name)} x="0" y="0" />`;
            render(["majority", "lora", "newer"].map(one), svg);
            return [ofMethod("newer").name, ...[...svg.querySelectorAll("path")].map((path) => path.getAttribute("d"))];
        }"""
    )
    assert drawn[0] == "newer"
    assert len({*drawn} - {None, "undefined"}) == 4


def test_without_a_prompt_there_are_no_columns_that_would_be_empty(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    main = show(page, site, "baseline")
    assert main.get_by_role("columnheader", name="No label given").count() == 0
    main = show(tab(), site, "whole")
    expect(main.get_by_role("columnheader", name="No label given")).to_be_visible()


def test_what_leaks_across_the_split_stands_by_the_verdict(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    main = show(page, site, "whole")
    expect(main.get_by_text("almost the text of a row in another part")).to_be_visible(timeout=60_000)


# Copied calls -------------------------------------------------------------------------------------
def ran(name: str, program: str, folder: Path, key: str) -> subprocess.CompletedProcess[str]:
    runs = {"curl": ["bash", "-c", program], "Python": [sys.executable, "-c", program],
            "JavaScript": ["node", "--input-type=module", "-e", program]}  # fmt: skip
    env = {"PATH": os.environ["PATH"], "no_proxy": "*", "TUNEPROOF_API_KEY": key}
    return subprocess.run(runs[name], capture_output=True, text=True, timeout=60, cwd=folder, env=env, check=False)


NASTY = """it's "quoted" $HOME `id` \\n {x} ${y}\nإرجاع 🙂\u2028 end"""


@pytest.mark.parametrize("closed", [False, True])
def test_the_copied_calls_run_as_they_stand(site: Site, tab: Callable[..., Page], tmp_path: Path, closed: bool) -> None:
    if shutil.which("node") is None or shutil.which("curl") is None:
        pytest.skip("needs node and curl")
    app, key = make_app(tmp_path / "data"), ""
    context = app.state.context
    context.engine = engine = ScriptedEngine()
    with listening(app) as url:
        job = leave(context, url, tmp_path, {"lora": 0.9}, LABELS, TEXTS, kind="train")
        engine.labels = tuple(job.labels)
        if closed:
            with context.db.write() as session:
                _, key = catalog.create_key(session, "app", "read", START)
        page = tab("401" if closed else "")
        page.goto(f"{url}/ui/#/model/{job.model_ids['lora']}")
        if closed:
            page.get_by_label("Key").fill(key)
            page.get_by_role("button", name="Sign in").click()
        page.get_by_role("textbox", name="Text").fill(NASTY)
        page.get_by_text("The same call for a program").click()
        tabs = page.get_by_role("tablist", name="Copy as").get_by_role("tab")
        assert tabs.all_inner_texts() == ["curl", "Python", "JavaScript"]
        tabs.first.focus()
        for name in tabs.all_inner_texts():
            expect(page.get_by_role("tab", name=name, selected=True)).to_be_focused()
            program = page.get_by_role("tabpanel", name=name).locator("pre").inner_text()
            assert ("TUNEPROOF_API_KEY" in program) == closed
            done = ran(name, program, tmp_path, key)
            assert done.returncode == 0, done.stderr
            if name == "curl":
                assert json.loads(done.stdout)["predictions"][0]["label"] == "refund"
            else:
                assert done.stdout.split() == ["refund", "0.8"]
            page.keyboard.press("ArrowRight")
        expect(tabs.first).to_be_focused()


# Models -------------------------------------------------------------------------------------------
def test_models_stand_by_name_newest_first(site: Site, tab: Callable[..., Page]) -> None:
    page = tab()
    page.goto(f"{site.url}/ui/#/models")
    page.get_by_role("heading", name="tickets").wait_for()
    versions = page.get_by_role("region", name="Versions of tickets").locator("tbody th").all_inner_texts()
    assert len(versions) >= 3
    assert versions == sorted(versions, key=int, reverse=True)
    page.get_by_role("link", name=f"tickets, version {versions[0]}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"tickets, version {versions[0]}")


def test_the_playground_waits_for_the_base_and_shows_what_the_model_says(site: Site, tab: Callable[..., Page]) -> None:
    page = tab("503")
    page.goto(f"{site.url}/ui/#/model/{site.jobs['whole'].model_ids['lora']}")
    site.engine.loading = 1
    box = page.get_by_role("textbox", name="Text")
    box.fill("one\n\ncut here")
    page.get_by_label("Each line is a text of its own").check()
    page.get_by_label("min_confidence").fill("0.9")
    with page.expect_request("**/predict"):
        box.press("Control+Enter")
    expect(page.get_by_text("still being loaded")).to_be_visible()
    expect(page.get_by_role("button", name="Predict")).to_be_disabled()
    answers = page.get_by_role("list", name="Predictions").get_by_role("listitem")
    expect(answers).to_have_count(2)
    expect(answers.nth(0)).to_contain_text("Abstained at 80.0 %")
    expect(answers.nth(1)).to_contain_text("only the beginning was read")
    assert set(answers.nth(0).locator("tbody th").all_inner_texts()) == set(LABELS)
    widths = [bar.bounding_box()["width"] for bar in answers.nth(0).locator(".bar").all()]  # type: ignore[index]
    assert widths[0] / widths[1] == pytest.approx(16, rel=0.1)
    expect(page.get_by_text(re.compile(r"Answered in [\d,]+ ms"))).to_be_visible()
    assert page.evaluate("window.harmed") is None


def test_what_the_service_refuses_is_said_in_words(site: Site, tab: Callable[..., Page]) -> None:
    page = tab("422")
    page.goto(f"{site.url}/ui/#/model/{site.jobs['whole'].model_ids['lora']}")
    page.get_by_label("Each line is a text of its own").check()
    page.get_by_role("textbox", name="Text").fill("x\n" * 1025)
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_role("alert")).to_contain_text("Expected 1 to 1024 texts a call, found 1025")


def confirm(page: Page, verb: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=verb).click()


def test_an_alias_is_promoted_refused_forced_pointed_back_and_deleted(site: Site, tab: Callable[..., Page]) -> None:
    page = tab("409")
    good, bad = (site.jobs[name].model_ids["lora"] for name in ("whole", "worse"))
    page.goto(f"{site.url}/ui/#/model/{good}")
    page.get_by_label("Alias", exact=True).fill("production")
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_text("production points to this model now.")).to_be_visible()

    page.get_by_role("button", name="Delete the model").click()
    confirm(page, "Delete")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("The alias 'production' points to this")
    page.get_by_role("button", name="Keep").click()

    page.goto(f"{site.url}/ui/#/model/{bad}")
    page.get_by_label("Alias", exact=True).fill("production")
    expect(page.get_by_text("This model is shown to be worse")).to_be_visible()
    page.get_by_role("button", name="Promote all the same").click()
    confirm(page, "Promote all the same")
    expect(page.get_by_role("button", name="Point back to tickets, version")).to_be_visible()
    assert pointed(site, "production") == bad

    page.get_by_role("button", name="Point back to tickets, version").click()
    confirm(page, "Point back")
    expect(page.get_by_text("production points back to tickets")).to_be_visible()
    assert pointed(site, "production") == good

    page.goto(f"{site.url}/ui/#/model/{good}")
    page.get_by_role("button", name="Delete the alias production").click()
    confirm(page, "Delete")
    expect(page.get_by_text("None points here.")).to_be_visible()
    assert pointed(site, "production") is None


def test_a_refusal_is_said_once_and_other_labels_are_said_before_and_after(
    site: Site, tab: Callable[..., Page], tmp_path: Path
) -> None:
    fewer = leave(site.context, site.url, tmp_path, {"lora": 0.9}, LABELS[:2], TEXTS, kind="train", name="fewer")
    good, bad = (site.jobs[name].model_ids["lora"] for name in ("whole", "worse"))
    for alias in ("swapped", "refused"):
        httpx.put(f"{site.url}/aliases/{alias}", json={"model_id": good}).raise_for_status()
    page = tab("409")
    page.goto(f"{site.url}/ui/#/model/{fewer.model_ids['lora']}")
    page.get_by_label("Alias", exact=True).fill("Not An Alias")
    page.get_by_role("button", name="Promote").click()
    said = page.get_by_label("Alias", exact=True).evaluate("node => node.validationMessage")
    assert said.startswith("An alias begins with")
    page.get_by_label("Alias", exact=True).fill("swapped")
    differ = page.get_by_text("These models have different labels: 0 only in this one, 3 only in tickets, version")
    expect(differ).to_contain_text("Programs that call the alias will meet fewer labels than before.")
    with page.expect_response("**/aliases/swapped"):
        page.get_by_role("button", name="Promote", exact=True).click()
    expect(page.get_by_text("swapped points to this model now.")).to_be_visible()
    expect(differ).to_have_count(1)

    held = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/gate?*", hold)
    page.goto(f"{site.url}/ui/#/model/{bad}")
    page.get_by_label("Alias", exact=True).fill("refused")
    with page.expect_response("**/aliases/refused"):
        page.get_by_role("button", name="Promote").click()  # before it is known
    held[0].continue_()
    expect(page.get_by_role("button", name="Promote all the same")).to_be_visible()
    expect(page.get_by_text("is shown to be worse")).to_have_count(1)


def pointed(site: Site, alias: str) -> str | None:
    found = httpx.get(f"{site.url}/aliases").json()["data"]
    return next((one["model_id"] for one in found if one["alias"] == alias), None)


def test_where_the_look_beforehand_fails_the_refusal_itself_shows_the_figures(
    site: Site, tab: Callable[..., Page]
) -> None:
    good, bad = (site.jobs[name].model_ids["lora"] for name in ("whole", "worse"))
    httpx.put(f"{site.url}/aliases/blind", json={"model_id": good}).raise_for_status()
    page = tab("Failed to load resource")
    page.route("**/gate?*", lambda route: route.fulfill(status=503, json={"detail": "Not now.", "code": "queue_full"}))
    page.goto(f"{site.url}/ui/#/model/{bad}")
    page.get_by_label("Alias", exact=True).fill("blind")
    expect(page.get_by_text("They could not be compared beforehand")).to_be_visible()
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_role("alert")).to_contain_text("is shown to be worse than")
    expect(page.get_by_role("button", name="Promote all the same")).to_be_visible()
    assert pointed(site, "blind") == good


def test_an_alias_that_cannot_be_compared_has_nothing_of_the_one_typed_before(
    site: Site, tab: Callable[..., Page]
) -> None:
    good, bad = (site.jobs[name].model_ids["lora"] for name in ("whole", "worse"))
    for alias in ("told", "untold"):
        httpx.put(f"{site.url}/aliases/{alias}", json={"model_id": good}).raise_for_status()
    page = tab("503")
    unable = {"status": 503, "json": {"detail": "Not now.", "code": "queue_full"}}
    page.route("**/aliases/untold/gate?*", lambda route: route.fulfill(**unable))  # type: ignore[arg-type]
    page.goto(f"{site.url}/ui/#/model/{bad}")
    page.get_by_label("Alias", exact=True).fill("told")
    forced = page.get_by_role("button", name="Promote all the same")
    expect(forced).to_be_visible()
    page.get_by_label("Alias", exact=True).fill("untold")
    expect(page.get_by_text("They could not be compared beforehand")).to_be_visible()
    expect(page.get_by_role("button", name="Promote", exact=True)).to_be_enabled()
    expect(forced).to_have_count(0)


def test_a_model_without_alias_can_be_deleted(site: Site, tab: Callable[..., Page], tmp_path: Path) -> None:
    job = leave(site.context, site.url, tmp_path, {"lora": 0.9}, LABELS, TEXTS, kind="train", name="shortlived")
    page = tab()
    page.goto(f"{site.url}/ui/#/model/{job.model_ids['lora']}")
    page.get_by_role("button", name="Delete the model").click()
    confirm(page, "Delete")
    page.wait_for_url("**/ui/#/models")
    expect(page.get_by_role("heading", name="tickets")).to_be_visible()
    expect(page.get_by_role("heading", name="shortlived")).to_have_count(0)


# Keys ---------------------------------------------------------------------------------------------
def make_key(page: Page, name: str, scope: str = "") -> str:
    page.get_by_label("Name").fill(name)
    if scope:
        page.get_by_role("radio", name=scope).check()
    page.get_by_role("button", name="Make the key").click()
    expect(page.get_by_role("heading", name=f"The key {name}")).to_be_focused()
    return page.locator(".copyable pre").inner_text()


def test_the_first_key_closes_the_service_and_signs_this_browser_in(tab: Callable[..., Page], tmp_path: Path) -> None:
    with listening(make_app(tmp_path / "data")) as url:
        page = tab("409")
        page.goto(f"{url}/ui/#/keys")
        expect(page.get_by_text("This service is open.")).to_be_visible()
        assert page.get_by_role("radio").count() == 0
        first = make_key(page, "me")
        expect(page.get_by_text("This service is open.")).to_have_count(0)
        expect(page.get_by_text("me (admin)")).to_be_visible()
        assert httpx.get(f"{url}/keys").status_code == 401
        assert httpx.get(f"{url}/keys", headers={"Authorization": f"Bearer {first}"}).status_code == 200

        app = {"Authorization": f"Bearer {make_key(page, 'shop', 'predict')}"}
        assert httpx.post(f"{url}/predict", json={"model": "none", "text": "x"}, headers=app).status_code == 404
        assert httpx.get(f"{url}/jobs", headers=app).status_code == 403
        rows = page.get_by_role("region", name="Keys").locator("tbody tr")
        expect(rows).to_have_count(2)
        page.get_by_role("button", name="Revoke me").click()
        confirm(page, "Revoke")
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("the last admin key")
        page.get_by_role("button", name="Keep").click()
        page.get_by_role("button", name="Revoke shop").click()
        confirm(page, "Revoke")
        expect(page.get_by_text("shop is revoked.")).to_be_visible()
        assert httpx.post(f"{url}/predict", json={"model": "none", "text": "x"}, headers=app).status_code == 401
        page.reload()
        expect(rows).to_have_count(2)
        expect(page.get_by_text(first)).to_have_count(0)


def test_whoever_may_only_read_is_offered_nothing_that_would_be_refused(
    tab: Callable[..., Page], tmp_path: Path
) -> None:
    app = make_app(tmp_path / "data")
    context = app.state.context
    context.engine = ScriptedEngine()
    with listening(app) as url:
        job = leave(context, url, tmp_path, {"lora": 0.9}, LABELS, TEXTS, kind="train")
        with context.db.write() as session:
            _, key = catalog.create_key(session, "reader", "read", START)
        page = tab("401")
        page.goto(f"{url}/ui/#/model/{job.model_ids['lora']}")
        page.get_by_label("Key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Try it")).to_be_visible()
        expect(page.get_by_text("None points here.")).to_be_visible()
        for name in ("Promote", "Delete the model"):
            assert page.get_by_role("button", name=name).count() == 0
        page.goto(f"{url}/ui/#/keys")
        expect(page.get_by_text("Only a key with the scope admin")).to_be_visible()
