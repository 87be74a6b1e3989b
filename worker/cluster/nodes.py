"""The cluster itself, and what is asked of it."""

import signal
import socket
import threading
from dataclasses import dataclass

import ray

_REACHING_SECONDS = 5.0


@dataclass(frozen=True)
class Cluster:
    """Where, and what each process or actor is given there."""

    address: str
    cpus: float
    gpus: float
    bulk_actors: int

    def connect(self) -> None:
        """Raises ConnectionError."""
        try:
            host, _, port = self.address.rpartition(":")
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), _REACHING_SECONDS).close()
            kept = signal.getsignal(signal.SIGTERM)
            ray.init(self.address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, kept)  # Ray puts its own in its place, which ends the process at once
        except (OSError, RuntimeError, ValueError) as error:
            todo = "Is its head running, and this machine a part of it (`ray start`)?"
            raise ConnectionError(
                f"TUNEPROOF_RAY_ADDRESS: no Ray cluster answers at {self.address!r}. {todo}"
            ) from error
