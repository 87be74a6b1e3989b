"""Which addresses a webhook may be sent to: those whose host the operator has listed, by name."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from service.core.errors import InvalidInput

_ENTRY = re.compile(r"(?:(https?)://)?(\*\.)?([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"https": 443, "http": 80}
_SECRET_PREFIX = "whsec_"  # noqa: S105 -- what every such secret begins with


@dataclass(frozen=True)
class Origin:
    """One entry of the operator's list: `[http[s]://]host[:port]`; `*.host` takes the names below it, not itself.

    Without a scheme it is https, without a port the scheme's own.
    """

    scheme: str
    host: str
    port: int
    below: bool

    def takes(self, url: httpx.URL) -> bool:
        host = url.raw_host.decode("ascii")
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and (url.scheme, url.port or _PORTS[self.scheme]) == (self.scheme, self.port)


def parse_origins(listed: str) -> tuple[Origin, ...]:
    """The entries of a comma-separated list. Raises ValueError."""
    origins = []
    for entry in filter(None, (part.strip().lower() for part in listed.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is no host; expected entries such as hooks.example.com or *.example.com")
        scheme, below, host, port = match.groups()
        scheme = scheme or "https"
        origins.append(Origin(scheme, host.strip("[]"), int(port or _PORTS[scheme]), below is not None))
    return tuple(origins)


def refuse_webhook(url: str, allowed: Sequence[Origin]) -> None:
    """Raises InvalidInput for an address that nothing is to be sent to; it is not repeated, as it may hold a secret.

    The address is read by the library that will call it: two readers may see two hosts in one address.
    """
    try:
        parsed = httpx.URL(url)
        _ = parsed.host  # decoded at the call, and not every name that looks encoded can be
    except (httpx.InvalidURL, ValueError):
        raise _refused("webhook_url is no address. Expected one such as https://hooks.example.com/path.") from None
    if parsed.userinfo:
        raise _refused("webhook_url holds a user or a password. Leave them out; calls are signed instead.")
    if not any(origin.takes(parsed) for origin in allowed):
        listed = ", ".join(_shown(origin) for origin in allowed)
        raise _refused(
            f"webhook_url leads to a host that is not allowed here. Allowed are: {listed or 'none'}. The operator "
            "allows one in TUNEPROOF_WEBHOOK_HOSTS."
        )


def host_of(url: str) -> str:
    """What may be shown of an address."""
    return httpx.URL(url).raw_host.decode("ascii")


def check_secret(secret: str) -> None:
    """Raises ValueError for one that is not as Standard Webhooks wants it; it is not repeated."""
    try:
        size = len(base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True))
    except binascii.Error:
        size = 0
    if not secret.startswith(_SECRET_PREFIX) or not 24 <= size <= 64:
        raise ValueError(
            f"expected {_SECRET_PREFIX} and 24 to 64 random bytes in base64; make one with: "
            f'echo "{_SECRET_PREFIX}$(openssl rand -base64 32)"'
        )


def _shown(origin: Origin) -> str:
    port = "" if origin.port == _PORTS[origin.scheme] else f":{origin.port}"
    return f"{origin.scheme}://{'*.' * origin.below}{origin.host}{port}"


def _refused(detail: str) -> InvalidInput:
    return InvalidInput(detail, errors=[{"loc": ["webhook_url"], "message": "not allowed"}])
