"""What every test may ask for. No test reaches a network or a model hub."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports them: the hub client reads its mode once, and the rest would print and warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: `TUNEPROOF_SHARED_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("TUNEPROOF_SHARED_DATA") or _BESIDE)
    if not folder.is_dir():
        pytest.skip("no real data: ../shared/data is not there, and TUNEPROOF_SHARED_DATA names no folder")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `TUNEPROOF_MODELS_DIR` with every model of `tests.tiny`. Read it, never write to it."""
    import torch
    from threadpoolctl import threadpool_limits
    from transformers.utils import logging

    from tests.tiny import build_all

    # In this process alone: a second thread costs these models more than it gives.
    torch.set_num_threads(1)
    threadpool_limits(1)
    logging.disable_progress_bar()
    return build_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An empty bucket of a server that speaks S3's protocol; the environment names it to this process's clients."""
    from tests.s3_server import make_bucket, s3_server

    with s3_server():
        yield make_bucket("tuneproof-tests")
