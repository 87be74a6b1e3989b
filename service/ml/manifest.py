"""What a saved model says about itself: enough to serve it, to check it, and to make it again."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from service.core.errors import InvalidData

States = Literal["head", "pooled"]
"""Which states a head multiplies: those the stock head sees, or the base's own pooling, of length 1."""

FILE = "manifest.json"
# Any other OSError is the storage's trouble and may pass: it says nothing against the model.
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of an adapter folder.

    Args:
        method: `lora` or `embedding_logreg`.
        base_model: Name on the allow-list, with `base_revision` as `Located.revision` gives it.
        labels: In the order of their ids.
        states: What the head multiplies.
        max_length: Of a text, in tokens.
        pad_token_id: What texts are padded with.
        ends_with_eos: Whether exactly one EOS ends every text (decoder bases).
        seed: Of split and training.
        split: `algorithm`, and `sha256` of the split.csv it was trained on; its seed is `seed`.
        precision: Of the frozen weights while training.
        temperature: Confidences are softmax(logits / temperature).
        calibration: Thresholds of confidence and what they did on the validation rows, see `threshold_for`.
        libraries: Versions in force.
        files: sha256 of every other file in the folder.
    """

    method: str
    base_model: str
    base_revision: str
    labels: tuple[str, ...]
    states: States
    max_length: int
    pad_token_id: int
    ends_with_eos: bool
    seed: int
    split: dict[str, Any]
    precision: str
    temperature: float = 1.0
    calibration: dict[str, Any] | None = None
    libraries: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in _LIBRARIES})
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    def write(self, folder: Path) -> None:
        """Hashes what lies in `folder` and writes the manifest beside it."""
        files = {str(f.relative_to(folder)): sha256_of(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        files.pop(FILE, None)
        body = asdict(self) | {"files": files}
        (folder / FILE).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, *, whole: bool = True) -> "Manifest":
        """The manifest of `folder`; where it is read `whole`, every file is checked against its sha256.

        Raises:
            InvalidData: a file is missing or is not the one that was published, or the manifest itself is damaged.
        """
        try:
            body = json.loads((folder / FILE).read_text(encoding="utf-8"))
            manifest = cls(**body | {"labels": tuple(body["labels"])})
            if not 0 < manifest.temperature < math.inf:
                raise ValueError("a temperature is above 0")
        except (*_NOT_THERE, ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{FILE} of the saved model is missing, damaged, or of another version.") from error
        for name in manifest.files if whole else ():
            manifest.bytes_of(folder, name)
        return manifest

    def bytes_of(self, folder: Path, name: str) -> bytes:
        """A file's bytes. Raises InvalidData where it is missing or is not the one that was published."""
        try:
            found = (folder / name).read_bytes()
        except _NOT_THERE:
            found = None
        if found is None or hashlib.sha256(found).hexdigest() != self.files.get(name):
            raise InvalidData(f"{name} of the saved model is missing or not the file that was published.")
        return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
