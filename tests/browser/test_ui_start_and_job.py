"""From a dropped file to a finished job, as a browser shows it: the real service, a real worker, a tiny base model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import Launch, Process
from tests.tiny import BERT, labelled_texts
from tests.waiting import until

pytestmark = pytest.mark.more
HOSTILE = '<img src=x onerror="window.owned=1">'
LONG = 60_000  # milliseconds, for what a worker on a busy machine takes


class Service:
    """The API and a worker, each of which can be stopped and come back."""

    def __init__(self, api: Process, worker: Process) -> None:
        self.api, self.worker, self.url = api, worker, api.url

    def items(self, path: str) -> list[dict[str, object]]:
        return httpx.get(f"{self.url}{path}").json()["data"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def service(launch: Launch, tiny_models: Path) -> Service:
    made = Service(launch("service", "serve", MODELS_DIR=tiny_models), launch("worker", MODELS_DIR=tiny_models))
    made.api.start()
    made.api.wait_until_it_answers()
    return made


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """The start page; what any page complains of fails the test, but for calls that could not get through."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 360, "height": 800})
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: None if said.text.startswith("Failed to load") else complaints.append(said.text))
    opened.goto(f"{service.url}/ui/")
    expect(opened.get_by_role("heading", level=1)).to_be_visible()
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
    opened.close()


def tickets(n: int = 90) -> str:
    """A column of texts and two that look like labels, of which `category` is the usual name."""
    texts, labels = labelled_texts(n)
    rows = "".join(f"{text},{label},team {i % 3}\n" for i, (text, label) in enumerate(zip(texts, labels, strict=True)))
    return "text,category,team\n" + rows


def drop(page: Page, table: str, name: str = "tickets.csv") -> None:
    make = "([text, name]) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }"
    page.dispatch_event("body", "drop", {"dataTransfer": page.evaluate_handle(make, [table, name])})


def test_a_dropped_file_becomes_a_job_that_is_followed_through_a_restart_to_its_result(service, page):
    drop(page, tickets())
    expect(page.get_by_role("heading", name="tickets")).to_be_focused()
    preview = page.get_by_role("region", name="First rows")
    expect(preview.get_by_role("columnheader", name="category recognised")).to_be_visible()

    held = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/datasets", hold)
    begin = page.get_by_role("button", name="Compare prompting and fine-tuning")
    with page.expect_request("**/datasets"):  # by itself
        page.get_by_label("Column of the labels").focus()
        page.get_by_label("Column of the labels").select_option("team")
        expect(begin).to_be_disabled()  # or it would compare on the column of before
    expect(begin).to_be_disabled()
    held[0].continue_()
    page.unroute("**/datasets")
    expect(begin).to_be_enabled()
    expect(page.get_by_label("Column of the labels")).to_be_focused()
    expect(preview.get_by_role("columnheader", name="Label team")).to_be_visible()
    expect(preview.get_by_text("recognised")).to_have_count(1)
    until(
        lambda: [found["label_column"] for found in service.items("/datasets")] == ["team"], 20, "one dataset is left"
    )

    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Base model").select_option(BERT)
    page.get_by_label("Epochs").fill("3")
    page.get_by_label("Longest text, in tokens").fill("32")
    page.get_by_label("Seed").fill("-1")
    page.get_by_text("Options", exact=True).click()
    begin.click()
    expect(page.get_by_label("Seed")).to_be_focused()  # unfolded again, to show what is wrong
    page.get_by_label("Seed").fill("7")
    page.route("**/jobs", hold)
    with page.expect_request("**/jobs"):
        begin.dblclick()
    drop(page, tickets(), "another.csv")  # while the comparison is being started
    expect(page.get_by_label("Choose another file")).to_be_disabled()
    expect(page.get_by_text("another.csv")).to_have_count(0)
    held[1].continue_()
    page.unroute("**/jobs")
    expect(page).to_have_url(re.compile("#/job/job_"))
    assert len(held) == 2
    assert [job["spec"]["seed"] for job in service.items("/jobs")] == [7]
    expect(page.get_by_text("Waits for a worker")).to_be_visible()

    expect(page).to_have_title("tickets – tuneproof")

    service.worker.start()
    expect(page.get_by_role("img", name=re.compile("^Loss. Training loss was"))).to_be_visible(timeout=LONG)
    service.api.stop()
    service.api.start()
    expect(page.get_by_text("succeeded").first).to_be_visible(timeout=LONG)
    expect(page.get_by_role("img", name=re.compile(r"^Validation macro-F1\. 0\.\d+ after epoch"))).to_be_visible()
    log = page.get_by_role("region", name="Log, newest first").get_by_role("listitem")
    told = log.all_inner_texts()
    assert len(told) == len(set(told)) >= 8
    expect(log.locator("code", has_text=re.compile("^tuneproof models pull qwen3-0.6b$"))).to_be_visible()
    headline = service.items("/jobs")[0]["summary"]["headline"]
    expect(page.get_by_text(headline).first).to_be_visible()

    page.reload()
    expect(page.get_by_text(headline).first).to_be_visible()
    expect(log).to_have_count(len(told))
    expect(page.get_by_role("img", name=re.compile("^Loss. Training loss was"))).to_be_visible()


