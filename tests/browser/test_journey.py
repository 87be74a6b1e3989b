"""The whole way as a person goes it: sign in, drop the example file, follow the job, read the result, use the model.

On the real service and worker with the embedded model; every page is held to axe-core, at 360 and 1600 pixels, dark and
light. With `TUNEPROOF_PICTURES=FOLDER` the pages are kept there as pictures, of a job with every default; else it has
one epoch on a quarter of the file.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Launch

pytestmark = pytest.mark.more
ROOT = Path(__file__).parents[2]
KEY = "a-key-for-the-journey-of-at-least-32-characters"
LOOKS = [(360, "dark"), (360, "light"), (1600, "dark"), (1600, "light")]
PICTURES = os.environ.get("TUNEPROOF_PICTURES")
JOB_MS = 280_000
EXAMPLE = ROOT / "examples" / "support_tickets.csv"


@pytest.fixture(scope="module")
def url(launch: Launch) -> str:
    up = launch("tuneproof", "up", BOOTSTRAP_KEY=KEY)
    up.start()
    up.wait_until_it_answers()
    return up.url


def example() -> bytes:
    """The example file; a quarter of its rows where no picture of them is wanted."""
    with EXAMPLE.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    short = io.StringIO(newline="")
    csv.writer(short).writerows([header, *rows[::4]])
    return EXAMPLE.read_bytes() if PICTURES else short.getvalue().encode()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """What a page complains of fails the test; a 401 before signing in is no complaint."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1600, "height": 1000})
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: None if "401" in said.text else complaints.append(said.text))
    yield opened
    assert complaints == []
    opened.close()


@pytest.fixture
def inspect(page: Page) -> Callable[[str], None]:
    """Looks at the page as it stands: accessible, and nowhere wider than the window, in every look."""
    axe = Axe()

    def look(name: str) -> None:
        for width, scheme in LOOKS:
            page.set_viewport_size({"width": width, "height": 1000})
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            found = axe.run(page)
            assert found.violations_count == 0, f"{name} at {width} px, {scheme}: {found.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} at {width} px"
            if PICTURES:
                page.screenshot(path=Path(PICTURES) / f"{name}-{width}-{scheme}.png", full_page=True)
        page.set_viewport_size({"width": 1600, "height": 1000})
        page.emulate_media(color_scheme="light")

    return look


@pytest.mark.timeout(600)
def test_from_a_key_and_a_file_to_a_verdict_a_model_in_place_and_its_answers(url, page, inspect):
    page.goto(f"{url}/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    inspect("sign-in")
    page.get_by_label("Key", exact=True).fill("not a key")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")

    expect(page.get_by_role("heading", name="Is prompting good enough")).to_be_visible()
    inspect("start")
    page.get_by_label("Choose a file").set_input_files(
        {"name": EXAMPLE.name, "mimeType": "text/csv", "buffer": example()}
    )
    expect(page.get_by_role("heading", name="support_tickets")).to_be_visible()
    expect(page.get_by_role("table", name=re.compile("^Time it takes"))).to_be_visible(timeout=60_000)
    page.get_by_text("Options", exact=True).click()
    if not PICTURES:
        page.get_by_label("Epochs").fill("1")
    inspect("found")
    page.get_by_role("button", name="Compare prompting and fine-tuning").click()

    expect(page.get_by_role("img", name=re.compile("^Loss"))).to_be_visible(timeout=JOB_MS)
    if PICTURES:
        curve = re.compile(r"^Validation macro-F1\. [\d.]+ after epoch ([2-9]|\d\d)")
        expect(page.get_by_role("img", name=curve)).to_be_visible(timeout=JOB_MS)
    inspect("job")
    expect(page.get_by_text("succeeded").first).to_be_visible(timeout=JOB_MS)
    verdict = page.get_by_text(re.compile(r"right on [\d.]+\s% of \d+ test rows")).first
    expect(verdict).to_be_visible()
    said = verdict.inner_text()
    inspect("result")
    page.reload()
    expect(page.get_by_text(said).first).to_be_visible()
    with page.expect_download() as report:
        page.get_by_role("link", name=re.compile("^metrics.json")).click()
    assert '"schema_version": 1' in Path(report.value.path()).read_text("utf-8")

    page.get_by_role("navigation").get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    inspect("models")
    page.locator("main").get_by_role("link", name=re.compile("LoRA|version|lora", re.IGNORECASE)).first.click()
    page.get_by_label("Alias", exact=True).fill("tickets")
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_text("tickets points to this model now.")).to_be_visible()
    page.get_by_label("Text", exact=True).fill("where is my parcel? it should have been here on Monday")
    page.keyboard.press("Control+Enter")
    answers = page.get_by_role("list", name="Predictions")
    expect(answers).to_contain_text("delivery_delay", timeout=60_000)
    page.get_by_text("The same call for a program").click()
    inspect("model")

    page.get_by_role("navigation").get_by_role("link", name="Datasets").click()
    expect(page.locator("main").get_by_role("link", name="support_tickets", exact=True)).to_be_visible()
    inspect("datasets")
    page.locator("main").get_by_role("link", name="support_tickets", exact=True).click()
    expect(page.get_by_role("region", name="First rows")).to_be_visible()
    inspect("dataset")
    page.get_by_role("navigation").get_by_role("link", name="Jobs").click()
    expect(page.get_by_role("link", name="support_tickets").first).to_be_visible()
    inspect("jobs")

    page.get_by_role("navigation").get_by_role("link", name="Keys").click()
    page.get_by_label("Name", exact=True).fill("shop")
    page.get_by_role("button", name="Make the key").click()
    expect(page.get_by_text(re.compile("^tp_"))).to_be_visible()
    page.get_by_role("button", name="I have it").click()
    inspect("keys")
    page.get_by_role("button", name="Revoke shop").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("shop is revoked.")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
