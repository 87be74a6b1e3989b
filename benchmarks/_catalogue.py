"""A data folder as a worker would leave it: adapters that stock PEFT wrote, in the storage and in the catalogue."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from _workload import RANK
from service.core.clock import utc_now
from service.core.ids import new_id
from service.core.settings import Settings
from service.db import catalog
from service.db.engine import Database, migrate
from service.db.jobs import NewModel
from service.db.models import Model
from service.ml.adapter import save_head
from service.ml.base_models import Located
from service.ml.manifest import Manifest
from service.storage import Storage

MAX_LENGTH = 192
_ATTENTION = ["query", "key", "value", "attention.output.dense"]


def stock(source: Located, n_labels: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(source.folder, num_labels=n_labels, dtype=torch.float32)


def save_adapter(folder: Path, source: Located, tokenizer: Any, n_labels: int, seed: int) -> Path:
    """A LoRA adapter of random weights, its head included, by stock PEFT."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=_ATTENTION)
    model = get_peft_model(stock(source, n_labels), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return _signed(folder, source, tokenizer, n_labels, "lora")


def save_bare(folder: Path, source: Located, tokenizer: Any, n_labels: int) -> Path:
    """A head and nothing else, over the same states as an adapter's."""
    folder.mkdir(parents=True)
    width = int(stock(source, n_labels).config.hidden_size)
    save_head(folder, torch.randn(n_labels, width), torch.zeros(n_labels))
    return _signed(folder, source, tokenizer, n_labels, "embedding_logreg")


def stock_peft(source: Located, folders: Sequence[Path], n_labels: int) -> Any:
    """All adapters in one PEFT model, named by their folders. PEFT wants the same number of labels of all."""
    model = PeftModel.from_pretrained(stock(source, n_labels), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


def publish(settings: Settings, folders: Sequence[Path], n_models: int, *, linked: bool = True) -> list[str]:
    """`n_models` published models over the folders in turn; gives the ids.

    Where files repeat they are links; not `linked`, each has its own, of which no page is in memory.
    """
    db, storage = Database(settings.resolved_database_url), Storage(settings.resolved_storage_url)
    manifests, rows = [Manifest.read(folder) for folder in folders], []
    for number in range(n_models):
        at, model_id = number % len(folders), new_id("mdl")
        files = sorted(path.name for path in folders[at].iterdir())
        prefix, root = f"models/{model_id}", settings.data_dir.absolute() / "storage"
        if number < len(folders) or not linked:
            for name in files:
                with (folders[at] / name).open("rb") as stream:
                    storage.put(stream, f"{prefix}/{name}")
            if not linked:
                _out_of_memory(root / prefix)
        else:
            (root / prefix).mkdir()
            for name in files:
                os.link(root / rows[at].storage_prefix / name, root / prefix / name)
        made = NewModel(
            model_id, "lora", manifests[at].base_model, manifests[at].base_revision, list(manifests[at].labels), {},
            sum(path.stat().st_size for path in folders[at].iterdir()), prefix, files,
        )  # fmt: skip
        rows.append(Model(name=model_id, version=1, job_id="", created_at=utc_now(), **asdict(made)))
    ids = [row.id for row in rows]
    with db.write() as session:
        session.add_all(rows)
    db.close()
    return ids


def _out_of_memory(folder: Path) -> None:
    """Has the next reader of its files fetch them from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_key(settings: Settings, scope: str) -> str:
    """A new key's secret; the first call makes the database."""
    migrate(settings.resolved_database_url)
    db = Database(settings.resolved_database_url)
    with db.write() as session:
        _key, secret = catalog.create_key(session, scope, scope, utc_now())
    db.close()
    return secret


def _signed(folder: Path, source: Located, tokenizer: Any, n_labels: int, method: str) -> Path:
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    labels = tuple(f"label_{i}" for i in range(n_labels))
    Manifest(
        method=method, base_model=source.base.name, base_revision=source.revision, labels=labels, states="head",
        max_length=MAX_LENGTH, pad_token_id=0, ends_with_eos=False, seed=0, split={}, precision="fp32",
    ).write(folder)  # fmt: skip
    return folder
