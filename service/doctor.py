"""`tuneproof doctor`: looks at what the server needs and says what to do. An optional room; it changes nothing.

A database that nobody has open is read as a file that cannot change, so not even SQLite leaves one behind.
"""

import io
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import httpx
import psutil
import torch
from joblib import cpu_count
from packaging.requirements import Requirement
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from service.core.errors import AppError
from service.core.ids import new_token
from service.core.settings import APART, TOGETHER, GiB, Settings
from service.db import catalog
from service.db.engine import engine_of, revisions, with_driver
from service.ml.base_models import EMBEDDED, GPU_DEFAULT, allowed_models, locate
from service.ml.device import pick_device, training_precision
from service.storage import Storage

Level = Literal["ok", "note", "warn", "fail"]
_SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.glusterfs", "ceph")
_LITTLE_DISK, _LITTLE_MEMORY = 5 * GiB, 3 * GiB
_LEAST_SECRET = 16


@dataclass(frozen=True)
class Finding:
    """One line: `level`, what it is about, what was found, and what to do. A `note` is neither good nor bad."""

    level: Level
    about: str
    found: str
    todo: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything, one finding after the other; a check that breaks is itself a finding."""
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _data_folder, _libraries, _gpu, _cpu, _memory, _disk, _models, _database, _storage, _port, _serving, _endpoints
    )  # fmt: skip
    for check in checks:
        try:
            yield from check(settings)
        except Exception as error:  # noqa: BLE001 -- one part of the machine may be ill in any way
            about = check.__name__.strip("_")
            yield Finding("fail", about, f"cannot be looked at ({type(error).__name__})", "See docs/operations.md.")


def show(findings: Iterator[Finding], *, as_json: bool) -> int:
    """Prints them as they come. The exit status: 1 where something fails."""
    seen = []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            todo = f"\n{'':24}-> {finding.todo}" if finding.todo else ""
            sys.stdout.write(f"{finding.level:<6}{finding.about:<18}{finding.found}{todo}\n")
            sys.stdout.flush()
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in seen], indent=2) + "\n")
    return int(any(finding.level == "fail" for finding in seen))


def _data_folder(settings: Settings) -> Iterator[Finding]:
    """First, as all that follows depends on it: the default goes by the folder in which the command is run."""
    folder = settings.data_dir.absolute()
    if folder.is_dir():
        yield Finding("ok", "data folder", str(folder))
    elif folder.exists():
        yield Finding("fail", "data folder", f"{folder} is no folder", "Set TUNEPROOF_DATA_DIR to one.")
    else:
        todo = "Right before a first start. Else go to the folder you start the server in, or set TUNEPROOF_DATA_DIR."
        yield Finding("note", "data folder", f"{folder} is not there yet", todo)


def _libraries(settings: Settings) -> Iterator[Finding]:
    asked = {"remote": bool(settings.prompt_endpoints), "ray": "ray" in (settings.engine, settings.launcher)}
    extras = ("server", *(extra for extra, wanted in asked.items() if wanted))
    wrong = []
    for requirement in map(Requirement, requires("tuneproof") or ()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                found = "none"
            if found == "none" or not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} {found} (expected {requirement.specifier})")
    main = ", ".join(f"{name} {version(name)}" for name in ("tuneproof", "torch", "transformers", "peft"))
    if wrong:
        install = f"pip install 'tuneproof[{(named := ','.join(extras))}]', in a checkout '.[{named}]'"
        yield Finding("fail", "libraries", ", ".join(wrong), install)
    else:
        yield Finding("ok", "libraries", f"Python {platform.python_version()}, {main}")


def _gpu(_settings: Settings) -> Iterator[Finding]:
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("ok", "gpu", "none; jobs and predictions run on the CPU")
            return
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        todo = "Install the CUDA build of torch, or a driver that is new enough for it."
        yield Finding("warn", "gpu", f"there is one (driver {driver}), but torch, built {built}, cannot use it", todo)
        return
    for i in range(torch.cuda.device_count()):
        card, capability = torch.cuda.get_device_properties(i), torch.cuda.get_device_capability(i)
        has_bf16 = capability >= (8, 0)  # `is_bf16_supported` is true where it is emulated, too
        size = f"{card.total_memory / GiB:.0f} GiB"
        words = f"{card.name}, driver {driver}, {size}, capability {capability[0]}.{capability[1]}"
        todo = "" if has_bf16 else "Training takes bf16 all the same, emulated; predictions are made in fp32."
        known = "multiplies bf16" if has_bf16 else "does not multiply bf16 itself"
        yield Finding("ok" if has_bf16 else "warn", f"gpu {i}", f"{words}; {known}", todo)


def _nvidia_driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _cpu(settings: Settings) -> Iterator[Finding]:
    usable, there = cpu_count(), os.cpu_count()
    asks = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    fast = [name for name, ask in asks.items() if getattr(torch.cpu, ask, lambda: False)()]
    threads = settings.serve_threads or max(1, (os.cpu_count() or 2) // 2)
    words = f"{usable} of {there} cores may be used, {threads} threads serve; bf16 by {', '.join(fast) or 'nothing'}"
    trains = training_precision(torch.device("cpu"))
    if threads > usable:
        todo = f"Set TUNEPROOF_SERVE_THREADS to {usable} or less."
        yield Finding("warn", "cpu", f"{words}; more threads than cores slow each other down", todo)
    elif usable < 2:
        yield Finding("warn", "cpu", words, "Training and serving share one core; give it two or more.")
    else:
        yield Finding("ok", "cpu", f"{words}; training on the CPU takes {trains}")


def _memory(_settings: Settings) -> Iterator[Finding]:
    usable, free = memory_bytes(), psutil.virtual_memory().available
    words = f"{usable / GiB:.1f} GiB may be used, {min(free, usable) / GiB:.1f} of the machine are free"
    if usable < _LITTLE_MEMORY:
        yield Finding("warn", "memory", words, "API, engine and one job take about 3 GiB; give it more.")
    else:
        yield Finding("ok", "memory", words)


def memory_bytes() -> int:
    """The machine's, or less where a control group limits it."""
    total: int = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            said = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if said.isdigit():
            total = min(total, int(said))
    return total