def test_warnings_open_to_their_rows_and_hostile_texts_stay_texts(page):
    rows = [(f"{HOSTILE} number {i}", ("a", HOSTILE)[i % 2]) for i in range(12)]
    rows += [("", "a"), ("twice", "a"), ("twice", HOSTILE)]
    drop(page, "text,label\n" + "".join('"{}","{}"\n'.format(*(x.replace('"', '""') for x in row)) for row in rows))
    warning = page.get_by_text("Rows have the same text and different labels")
    warning.click()
    shown = page.get_by_role("region", name=re.compile("^Rows: Rows have the same text"))
    expect(shown.get_by_role("row")).to_contain_text(["Row", "13twicea", f"14twice{HOSTILE}"])
    expect(page.get_by_role("rowheader", name=HOSTILE)).to_be_visible()
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.owned") is None


def test_what_is_refused_can_be_read_another_way_or_without_its_rare_labels(service, page):
    before = len(service.items("/datasets"))
    drop(page, "one,two\n" + "".join(f"x{i % 2},y{i % 3}\n" for i in range(12)) + "x0,rare\n")
    expect(page.get_by_role("alert")).to_contain_text("Expected a column of texts, recognised none")
    page.get_by_label("Column of the texts").select_option("one")
    expect(page.get_by_role("alert")).to_contain_text("rare (1)")
    page.get_by_label("Column of the labels").select_option("two")
    expect(page.get_by_label("Column of the labels").locator("..")).to_contain_text("As you said")
    expect(page.get_by_role("alert")).to_contain_text("leave those rows out")
    assert len(service.items("/datasets")) == before  # nothing refused is kept


def test_a_constant_column_taken_for_the_labels_is_mended_in_the_page(page):
    rows = "".join(f"{text},open,{label}\n" for text, label in zip(*labelled_texts(60), strict=True))
    drop(page, "text,category,kind\n" + rows)
    expect(page.get_by_role("alert")).to_contain_text("at least 2 labels in column category, found 1")
    expect(page.get_by_role("alert")).to_contain_text("Choose another “Column of the labels”")
    page.get_by_label("Column of the labels").select_option("kind")
    expect(page.get_by_role("region", name="First rows").get_by_role("columnheader", name="Label kind")).to_be_visible()


def test_a_choice_that_is_refused_goes_back_to_what_stands_below(page):
    drop(page, "text,label,status\n" + "".join(f"words {i} here,{'ab'[i % 2]},open\n" for i in range(30)))
    expect(page.get_by_role("heading", name="tickets")).to_be_focused()
    page.get_by_label("Column of the labels").select_option("status")
    expect(page.get_by_role("alert")).to_contain_text("column status, found 1")
    expect(page.get_by_label("Column of the labels")).to_have_value("label")
    expect(page.get_by_role("button", name="Compare prompting and fine-tuning")).to_be_enabled()


def test_choices_made_one_after_the_other_leave_one_dataset(service, page):
    before = [found["id"] for found in service.items("/datasets")]
    drop(page, "text,label,a,b\n" + "".join(f"words {i} here,{'ab'[i % 2]},{i % 3},{i % 4}\n" for i in range(60)))
    expect(page.get_by_role("heading", name="tickets")).to_be_focused()
    sent = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    labels = page.get_by_label("Column of the labels")
    for name in ("a", "b", "a", "b"):
        labels.select_option(name)
    preview = page.get_by_role("region", name="First rows")
    expect(preview.get_by_role("columnheader", name="Label b")).to_be_visible()
    assert len(sent) == 1
    left = lambda: [found for found in service.items("/datasets") if found["id"] not in before]  # noqa: E731
    until(lambda: [found["label_column"] for found in left()] == ["b"], 20, "one dataset is left")


