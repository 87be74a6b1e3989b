"""`python -P -m service serve | migrate | keys | pull | merge | doctor`: what the `tuneproof` command starts."""

import argparse
import json
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from service.core import logs
from service.core.clock import utc_now
from service.core.errors import AppError
from service.core.settings import read_settings, settings_in_use
from service.db import catalog
from service.db.engine import Database, alembic_config, migrate
from service.db.models import ApiKey
from service.ml.base_models import find_base, pull


def main(arguments: list[str] | None = None) -> int:
    """Gives the exit status."""
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
    except AppError as error:
        print(*filter(None, (error.detail, error.hint)), sep="\n", file=sys.stderr)  # noqa: T201
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return status


def serve(given: argparse.Namespace) -> int:
    """Runs the API; refuses to listen beyond loopback as long as anybody could walk in."""
    from service import server
    from service.main import create_app

    asked = {name: value for name, value in (("host", given.host), ("port", given.port)) if value is not None}
    settings = settings_in_use(**asked)
    logs.configure(settings.log_level, settings.log_format)
    migrate(settings.resolved_database_url)
    if settings.listens_beyond_loopback and not settings.bootstrap_secret:
        db = Database(settings.resolved_database_url)
        open_to_all = not catalog.any_key_ever(db)
        db.close()
        if open_to_all:
            raise RuntimeError(
                f"Refusing to listen on {settings.host}: no API key exists, so anybody could read your data. Make one "
                "with `tuneproof keys create --name me --scope admin`, or set TUNEPROOF_BOOTSTRAP_KEY."
            )
    _refuse_taken_port(settings.host, settings.port)
    server.run(
        create_app(settings), host=settings.host, port=settings.port, log_config=None, access_log=False,
        timeout_graceful_shutdown=25, server_header=False,
    )  # fmt: skip
    return 0


def _refuse_taken_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise RuntimeError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Stop what listens there, or choose another port "
            "with --port or TUNEPROOF_PORT."
        ) from error


def migrate_database(given: argparse.Namespace) -> int:
    """Brings the database up to date, or checks that the migrations make what the models say."""
    from alembic import command
    from alembic.util import CommandError

    if given.check:
        with tempfile.TemporaryDirectory() as folder:
            url = given.url or f"sqlite:///{folder}/empty.db"
            try:
                migrate(url)
                command.check(alembic_config(url))
            except CommandError as error:
                print(error, file=sys.stderr)  # noqa: T201
                return 1
        return 0
    migrate(settings_in_use().resolved_database_url)
    return 0


def doctor(given: argparse.Namespace) -> int:
    """Looks at everything the server needs, and changes nothing."""
    from service.doctor import Finding, examine, show

    try:
        settings = read_settings()
    except RuntimeError as error:
        todo = "Correct these variables; the README lists all settings."
        return show(iter([Finding("fail", "settings", str(error), todo)]), as_json=given.as_json)
    return show(examine(settings), as_json=given.as_json)


def create_key(given: argparse.Namespace) -> int:
    db, now = _database(), utc_now()
    expires_at = None if given.expires_days is None else now + timedelta(days=given.expires_days)
    with db.write() as session:
        key, secret = catalog.create_key(session, given.name, given.scope, now, expires_at)
    if given.as_json:
        print(json.dumps(_shown(key) | {"key": secret}, indent=2))  # noqa: T201
        return 0
    print(secret)  # noqa: T201
    print(f"{key.id} ({key.scope}): the line above is the key; it is not shown again.", file=sys.stderr)  # noqa: T201
    return 0


def list_keys(given: argparse.Namespace) -> int:
    with _database().read() as session:
        if given.as_json:
            print(json.dumps([_shown(key) for key in catalog.list_keys(session)], indent=2))  # noqa: T201
            return 0
        for key in catalog.list_keys(session):
            state = "revoked" if key.revoked_at else f"expires {key.expires_at:%Y-%m-%d}" if key.expires_at else "live"
            print(f"{key.id}  {key.scope:8}{key.created_at:%Y-%m-%d}  {state:20}{key.name}")  # noqa: T201
    return 0


def _shown(key: ApiKey) -> dict[str, Any]:
    """As an entry of `GET /keys`."""
    from service.api.schemas import KeyOut

    return KeyOut.model_validate(key).model_dump(mode="json")


def revoke_key(given: argparse.Namespace) -> int:
    with _database().write() as session:
        catalog.revoke_key(session, given.key_id, utc_now())
    return 0


def pull_model(given: argparse.Namespace) -> int:
    """Fetches a base model into the hub's cache, with a progress bar, and checks what came."""
    base = find_base(given.name, read_settings().models_dir)
    located = pull(base)
    where = f"{base.repo} at {base.revision[:12]}, hashes verified" if base.repo else "needs no download"
    print(f"{base.name}: {where}; {located.size_bytes / 1e9:.2f} GB in {located.folder}")  # noqa: T201
    return 0


def merge_model(given: argparse.Namespace) -> int:
    """Makes one stock model of a published adapter and its base."""
    from service.ml.merge import merge

    merge(given.folder, given.out, read_settings().models_dir)
    return 0


def _database() -> Database:
    """Brought up to date; named on standard error, as the default goes by the folder in which the command is run."""
    settings = settings_in_use()
    url = settings.resolved_database_url
    where = make_url(url).render_as_string() if settings.database_url else settings.data_dir.absolute()
    print(f"Keys of the server with its data in {where}:", file=sys.stderr)  # noqa: T201
    migrate(url)
    return Database(url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("serve")
    verb.add_argument("--host")
    verb.add_argument("--port", type=int)
    verb.set_defaults(run=serve)
    verb = verbs.add_parser("migrate")
    verb.add_argument("--check", action="store_true", help="fail where migrations and models differ")
    verb.add_argument("--url", help="database for --check; an empty one by default")
    verb.set_defaults(run=migrate_database)
    keys = verbs.add_parser("keys").add_subparsers(required=True)
    verb = keys.add_parser("create")
    verb.add_argument("--name", required=True)
    verb.add_argument("--scope", required=True, choices=catalog.SCOPES)
    verb.add_argument("--expires-days", type=float)
    verb.add_argument("--json", dest="as_json", action="store_true")
    verb.set_defaults(run=create_key)
    verb = keys.add_parser("list")
    verb.add_argument("--json", dest="as_json", action="store_true")
    verb.set_defaults(run=list_keys)
    verb = keys.add_parser("revoke")
    verb.add_argument("key_id")
    verb.set_defaults(run=revoke_key)
    verb = verbs.add_parser("doctor")
    verb.add_argument("--json", action="store_true", dest="as_json")
    verb.set_defaults(run=doctor)
    verb = verbs.add_parser("pull")
    verb.add_argument("name")
    verb.set_defaults(run=pull_model)
    verb = verbs.add_parser("merge")
    verb.add_argument("folder", type=Path)
    verb.add_argument("out", type=Path)
    verb.set_defaults(run=merge_model)
    return parser


if __name__ == "__main__":
    sys.exit(main())
