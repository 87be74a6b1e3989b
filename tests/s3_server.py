"""A server that speaks S3's protocol, on a free port of this machine: moto's."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server() -> Iterator[str]:
    """Its URL; meanwhile it is the endpoint of every S3 client that this process and its children make."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with mock.patch.dict(os.environ, given):
        yield given["AWS_ENDPOINT_URL_S3"]
    server.stop()


def make_bucket(name: str) -> str:
    boto3.client("s3").create_bucket(Bucket=name)
    return name
