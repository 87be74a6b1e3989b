"""The tables. What a reader may see is what has a row here; bytes in the storage without one do not exist."""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware in Python whatever the database: SQLite keeps no time zone, so UTC is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC)


class Text(TypeDecorator[str]):
    """Text. PostgreSQL's holds no NUL, which becomes U+FFFD there: it may be asked for, and finds nothing."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.replace("\0", "\ufffd") if value is not None and dialect.name == "postgresql" else value


class Base(DeclarativeBase):
    """Constraints are named by rule, so that migrations can name them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {str: Text, datetime: UtcDateTime, dict[str, Any]: JSON, list[str]: JSON}


class Dataset(Base):
    """An uploaded file and what was found in it."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    name: Mapped[str] = mapped_column(Text(200))
    created_at: Mapped[datetime]
    sha256: Mapped[str] = mapped_column(Text(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    storage_key: Mapped[str]
    profile: Mapped[dict[str, Any]]


class Job(Base):
    """A job and, while it runs, who holds its lease.

    `attempt` counts every start and fences writes together with `lease_token`; `failures` counts lost attempts since
    the user last asked for the job. The dataset may be deleted while the job stays, so `dataset_id` is no foreign key.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index(None, "status", "id"), Index(None, "dataset_id"))

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    kind: Mapped[str] = mapped_column(Text(16))
    name: Mapped[str] = mapped_column(Text(200))
    status: Mapped[str] = mapped_column(Text(16))
    stage: Mapped[str | None] = mapped_column(Text(16))
    dataset_id: Mapped[str] = mapped_column(Text(64))
    model_id: Mapped[str | None] = mapped_column(Text(64))
    spec: Mapped[dict[str, Any]]
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    summary: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    progress_fraction: Mapped[float] = mapped_column(default=0.0)
    progress_message: Mapped[str] = mapped_column(default="")
    eta_seconds: Mapped[float | None]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(Text(64))
    lease_token: Mapped[str | None] = mapped_column(Text(64))
    lease_expires_at: Mapped[datetime | None]
    checkpoint_prefix: Mapped[str | None]
    webhook_url: Mapped[str | None]
    stage_started_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Event(Base):
    """Something that happened to a job, oldest first by `id`."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]
    level: Mapped[str] = mapped_column(Text(16))
    type: Mapped[str] = mapped_column(Text(16))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class Artifact(Base):
    """A published file of a job."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(Text(400), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Text(64))
    storage_key: Mapped[str]
    holds_texts: Mapped[bool]


class Model(Base):
    """A published model. It outlives its job and its dataset, so neither is a foreign key."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    name: Mapped[str] = mapped_column(Text(200))
    version: Mapped[int]
    method: Mapped[str] = mapped_column(Text(32))
    job_id: Mapped[str] = mapped_column(Text(64))
    base_model: Mapped[str] = mapped_column(Text(200))
    base_revision: Mapped[str] = mapped_column(Text(200))
    labels: Mapped[list[str]]
    metrics: Mapped[dict[str, Any]]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    storage_prefix: Mapped[str]
    files: Mapped[list[str]]
    calibration: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class Alias(Base):
    """A name that points to one model at a time; `history` is newest first."""

    __tablename__ = "aliases"

    alias: Mapped[str] = mapped_column(Text(64), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    updated_at: Mapped[datetime]
    history: Mapped[list["AliasMove"]] = relationship(
        primaryjoin="Alias.alias == foreign(AliasMove.alias)", order_by="AliasMove.id.desc()", viewonly=True
    )


class AliasMove(Base):
    """What an alias has pointed to, and since when."""

    __tablename__ = "alias_moves"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    alias: Mapped[str] = mapped_column(Text(64), index=True)
    model_id: Mapped[str] = mapped_column(Text(64))
    created_at: Mapped[datetime]


class ApiKey(Base):
    """A key's hash; the secret is high-entropy, so a plain SHA-256 cannot be searched."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    name: Mapped[str] = mapped_column(Text(200))
    scope: Mapped[str] = mapped_column(Text(16))
    secret_sha256: Mapped[str] = mapped_column(Text(64), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class BrowserSession(Base):
    """A cookie that counts as a key, by the hash of its token. It ends with its key."""

    __tablename__ = "sessions"

    token_sha256: Mapped[str] = mapped_column(Text(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    expires_at: Mapped[datetime]


class IdempotentAnswer(Base):
    """What one caller was answered under one Idempotency-Key; without a status, whoever holds `token` is at it."""

    __tablename__ = "idempotent_answers"

    caller: Mapped[str] = mapped_column(Text(64), primary_key=True)
    key_sha256: Mapped[str] = mapped_column(Text(64), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(Text(64))
    token: Mapped[str] = mapped_column(Text(64))
    created_at: Mapped[datetime]
    taken_until: Mapped[datetime]
    status: Mapped[int | None]
    body: Mapped[dict[str, Any] | None]
    location: Mapped[str | None]


class Worker(Base):
    """A worker process and when it was last seen."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class Delivery(Base):
    """A webhook call that is still to be made; `id` and `body` are the same at every attempt."""

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(Text(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    url: Mapped[str]
    body: Mapped[str]
    attempt: Mapped[int]
    due_at: Mapped[datetime] = mapped_column(index=True)


class Tally(Base):
    """How often something has happened to jobs of a kind, or to models, and the seconds it took; outlives the jobs.

    `what` is `ended` (`value` is the status, `seconds` is 0), `stage` (`value` is the stage) or `deleted` (of models).
    """

    __tablename__ = "tallies"

    what: Mapped[str] = mapped_column(Text(16), primary_key=True)
    kind: Mapped[str] = mapped_column(Text(16), primary_key=True)
    value: Mapped[str] = mapped_column(Text(16), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]


class Garbage(Base):
    """Bytes without a row, to be deleted once nobody can be reading them any more."""

    __tablename__ = "garbage"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    prefix: Mapped[str]
    delete_after: Mapped[datetime]
