"""The report as a browser shows it."""

import pytest

from tests.unit.test_report import USUAL, job
from worker.report import render

pytestmark = pytest.mark.more


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1600, "light")])
def test_the_report_asks_for_nothing_complains_of_nothing_and_fits_the_window(browser, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(render(*job(USUAL)), encoding="utf-8")
    requests, complaints = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture = page.get_by_role("img", name="Accuracy of every method")
    assert picture.bounding_box()["width"] > 200
    ink = picture.locator("text").first.evaluate("node => getComputedStyle(node).fill")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ink != paper
    page.close()