def _disk(settings: Settings) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for about, folder in (("disk: data", settings.data_dir), ("disk: models", Path(HF_HUB_CACHE))):
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        words = f"{free / GiB:.1f} GiB free for {folder}"
        if about == "disk: data" and not os.access(there, os.W_OK):
            todo = "Give this user the folder, or set TUNEPROOF_DATA_DIR."
            yield Finding("fail", about, f"{there} cannot be written to", todo)
        elif about == "disk: data" and free < settings.min_free_bytes:
            todo = "Uploads and jobs are refused with 507. Free some space, or lower TUNEPROOF_MIN_FREE_BYTES."
            yield Finding("fail", about, words, todo)
        elif free < _LITTLE_DISK:
            yield Finding("warn", about, words, "That is soon used up: a base model takes 1 to 4 GiB.")
        else:
            yield Finding("ok", about, words)


def _existing(folder: Path) -> Path:
    """The folder, or what it would be made in."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _models(settings: Settings) -> Iterator[Finding]:
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        todo = "Make it, or correct TUNEPROOF_MODELS_DIR."
        yield Finding("fail", "models", f"TUNEPROOF_MODELS_DIR is no folder: {settings.models_dir}", todo)
    wanted = {EMBEDDED, GPU_DEFAULT} if torch.cuda.is_available() else {EMBEDDED}
    for base in allowed_models(settings.models_dir).values():
        try:
            located = locate(base, download=False)
        except AppError as error:
            if base.name in wanted or base.repo is None:
                level: Level = "warn" if base.name == GPU_DEFAULT else "fail"
                yield Finding(level, f"model {base.name}", error.detail, error.hint or "")
            else:
                todo = f"`tuneproof models pull {base.name}`, where a job is to name it"
                yield Finding("note", f"model {base.name}", "not at hand", todo)
        else:
            verified = ", weights verified" if base.name == EMBEDDED else ""
            yield Finding("ok", f"model {base.name}", f"{located.size_bytes / GiB:.2f} GiB at hand{verified}")


def _database(settings: Settings) -> Iterator[Finding]:
    try:
        url = with_driver(settings.resolved_database_url)
        engine = engine_of(settings.resolved_database_url)
    except RuntimeError as error:
        yield Finding("fail", "database", str(error), "Correct TUNEPROOF_DATABASE_URL, or install what it needs.")
        return
    shown, file = url.render_as_string(hide_password=True), Path(url.database or "")
    keys = False
    if url.get_backend_name() == "sqlite" and not file.exists():
        yield Finding("ok", "database", f"{file} is not there yet; the first start makes it")
    else:
        engine = _looking_at(file) if url.get_backend_name() == "sqlite" else engine
        try:
            with engine.connect() as connection, Session(connection) as session:
                if url.get_backend_name() == "sqlite":
                    yield from _sqlite_findings(file, str(connection.scalar(text("PRAGMA quick_check(1)"))))
                has, needs = revisions(connection)
                unknown = catalog.named_models(session, settings.preloaded)[1] if has == needs else []
                keys = has is not None and bool(connection.scalar(text("SELECT count(*) FROM api_keys")))
        except RuntimeError as error:
            yield Finding("fail", "database", str(error), "Correct TUNEPROOF_DATABASE_URL.")
        except Exception as error:  # noqa: BLE001 -- whatever the driver raises
            todo = "Is it running, and are the user and the password right? See TUNEPROOF_DATABASE_URL."
            yield Finding("fail", "database", f"{shown} cannot be read ({type(error).__name__})", todo)
        else:
            if has == needs:
                yield Finding("ok", "database", f"{shown} at revision {has}")
                todo = "Correct TUNEPROOF_PRELOAD, or point the alias to a model."
                yield from (Finding("warn", "preload", f"no model has the id or alias {n!r}", todo) for n in unknown)
            else:
                todo = "Run `tuneproof migrate`, or start the server; if a newer tuneproof wrote it, install that one."
                yield Finding("warn", "database", f"{shown} is at revision {has}; this version needs {needs}", todo)
        finally:
            engine.dispose()
    if settings.listens_beyond_loopback and not keys and not settings.bootstrap_secret:
        todo = "tuneproof keys create --name me --scope admin, or set TUNEPROOF_BOOTSTRAP_KEY."
        yield Finding("fail", "keys", f"no key exists, so it will refuse to listen on {settings.host}", todo)
    elif 0 < len(settings.bootstrap_secret) < _LEAST_SECRET:
        yield Finding("warn", "keys", "TUNEPROOF_BOOTSTRAP_KEY can be guessed", "Make one: openssl rand -base64 32")
    else:
        yield Finding("ok", "keys", "there are some" if keys else "none yet: whoever is on this machine may do all")


def _looking_at(file: Path) -> Engine:
    unchanging = "" if Path(f"{file}-wal").exists() else "&immutable=1"
    uri = f"file:{quote(str(file.absolute()))}?mode=ro{unchanging}"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True))


def _sqlite_findings(file: Path, health: str) -> Iterator[Finding]:
    if health != "ok":
        yield Finding("fail", "database", "SQLite says it is damaged", "Stop the server and restore a backup.")
    if not (os.access(file, os.W_OK) and os.access(file.absolute().parent, os.W_OK)):
        yield Finding("fail", "database", f"{file} cannot be written to", "Give this user the file and its folder.")
    kind = filesystem_of(file.absolute())
    if kind.startswith(_SHARED_FILESYSTEMS):
        todo = "SQLite's locks do not hold there. Move TUNEPROOF_DATA_DIR to a local disk, or use PostgreSQL."
        yield Finding("fail", "database", f"{file} lies on {kind}", todo)


def filesystem_of(path: Path) -> str:
    """Its type, such as `ext4` or `nfs4`; empty where that cannot be told."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _storage(settings: Settings) -> Iterator[Finding]:
    url = settings.resolved_storage_url
    if settings.storage_is_apart:
        yield Finding("warn", "storage: shared", APART, TOGETHER)
    scheme, _, folder = url.partition("://")
    if scheme == "file" and not Path(folder).is_dir():
        yield Finding("ok", "storage", f"{folder} is not there yet; the first upload makes it")
        return
    what, key = folder if scheme == "file" else f"{scheme}://…", f"doctor-{new_token()}"
    try:
        storage = Storage(url)
        try:
            storage.put(io.BytesIO(b"doctor"), key)
            read = b"".join(storage.chunks(key))
        finally:
            storage.delete(key)
    except Exception as error:  # noqa: BLE001 -- every driver has its own
        todo = "Is it there, may this user write and delete there, is its driver installed? See TUNEPROOF_STORAGE_URL."
        yield Finding("fail", "storage", f"{what} cannot be used ({type(error).__name__})", todo)
    else:
        if read == b"doctor":
            yield Finding("ok", "storage", f"{what} takes, gives and deletes")
        else:
            yield Finding("fail", "storage", f"{what} gives other bytes than it took", "Do not use it; check the disk.")


