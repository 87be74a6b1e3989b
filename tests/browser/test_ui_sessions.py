"""What a page keeps when its session ends, and where the keyboard stands after a dialog: on the real API."""

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Launch

pytestmark = pytest.mark.more
KEY = "a-key-of-sessions-of-at-least-32-characters"


@pytest.fixture(scope="module")
def url(launch: Launch) -> str:
    api = launch("service", "serve", BOOTSTRAP_KEY=KEY)
    api.start()
    api.wait_until_it_answers()
    return api.url


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.keyboard.press("Enter")


def test_a_session_that_ends_takes_nothing_from_the_page_and_a_dialog_gives_the_focus_back(
    browser: Browser, url: str
) -> None:
    page = browser.new_page()
    page.goto(f"{url}/ui/#/keys")
    heading, name = page.get_by_role("heading", name="Sign in"), page.get_by_label("Name", exact=True)
    sign_in(page, KEY)
    name.fill("shop")
    page.context.clear_cookies()
    page.get_by_role("button", name="Make the key").click()
    expect(heading).to_be_visible()
    sign_in(page, KEY)
    expect(heading).to_have_count(0)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(name).to_have_value("shop")
    page.get_by_role("button", name="Make the key").click()
    revoke = page.get_by_role("button", name="Revoke shop")
    revoke.click()
    page.get_by_role("button", name="Keep").click()
    expect(revoke).to_be_focused()
    page.close()


def test_a_file_dropped_as_the_session_ends_is_read_after_the_sign_in(browser: Browser, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}/ui/")
    sign_in(page, KEY)
    expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
    page.context.clear_cookies()
    rows = "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(60)).encode()
    file = {"name": "late.csv", "mimeType": "text/csv", "buffer": b"text,label\n" + rows}
    page.get_by_label("Choose a file").set_input_files(file)  # type: ignore[arg-type]
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    sign_in(page, KEY)
    expect(page.get_by_role("heading", name="late")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.close()


def test_what_was_refused_as_the_session_ended_is_asked_for_again_after_the_sign_in(browser: Browser, url: str) -> None:
    api = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"})
    rows = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(60))
    job = api.post("/jobs", files={"file": f"text,label\n{rows}".encode()}).raise_for_status().json()
    page = browser.new_page()
    page.goto(f"{url}/ui/#/keys")
    sign_in(page, KEY)
    expect(page.get_by_role("heading", name="All keys")).to_be_visible()  # or its own call would end the session
    for link, address in (("Models", "models"), ("Datasets", "datasets"), (None, f"job/{job['id']}")):
        expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
        page.context.clear_cookies()
        if link:
            page.get_by_role("link", name=link, exact=True).click()
        else:
            page.evaluate("hash => { location.hash = hash }", f"#/{address}")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        sign_in(page, KEY)
        expect(page.get_by_role("alert")).to_have_count(0)
        said = {"models": "None yet.", "datasets": "60 rows", f"job/{job['id']}": "queued"}[address]
        expect(page.get_by_text(said).first).to_be_visible()
    page.close()
    api.close()


def test_after_signing_out_nothing_of_the_page_is_left_for_a_wrong_key_or_a_lesser_one(
    browser: Browser, url: str
) -> None:
    given = {"name": "reader", "scope": "read"}
    reader = httpx.post(f"{url}/keys", json=given, headers={"Authorization": f"Bearer {KEY}"}).json()["key"]
    page = browser.new_page()
    page.goto(f"{url}/ui/#/keys")
    sign_in(page, KEY)
    expect(page.get_by_role("heading", name="All keys")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "wrong")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("heading")).to_have_text(["Sign in"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    sign_in(page, reader)
    expect(page.get_by_text("Only a key with the scope")).to_be_visible()
    assert f"{url}/session" in asked
    assert not [address for address in asked if address.startswith(f"{url}/keys")]
    page.close()


@pytest.mark.parametrize("address", ["nothing/%", "constructor"])
def test_an_address_that_nobody_wrote_is_a_page_that_says_so(browser: Browser, url: str, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}/ui/#/{address}")
    sign_in(page, KEY)
    expect(page.get_by_role("heading", name="No such page")).to_be_visible()
    page.close()
