"""The nginx configuration of the docs, in front of the real API, with TLS."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.documents import blocks
from tests.integration.conftest import listening, make_app
from tests.waiting import until
from tuneproof.demo import free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [pytest.mark.more, pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")]
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("proxy")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    port, app = free_port(), make_app(folder / "data")
    with listening(app) as url:
        (server,) = (block.text for block in blocks("docs/production.md") if block.language == "nginx")
        for told, here in {
            "listen 443": f"listen 127.0.0.1:{port}",
            "/etc/ssl/tuneproof/fullchain.pem": str(certificate),
            "/etc/ssl/tuneproof/privkey.pem": str(key),
            "http://127.0.0.1:8000": url,
            "client_max_body_size 2g": f"client_max_body_size {LIMIT}",
            "client_body_timeout 30s": "client_body_timeout 1s",
            "client_header_timeout 10s": "client_header_timeout 1s",
        }.items():
            assert told in server
            server = server.replace(told, here)
        own = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(f"user root;\nevents {{}}\nhttp {{ access_log off; {own}\n{server}}}\n")
        words = [str(NGINX), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        process = subprocess.Popen([*words, "-g", f"daemon off; pid {folder}/pid;"], stderr=subprocess.PIPE)
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusted, timeout=30) as client:
            until(lambda: process.poll() is not None or answers(client), 20, "nginx answers")
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield client
        process.terminate()
        process.wait(20)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.TransportError:
        return False


def table(n_bytes: int) -> bytes:
    rows = "".join(f"text number {i} of a label,{'ab'[i % 2]}\n" for i in range(n_bytes // 30))
    return ("text,label\n" + rows).encode()


def test_a_file_larger_than_nginx_takes_by_itself_passes(proxied: httpx.Client) -> None:
    content = table(2_000_000)
    assert len(content) > 1 << 20
    answer = proxied.post("/datasets", files={"file": ("t.csv", content)})
    assert answer.status_code == 201, answer.text
    assert answer.json()["size_bytes"] == len(content)


def test_a_file_that_is_too_large_is_refused_at_once(proxied: httpx.Client) -> None:
    answer = proxied.post("/datasets", files={"file": ("t.csv", table(2 * LIMIT))})
    assert answer.status_code == 413


def test_the_service_sees_the_name_that_was_asked_for(proxied: httpx.Client) -> None:
    origin = str(proxied.base_url).rstrip("/")
    assert proxied.get("/readyz", headers={"Origin": origin}).json().get("checks"), "no page of another site"


@pytest.mark.parametrize(
    "sent", [b"POST /datasets HT", b"POST /datasets HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\nhalf"]
)
def test_who_sends_too_slowly_is_cut_off_and_takes_no_place_meanwhile(proxied: httpx.Client, sent: bytes) -> None:
    unchecked = ssl._create_unverified_context()
    address = ("127.0.0.1", proxied.base_url.port)
    with socket.create_connection(address, timeout=20) as plain, unchecked.wrap_socket(plain) as slow:
        slow.sendall(sent)
        assert proxied.get("/healthz").json() == {"status": "ok"}
        assert b" 408 " in slow.recv(1000) or slow.recv(1000) == b""
    requests = proxied.get("/metrics").text
    assert 'route="/datasets",status="4' not in requests  # the service was asked nothing by them
