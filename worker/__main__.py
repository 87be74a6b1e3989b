"""`python -P -m worker`: one worker, until SIGTERM or Ctrl-C."""

import signal
import sys

from service.core import logs
from service.core.settings import settings_in_use
from service.db.engine import migrate
from worker.supervisor import Supervisor


def main() -> int:
    try:
        settings = settings_in_use()
        logs.configure(settings.log_level, settings.log_format)
        migrate(settings.resolved_database_url)
    except RuntimeError as error:  # settings that cannot work, or a database newer than this code
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    supervisor = Supervisor(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: supervisor.stop.set())
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