def test_what_leaks_across_the_split_and_what_is_not_at_hand_is_said_above_the_button(page):
    busy = {"status": 429, "headers": {"Retry-After": "1"}, "json": {"detail": "Ask again.", "code": "queue_full"}}
    answers = [lambda route: route.fulfill(**busy), lambda route: route.continue_()]
    page.route("**/preflight*", lambda route: answers.pop(0)(route) if len(answers) > 1 else answers[0](route))
    texts = [
        f"my parcel number {i // 4} did not come to me this week, where is it now{'!' * (i % 4)}" for i in range(80)
    ]
    drop(page, "text,label\n" + "".join(f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate(texts)))
    expect(page.get_by_text("asked for by itself")).to_be_visible()
    leak = page.get_by_text("almost the text of a row in another part")
    expect(leak).to_be_visible(timeout=LONG)
    begin = page.get_by_role("button", name="Compare prompting and fine-tuning")
    assert leak.bounding_box()["y"] < begin.bounding_box()["y"]
    notice = page.get_by_text("prompting will not be tested").locator("..")
    expect(notice).to_contain_text("choose tiny-qwen3 or")  # the operator's own, which no command could fetch
    expect(notice).not_to_contain_text("models pull")
    page.get_by_text("Options", exact=True).click()
    expect(page.get_by_label("Prompt model").locator("option")).to_contain_text(["auto", "not at hand"])


def test_rows_of_rare_labels_are_dropped_at_a_click(page):
    drop(page, tickets(30) + "alone,rare,team 0\n")
    page.get_by_role("button", name="Drop those rows and go on").click()
    expect(page.get_by_text("Rows of rare labels are left out.")).to_be_visible()


def test_labels_and_columns_stand_to_the_letter_in_what_is_refused(page):
    rows = "".join(f"words {i} here,{('a', '__proto__')[i % 2]},x\n" for i in range(24))
    rare = ("pass", "-1", "a`b`", "few_shot", "5 %", "Pass on")
    drop(page, "text,label,pass\n" + rows + "".join(f"more {i},{label},x\n" for i, label in enumerate(rare)))
    said = page.get_by_role("alert")
    expect(said).to_be_visible()
    assert ": pass (1), -1 (1), a`b` (1), few_shot (1), 5 % (1), Pass on (1). Add rows, or leave" in said.inner_text()
    page.get_by_label("Column of the labels").select_option("pass")
    expect(said).to_contain_text("in column pass, found 1. Choose another “Column of the labels”.")
    page.get_by_label("Column of the labels").select_option("label")
    page.get_by_role("button", name="Drop those rows and go on").click()
    page.get_by_text("Options", exact=True).click()
    page.get_by_text("What the labels mean").click()
    expect(page.get_by_label("__proto__")).to_have_value("")


def test_what_was_set_for_the_job_outlives_another_reading_of_the_file(service, page):
    drop(page, tickets())
    expect(page.get_by_role("heading", name="tickets")).to_be_focused()
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Seed").fill("7")
    page.get_by_text("What the labels mean").click()
    page.get_by_label(labelled_texts(1)[1][0], exact=True).fill("what it means")
    page.get_by_label("Column of the labels").select_option("team")
    expect(page.get_by_role("region", name="First rows").get_by_role("columnheader", name="Label team")).to_be_visible()
    expect(page.get_by_label("Seed")).to_be_visible()
    expect(page.get_by_label("Seed")).to_have_value("7")
    expect(page.get_by_label("team 0", exact=True)).to_have_value("")
    held = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/jobs", hold)
    page.get_by_role("button", name="Compare prompting and fine-tuning").click()
    expect(page.get_by_label("Column of the labels")).to_be_disabled()  # or the job would be on another column
    expect(page.get_by_role("button", name="Compare prompting and fine-tuning")).to_be_disabled()
    assert held[0].request.post_data_json.keys() == {"dataset_id", "seed"}
    held[0].abort()
    expect(page.get_by_label("Column of the labels")).to_be_enabled()


def test_rare_labels_that_may_go_are_those_of_one_column(page):
    texts = "".join(f"words {i} here,{'ab'[i % 2]},{'cd'[i % 2]}\n" for i in range(30))
    drop(page, "text,label,other\n" + texts + "rare one,alone,alone too\n")
    page.get_by_role("button", name="Drop those rows and go on").click()
    expect(page.get_by_text("Rows of rare labels are left out.")).to_be_visible()
    page.get_by_label("Column of the labels").select_option("other")
    expect(page.get_by_role("alert")).to_contain_text("alone too (1)")


def test_figures_of_other_values_do_not_stand_for_those_asked_now(page):
    parcels = [f"my parcel number {i // 4} did not come this week, where is it{'!' * (i % 4)}" for i in range(80)]
    drop(page, "text,label\n" + "".join(f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate(parcels)))
    leak = page.get_by_text("almost the text of a row in another part")
    expect(leak).to_be_visible(timeout=LONG)
    figures = page.get_by_role("table", name=re.compile("^Time it takes"))
    expect(figures).to_be_visible()
    held = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/preflight?*max_length=64", hold)
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Longest text, in tokens").fill("64")
    expect(page.get_by_text("Not known yet.")).to_be_visible()
    expect(figures).to_have_count(0)
    expect(leak).to_have_count(0)
    until(lambda: page.wait_for_timeout(50) or held, 20, "the new values are asked about")
    held[0].fulfill(status=503, json={"detail": "Not now.", "code": "queue_full"})
    expect(page.get_by_role("alert")).to_contain_text("Not now.")
    expect(page.get_by_text("Not known yet.")).to_have_count(0)
    expect(figures).to_have_count(0)
    expect(leak).to_have_count(0)


