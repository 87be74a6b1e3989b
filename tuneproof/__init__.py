"""The client and the command that users install. Imports nothing of the service or the worker."""

from tuneproof.client import Client, TuneproofError

__all__ = ["Client", "TuneproofError"]
