"""Every setting of the service and the worker, from `TUNEPROOF_*` variables."""

import ipaddress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from service.core.endpoints import Endpoint, EndpointName
from service.core.logs import LogFormat
from service.core.webhooks import Origin, check_secret, parse_origins

MiB = 1 << 20
GiB = 1 << 30


class Settings(BaseSettings):
    """Built once where a process starts, then handed down. Nobody else reads the environment."""

    model_config = SettingsConfigDict(env_prefix="TUNEPROOF_", frozen=True, extra="ignore", hide_input_in_errors=True)

    data_dir: Annotated[Path, Field(description="Folder of the database, the artifacts and the workers' scratch.")] = (
        Path("data")
    )
    database_url: Annotated[str, Field(description="SQLAlchemy URL; empty means SQLite in the data folder.")] = ""
    database_connections: Annotated[
        int, Field(ge=2, description="Most connections to the database that one process opens.")
    ] = 15
    storage_url: Annotated[str, Field(description="fsspec URL of the artifacts; empty means a folder in data.")] = ""
    models_dir: Annotated[
        Path | None,
        Field(description="Folder whose subfolders (`config.json` and safetensors) are allowed base models."),
    ] = None
    prompt_endpoints: Annotated[
        dict[EndpointName, Endpoint],
        Field(description="Remote models that jobs may prompt, as JSON: `{NAME: {base_url, model, …}}`."),
    ] = {}
    host: Annotated[str, Field(description="Address the API listens on; beyond loopback it needs a key.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port the API listens on; 0 takes a free one.")] = 8000
    bootstrap_key: Annotated[
        SecretStr | None,
        Field(description="A first admin key, stored (hashed) at start where no key exists; for containers."),
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="What is logged.")] = "info"
    log_format: Annotated[
        LogFormat, Field(description="How: `text`, or `json`, one object a line with the ids of request and job.")
    ] = "text"

    webhook_hosts: Annotated[
        str,
        Field(
            description="Hosts that jobs may call at their end, comma-separated: `hooks.example.com` (https), "
            "`*.example.com`, `http://10.0.0.5:9000`; empty turns webhooks off."
        ),
    ] = ""
    webhook_secret: Annotated[
        SecretStr | None,
        Field(description="Signs webhooks, as Standard Webhooks does: `whsec_` and 24 to 64 random bytes in base64."),
    ] = None

    max_upload_bytes: Annotated[int, Field(ge=1, description="Largest upload.")] = 2 * GiB
    max_labels: Annotated[int, Field(ge=2, description="Most labels a dataset may have.")] = 1000
    min_free_bytes: Annotated[int, Field(ge=0, description="Uploads and jobs are refused below this free space.")] = (
        512 * MiB
    )

    max_uploads: Annotated[
        int, Field(ge=1, description="Uploads one API process takes in at once; the next is answered 429.")
    ] = 32
    max_queued_jobs: Annotated[
        int, Field(ge=1, description="Jobs that may wait for a worker; a further one is answered 429.")
    ] = 1000
    rate_limit: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Calls a second, over ten, that a key may make of one API process before 429; 0 is no limit.",
        ),
    ] = 0.0
    retention_days: Annotated[
        float,
        Field(
            ge=0,
            le=36_500,
            allow_inf_nan=False,
            description="Datasets older than this are deleted with every text of their jobs; 0 keeps them.",
        ),
    ] = 0.0

    lease_seconds: Annotated[float, Field(ge=2, description="How long a silent worker keeps its job.")] = 60.0
    checkpoint_seconds: Annotated[
        float, Field(gt=0, description="How much training at most is done again where a worker was lost.")
    ] = 60.0
    max_attempts: Annotated[int, Field(ge=1, description="Lost attempts after which a job is `worker_lost`.")] = 3
    silence_seconds: Annotated[
        float, Field(gt=0, description="A job's process that says nothing for so long has hung; its attempt is lost.")
    ] = 3600.0
    poll_seconds: Annotated[float, Field(gt=0, le=60, description="How often an idle worker asks for work.")] = 1.0
    launcher: Annotated[
        Literal["local", "ray"], Field(description="Where a job's process runs: on this machine, or on a Ray cluster.")
    ] = "local"
    processes_per_job: Annotated[
        int, Field(ge=1, le=64, description="Processes that train one model together, with a GPU each where there are.")
    ] = 1
    ray_address: Annotated[
        str, Field(description="Of the cluster: `auto` is the one this machine is part of, else `HOST:PORT`.")
    ] = "auto"
    ray_cpus: Annotated[float, Field(gt=0, description="Cores that Ray sets aside for a process or an actor.")] = 1.0
    ray_gpus: Annotated[float, Field(ge=0, description="GPUs, likewise; 0 for a cluster that has none.")] = 1.0
    bulk_actors: Annotated[
        int, Field(ge=1, description="With `ray`, most actors that label one file, each with an engine.")
    ] = 1
    delete_grace_seconds: Annotated[
        float, Field(ge=0, description="How long the bytes of something deleted stay for readers still at them.")
    ] = 60.0

    engine: Annotated[
        Literal["local", "ray"], Field(description="Where predictions run: beside each API, or in Ray Serve.")
    ] = "local"
    serve_replicas: Annotated[int, Field(ge=1, description="With `ray`, how many replicas, each with an engine.")] = 1
    serve_device: Annotated[
        str, Field(description="Where predictions run: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")
    ] = "auto"
    serve_dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="Precision of served base weights; `auto` is bf16 where that is faster, else fp32."),
    ] = "auto"
    serve_memory_bytes: Annotated[
        int, Field(ge=1, description="Memory for served base models; the least recently used makes room.")
    ] = 8 * GiB
    adapter_cache_bytes: Annotated[int, Field(ge=1, description="Memory for adapters kept beside the bases.")] = 1 * GiB
    serve_threads: Annotated[
        int, Field(ge=0, description="CPU threads of the engine; 0 takes half of the cores, so training keeps some.")
    ] = 0
    predict_max_texts: Annotated[int, Field(ge=1, description="Most texts in one call of `/predict`.")] = 1024
    predict_max_chars: Annotated[int, Field(ge=1, description="Longest text in `/predict`, in characters.")] = 100_000
    predict_body_bytes: Annotated[
        int,
        Field(ge=1, description="Largest body of `/predict`, and most bytes of all that one process is answering."),
    ] = 128 * MiB
    predict_queue_tokens: Annotated[
        int, Field(ge=1, description="Tokens that may wait for the engine before `/predict` answers 429.")
    ] = 1 << 18
    predict_timeout_seconds: Annotated[float, Field(gt=0, description="After this `/predict` answers 504.")] = 60.0

    preload: Annotated[
        str, Field(description="Aliases and model ids whose adapters are loaded at start, comma-separated.")
    ] = ""

    max_event_streams: Annotated[
        int,
        Field(ge=1, description="Event streams and long polls one API process holds; the next is answered 503."),
    ] = 100

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> "Settings":
        listed = self.webhook_origins
        if self.webhook_secret is not None:
            check_secret(self.webhook_secret.get_secret_value())
        elif listed:
            raise ValueError(
                "TUNEPROOF_WEBHOOK_HOSTS needs TUNEPROOF_WEBHOOK_SECRET: whoever is called must be able to tell that "
                'it was this service. Make one with: echo "whsec_$(openssl rand -base64 32)"'
            )
        return self

    @property
    def webhook_origins(self) -> tuple[Origin, ...]:
        return parse_origins(self.webhook_hosts)

    @property
    def preloaded(self) -> list[str]:
        return [name for name in map(str.strip, self.preload.split(",")) if name]

    @property
    def bootstrap_secret(self) -> str:
        """The first key that was given, or the empty string."""
        return self.bootstrap_key.get_secret_value().strip() if self.bootstrap_key else ""

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'tuneproof.db'}"

    @property
    def resolved_storage_url(self) -> str:
        return self.storage_url or f"file://{self.data_dir.absolute() / 'storage'}"

    @property
    def storage_is_apart(self) -> bool:
        """Whether others on the same database would look for the files elsewhere, in data folders of their own."""
        return self.database_url.startswith("postgres") and not self.storage_url

    @property
    def listens_beyond_loopback(self) -> bool:
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True