def test_a_new_choice_ends_the_upload_of_the_one_before_and_a_stop_leaves_the_file(page):
    rows = "".join(f"words {i} here,open,{'pq'[i % 2]},{'xyz'[i % 3]}\n" for i in range(30))
    drop(page, "text,label,a,b\n" + rows)
    labels = page.get_by_label("Column of the labels")
    expect(page.get_by_role("alert")).to_contain_text("column label, found 1")

    def hold(route: Route) -> None:
        pass

    page.route("**/datasets", hold)
    with page.expect_request("**/datasets"):
        labels.select_option("a")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("tickets.csv")).to_be_visible()
    with page.expect_request("**/datasets"):
        page.get_by_role("button", name="Send it again").click()
    page.unroute("**/datasets")
    with page.expect_event("requestfailed"):
        labels.select_option("b")
    preview = page.get_by_role("region", name="First rows")
    expect(preview.get_by_role("columnheader", name="Label b")).to_be_visible()


def test_a_dataset_with_jobs_stays_when_its_file_is_read_another_way(service, page):
    drop(page, tickets())
    expect(page.get_by_role("heading", name="tickets")).to_be_focused()
    kept = service.items("/datasets")[0]["id"]
    job = httpx.post(f"{service.url}/jobs", content=json.dumps({"dataset_id": kept})).json()["id"]
    httpx.post(f"{service.url}/jobs/{job}/cancel").raise_for_status()
    ended = lambda: httpx.get(f"{service.url}/jobs/{job}").json()["status"] == "cancelled"  # noqa: E731
    until(ended, 60, "the job is cancelled")
    with page.expect_response(lambda answer: f"dataset_id={kept}" in answer.url):
        page.get_by_label("Column of the labels").select_option("team")
    expect(page.get_by_role("button", name="Compare prompting and fine-tuning")).to_be_enabled()
    assert kept in [found["id"] for found in service.items("/datasets")]


def test_whether_a_prompt_will_run_is_said_with_what_to_do_about_it(page):
    lacking = {"name": "qwen3-0.6b", "max_length": 32768, "generative": True, "at_hand": False}
    known = {"data": [lacking], "has_more": False, "auto_prompt_model": None, "prompt_endpoints": ["remote:here"]}
    page.route("**/base-models", lambda route: route.fulfill(json=known))
    drop(page, tickets())
    notice = page.get_by_text("prompting will not be tested").locator("..")
    expect(notice).to_contain_text("unless the worker has a GPU and can fetch qwen3-0.6b")
    expect(notice).to_contain_text("run tuneproof models pull qwen3-0.6b on the worker's machine")
    expect(page.get_by_role("table", name=re.compile("^Time it takes"))).to_be_visible(timeout=LONG)
    assert page.get_by_text("Zero-shot prompting").count() == 0
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Prompt model").select_option("remote:here")
    expect(notice).to_have_count(0)
    expect(page.get_by_text("Not known here yet: Zero-shot prompting.")).to_be_visible()


def test_a_file_is_chosen_by_keyboard_and_an_upload_can_be_stopped(page):
    held = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/datasets", hold)
    file = {"name": "t.csv", "mimeType": "text/csv", "buffer": tickets().encode()}
    page.on("filechooser", lambda chooser: chooser.set_files(file))  # asked for well before the key is pressed
    choose = page.get_by_label("Choose a file")
    for _ in range(12):
        page.keyboard.press("Tab")
        if choose.evaluate("node => node === document.activeElement"):
            break
    expect(choose).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_label("Choose a file")).to_be_attached()
    assert len(held) == 1


def test_a_dataset_in_use_says_why_it_cannot_be_deleted(service, page):
    answer = httpx.post(f"{service.url}/datasets", files={"file": ("busy.csv", tickets())})
    dataset = answer.json()["id"]
    service.worker.stop()
    job = httpx.post(f"{service.url}/jobs", content=json.dumps({"dataset_id": dataset})).json()["id"]
    page.goto(f"{service.url}/ui/#/datasets")
    page.get_by_role("button", name="Delete busy").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("job")
    page.keyboard.press("Escape")
    page.goto(f"{service.url}/ui/#/job/{job}")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert job not in [found["id"] for found in service.items("/jobs")]
