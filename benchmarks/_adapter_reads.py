"""Reading one adapter as the engine does, from a folder and from an S3 server on the same machine."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from _measures import Measure
from service.ml.adapter import CONFIG, READ, WEIGHTS, load_adapter
from service.ml.manifest import Manifest
from service.storage import Storage
from tests.s3_server import make_bucket, s3_server

HEAD_NAME = "score"


def save_shaped(folder: Path, shape: Any, n_labels: int, tokenizer_bytes: int) -> Path:
    """A published folder of random numbers: an adapter as PEFT writes it, and a tokenizer of so many bytes."""
    folder.mkdir(parents=True)
    rng, named = np.random.default_rng(0), {}
    for layer in range(shape.layers):
        for number, (n_in, n_out) in enumerate(shape.projections):
            at = f"base_model.model.model.layers.{layer}.self_attn.p{number}"
            named[f"{at}.lora_A.weight"] = rng.standard_normal((shape.rank, n_in), "f4")
            named[f"{at}.lora_B.weight"] = rng.standard_normal((n_out, shape.rank), "f4")
    named[f"base_model.model.{HEAD_NAME}.weight"] = rng.standard_normal((n_labels, shape.hidden), "f4")
    save_file(named, folder / WEIGHTS)
    (folder / CONFIG).write_text('{"lora_alpha": 32, "r": 16}')
    (folder / "tokenizer.json").write_bytes(rng.bytes(tokenizer_bytes))
    (folder / "tokenizer_config.json").write_text("{}")
    Manifest(
        method="lora", base_model="shaped", base_revision="", labels=tuple(map(str, range(n_labels))), states="head",
        max_length=192, pad_token_id=0, ends_with_eos=True, seed=0, split={}, precision="bf16",
    ).write(folder)  # fmt: skip
    return folder


def read_measures(shapes: Sequence[Any], n_labels: int, tokenizer_bytes: int, n: int) -> list[Measure]:
    """By shape and place, one read at a time and one core."""
    torch.set_num_threads(1)
    taken = []
    with tempfile.TemporaryDirectory() as place, s3_server():
        urls = {"folder": f"file://{place}/storage", "s3": f"s3://{make_bucket('capacity')}/it"}
        for shape in shapes:
            name = shape.name.split("-")[0].lower()
            # The tokenizer's size is F2LLM's; MiniLM's is 0.7 MB.
            folder = save_shaped(Path(place) / name, shape, n_labels, tokenizer_bytes if name == "f2llm" else 711_000)
            files = [path.name for path in folder.iterdir()]
            for where, url in urls.items():
                storage = Storage(url)
                for file in files:
                    with (folder / file).open("rb") as stream:
                        storage.put(stream, f"models/{name}/{file}")
                wanted = sorted(READ.intersection(files))
                taken.append(Measure(f"{name}_{where}", _times(storage, f"models/{name}", wanted, n)))
    return taken


def _times(storage: Storage, prefix: str, files: Sequence[str], n: int) -> list[float]:
    seconds = []
    for _ in range(n + 1):
        start = time.perf_counter()
        with storage.folder(prefix, files) as folder:
            load_adapter(folder, head_name=HEAD_NAME, device=torch.device("cpu"), dtype=torch.bfloat16)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
