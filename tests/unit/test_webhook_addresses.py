"""Which addresses a job may call: the operator's list, read by the library that calls."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.core.errors import InvalidInput
from service.core.settings import Settings, read_settings
from service.core.webhooks import parse_origins, refuse_webhook

SECRET = "whsec_" + "c2VjcmV0" * 5
LISTED = "hooks.example.com, *.example.org,https://alt.example.com:8443, http://10.0.0.5:9000,http://[::1]:7"


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/x?token=1",
        "https://hooks.example.com:443/",
        "HTTPS://Hooks.Example.COM",
        "https://a.example.org/",
        "https://a.b.example.org/",
        "https://alt.example.com:8443/x",
        "http://10.0.0.5:9000/",
        "http://[::1]:7/",
    ],
)
def test_what_the_operator_listed_may_be_called(url: str) -> None:
    refuse_webhook(url, parse_origins(LISTED))


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",  # listed for https
        "https://xn--a.example.org/",  # looks encoded, and cannot be decoded
        "http://hooks.example.com:443/",
        "https://hooks.example.com:8443/",
        "https://hooks.example.com./",
        "https://example.org/",  # *. takes what is below alone
        "https://notexample.org/",
        "https://example.org.evil.com/",
        "https://hooks.example.com.evil.com/",
        "https://hooks.example.com%2eevil.com/",
        "https://hooks.example.com\\@evil.com/",
        "https://hooks.example.com@evil.com/",
        "https://me:canary@hooks.example.com/",
        "https://@alt.example.com/",
        "https://alt.example.com/",
        "http://10.0.0.5/",
        "http://127.0.0.1:9000/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.5]:9000/",
        "http://0xa000005:9000/",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "//hooks.example.com/",
        "hooks.example.com",
        "https://",
        "https:///hooks.example.com",
        "https://hooks.example.com:99999999/",
        "https://hooks.example.com/\n",
        "\x00",
    ],
)
def test_nothing_else_may_and_the_refusal_does_not_repeat_the_address(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        refuse_webhook(url, parse_origins(LISTED))
    assert "canary" not in refused.value.detail
    assert refused.value.errors[0]["loc"] == ["webhook_url"]


def test_without_a_list_nothing_may_be_called_and_it_is_said_who_can_change_that() -> None:
    with pytest.raises(InvalidInput, match=r"none.*TUNEPROOF_WEBHOOK_HOSTS"):
        refuse_webhook("https://hooks.example.com/", parse_origins(" , "))


@pytest.mark.parametrize(
    "given",
    [
        {"webhook_hosts": "https://hooks.example.com/path"},
        {"webhook_hosts": "*"},
        {"webhook_hosts": "*.*.com"},
        {"webhook_hosts": "a b"},
        {"webhook_hosts": "ftp://a"},
        {"webhook_hosts": "bücher.de"},
        {"webhook_hosts": "a.com", "webhook_secret": None},
        {"webhook_secret": "canary"},
        {"webhook_secret": "whsec_canary"},
        {"webhook_secret": "whsec_" + "Y2FuYXJ5"},
        {"webhook_secret": SECRET.removeprefix("whsec_")},
    ],
)
def test_settings_that_cannot_work_are_refused_without_the_secret(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**{"webhook_secret": SECRET} | given)
    with pytest.raises(RuntimeError) as told:
        read_settings(**{"webhook_secret": SECRET} | given)
    assert "canary" not in str(told.value)


def test_the_secret_is_in_no_print_of_the_settings() -> None:
    assert "c2VjcmV0" not in repr(Settings(webhook_hosts="a.com", webhook_secret=SECRET))