def _port(settings: Settings) -> Iterator[Finding]:
    host, port = settings.host, settings.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if _is_tuneproof(host, port):
            yield Finding("ok", "port", f"tuneproof answers on {host}, port {port}")
        else:
            todo = "Stop what listens there, or set TUNEPROOF_PORT or TUNEPROOF_HOST."
            yield Finding("fail", "port", f"cannot listen on {host}, port {port}: {error.strerror}", todo)
    else:
        yield Finding("ok", "port", f"{host}, port {port}, is free")


def _is_tuneproof(host: str, port: int) -> bool:
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- nothing is bound
    try:
        url = httpx.URL(scheme="http", host=near, port=port, path="/healthz")
        return bool(httpx.get(url, trust_env=False, timeout=3).json() == {"status": "ok"})
    except (httpx.HTTPError, ValueError):
        return False


def _serving(settings: Settings) -> Iterator[Finding]:
    if settings.engine == "ray":
        found = f"by replicas on Ray Serve, cluster {settings.ray_address}; not asked"
        yield Finding("note", "serving", found, "The API's /readyz tells whether they answer.")
        return
    try:
        device = pick_device(settings.serve_device)
    except RuntimeError:
        todo = "Use auto, cpu, cuda, cuda:1 or mps."
        yield Finding("fail", "serving", "TUNEPROOF_SERVE_DEVICE names no device", todo)
        return
    gpus, wish = torch.cuda.device_count(), settings.serve_memory_bytes
    if device.type == "cuda" and (device.index or 0) >= gpus:
        todo = "Set TUNEPROOF_SERVE_DEVICE to auto or cpu, or give this process the GPU."
        yield Finding("fail", "serving", f"TUNEPROOF_SERVE_DEVICE is {device}, and {gpus} GPUs are usable", todo)
        return
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    words = f"base models may take {wish / GiB:.1f} of {there / GiB:.1f} GiB on {device}"
    if wish > there:
        yield Finding("warn", "serving", words, "Lower TUNEPROOF_SERVE_MEMORY_BYTES, and leave training its part.")
    else:
        yield Finding("ok", "serving", words)


def _endpoints(settings: Settings) -> Iterator[Finding]:
    for name, endpoint in settings.prompt_endpoints.items():
        if endpoint.api_key_env is not None and endpoint.api_key() is None:
            todo = "Only workers need it; set it where they start."
            yield Finding("warn", f"endpoint {name}", f"{endpoint.api_key_env} is not set in this shell", todo)
        else:
            yield Finding("ok", f"endpoint {name}", f"{endpoint.model} at {endpoint.host}; not called")
