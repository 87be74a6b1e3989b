"""What a page keeps when its session ends, and where the keyboard stands after a dialog: on the real API."""

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import Launch

pytestmark = pytest.mark.more
KEY = "a-key-of-sessions-of-at-least-32-characters"


@pytest.fixture(scope="module")
def url(launch: Launch) -> str:
    api = launch("service", "serve", BOOTSTRAP_KEY=KEY)
    api.start()
    api.wait_until_it_answers()
    return api.url


def test_a_session_that_ends_takes_nothing_from_the_page_and_a_dialog_gives_the_focus_back(
    browser: Browser, url: str
) -> None:
    page = browser.new_page()
    page.goto(f"{url}/ui/#/keys")
    sign_in, name = page.get_by_role("heading", name="Sign in"), page.get_by_label("Name", exact=True)
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    name.fill("shop")
    page.context.clear_cookies()
    page.get_by_role("button", name="Make the key").click()
    expect(sign_in).to_be_visible()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(sign_in).to_have_count(0)
    expect(name).to_have_value("shop")
    page.get_by_role("button", name="Make the key").click()
    revoke = page.get_by_role("button", name="Revoke shop")
    revoke.click()
    page.get_by_role("button", name="Keep").click()
    expect(revoke).to_be_focused()
    page.close()


def test_an_address_that_nobody_wrote_is_a_page_that_says_so(browser: Browser, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}/ui/#/nothing/%")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="No such page")).to_be_visible()
    page.close()
