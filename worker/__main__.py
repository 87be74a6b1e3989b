"""`python -P -m worker`: one worker, until SIGTERM or Ctrl-C."""

import logging
import signal
import sys
from pathlib import Path

from service.core import logs
from service.core.errors import StorageUnavailable
from service.core.settings import Settings, settings_in_use
from service.db.engine import migrate
from worker.launch import Child, Launcher, LocalChild, LocalTeam, processes_for
from worker.supervisor import Supervisor


def main() -> int:
    try:
        settings = settings_in_use()
        logs.configure(settings.log_level, settings.log_format)
        migrate(settings.resolved_database_url)
        supervisor = _supervisor(settings)
    except (RuntimeError, ConnectionError) as error:  # settings that cannot work, or a database newer than this code
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: supervisor.stop.set())
    supervisor.run()
    return 0


def _supervisor(settings: Settings) -> Supervisor:
    """Raises RuntimeError where the storage cannot be used from here: one job after the other would be lost by that."""
    supervisor = Supervisor(settings, _launcher(settings))
    try:
        supervisor.storage.probe()
    except StorageUnavailable as error:
        logging.getLogger("tuneproof.worker").warning("%s", error)  # it is waited for
    except OSError as error:
        raise RuntimeError(f"TUNEPROOF_STORAGE_URL cannot be used: {error}") from error
    return supervisor


def _launcher(settings: Settings) -> Launcher:
    """Where attempts run. Raises ConnectionError, and RuntimeError where Ray is not installed."""
    if settings.launcher == "ray":
        try:
            from worker.cluster.launch import launcher_on
            from worker.cluster.nodes import Cluster
        except ImportError as error:
            raise RuntimeError("TUNEPROOF_LAUNCHER=ray needs Ray: pip install 'tuneproof[ray]'") from error
        asked = settings.ray_address, settings.ray_cpus, settings.ray_gpus, settings.bulk_actors
        return launcher_on(Cluster(*asked), settings.processes_per_job)

    def launch(folder: Path) -> Child:
        n = processes_for(folder, settings.processes_per_job)
        return LocalTeam(folder, n) if n > 1 else LocalChild(folder)

    return launch


if __name__ == "__main__":
    sys.exit(main())
