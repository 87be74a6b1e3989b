"""The client and the command that users install. Imports nothing of the service or the worker."""

from tuneproof.aio.client import AsyncClient
from tuneproof.errors import JobFailed, TuneproofError, WaitTimeout
from tuneproof.results import Answer, Dataset, Event, Job, Model, Prediction
from tuneproof.sync.client import Client

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Dataset",
    "Event",
    "Job",
    "JobFailed",
    "Model",
    "Prediction",
    "TuneproofError",
    "WaitTimeout",
]