APART = "the database is a server, and files lie in the data folder, where processes with another one do not find them"
TOGETHER = "Set TUNEPROOF_STORAGE_URL to the same bucket or folder for all; docs/several-machines.md."


def read_settings(**given: Any) -> Settings:
    """The settings in force. Raises RuntimeError: names what is wrong with each, and none of their values."""
    try:
        return Settings(**given)
    except ValidationError as error:
        found = [f"{_variable(entry['loc'])}{entry['msg']}" for entry in error.errors()]
    except SettingsError as error:
        found = [f"{error}: expected JSON"]
    raise RuntimeError("Settings (TUNEPROOF_* variables) that cannot work:\n  " + "\n  ".join(found))


def settings_in_use(**given: Any) -> Settings:
    """The settings in force, their data folder made. Raises RuntimeError, also where nothing can be written there."""
    settings = read_settings(**given)
    try:
        (settings.data_dir / "tmp").mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=settings.data_dir / "tmp").close()
    except OSError as error:
        raise RuntimeError(
            f"TUNEPROOF_DATA_DIR: {settings.data_dir.absolute()} is no folder that can be written to "
            f"({error.strerror}). Name another one, or give it to the service's user."
        ) from error
    return settings


def _variable(loc: tuple[int | str, ...]) -> str:
    first, *inside = map(str, loc) if loc else ("",)
    return f"TUNEPROOF_{'.'.join([first.upper(), *inside])}: " if first else ""
