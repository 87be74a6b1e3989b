"""Checks on the real F2LLM-0.6B and Qwen3-0.6B what the tests check on tiny models of random weights.

For a machine that reaches the model hub and has a CUDA GPU: `make verify-f2llm`. Prints a table; exit status 0 if all
pass, 1 if one fails, 2 where the machine is not one for it.
"""

import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from service.core.errors import ModelUnavailable
from service.core.spec import TrainSpec
from service.ml.adapter import WEIGHTS, Layout, load_adapter
from service.ml.backbone import load_backbone
from service.ml.base_models import GPU_DEFAULT, PROMPT_DEFAULT, Located, allowed_models, pull
from service.ml.encode import encode, load_tokenizer
from service.ml.engine import Engine
from service.ml.labels import LabelSet
from service.ml.manifest import Manifest
from worker.methods.frozen import FrozenBase
from worker.methods.lora import Lora, Trained
from worker.methods.prompts import PromptTemplate
from worker.methods.protocol import Rows
from worker.methods.recipe import LoraRecipe
from worker.methods.zero_shot import Prompted, PromptedModel

SAID = {
    "billing": ("I was charged twice on my invoice and want a refund", "the price on the bill is not what I paid"),
    "delivery": ("the courier never came and my parcel is a week late", "please send the package to my new address"),
    "login": ("my password does not work and my account is locked", "I cannot sign in, no code arrives"),
    "praise": ("thank you so much, it all went perfectly", "great service, I am very happy"),
}
LABELS = LabelSet.of(SAID)
TEXTS = tuple(text for texts in SAID.values() for text in texts)
ROWS = Rows(TEXTS, np.arange(len(TEXTS)) // 2, LABELS)
MAX_LENGTH, TOLERANCE = 48, 1e-3


def ends_with_one_eos(source: Located, _device: torch.device) -> tuple[bool, str]:
    """Texts end with EOS and hold no other, and so does one that is cut."""
    tokenizer = load_tokenizer(source.folder, decoder=True)
    encoded, eos = encode(tokenizer, [*TEXTS, " ".join(TEXTS)], MAX_LENGTH), tokenizer.eos_token_id
    right = [row.count(eos) == 1 and row[-1] == eos for row in encoded.ids]
    return all(right) and bool(encoded.truncated[-1]), f"{sum(right)} of {len(right)} texts, the last one cut"


def pools_at_eos(source: Located, device: torch.device) -> tuple[bool, str]:
    """The state that the head sees is the stock body's at the EOS, and nowhere else."""
    engine = Engine(load_backbone(source, device=device, dtype=torch.float32))
    ids = encode(engine.backbone.tokenizer, TEXTS, MAX_LENGTH).ids
    body = transformers.AutoModel.from_pretrained(source.folder, dtype=torch.float32).to(device)
    seen = []
    for row, state in zip(ids, engine.states(ids)["head"], strict=True):
        hidden = body(torch.tensor([row], device=device)).last_hidden_state[0].detach().cpu().numpy()
        errors = np.linalg.norm(hidden - state, axis=1) / np.linalg.norm(state)
        seen.append((len(row) - 1 - int(errors.argmin()), float(errors.min())))
    before, error = map(max, zip(*seen, strict=True))
    return before == 0 and error < TOLERANCE, f"{before} before the last token, relative error {error:.1e}"


def reloads_in_stock(source: Located, device: torch.device) -> tuple[bool, str]:
    """An adapter that training has saved gives the same logits in stock PEFT as here, both in fp32."""
    backbone = load_backbone(source, device=device, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted(source, device, ROWS, max_length=MAX_LENGTH, epochs=1).save(folder)
        # The state before the first step may be the best one, and there LoRA's B is still zero.
        saved = load_file(folder / WEIGHTS).items()
        weights = {key: 0.02 * torch.randn_like(x) if ".lora_B." in key else x for key, x in saved}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        Manifest(
            "lora", source.base.name, source.revision, LABELS.names, states="head", max_length=MAX_LENGTH, seed=0,
            pad_token_id=backbone.pad_id, ends_with_eos=True, split={}, precision="bf16",
        ).write(folder)  # fmt: skip
        adapter = load_adapter(folder, head_name=backbone.head_name, device=device, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind = transformers.AutoModelForSequenceClassification
        given = {"num_labels": len(LABELS), "pad_token_id": tokenizer.pad_token_id, "dtype": torch.float32}
        stock = PeftModel.from_pretrained(kind.from_pretrained(source.folder, **given), folder).to(device).eval()
    inputs = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    expected = stock(**inputs.to(device)).logits.detach().cpu().numpy()
    engine, ids = Engine(backbone), encode(backbone.tokenizer, TEXTS, MAX_LENGTH).ids
    engine.attach(adapter)
    scored = [engine.score(ids, [one] * len(ids)) for one in (adapter, replace(adapter, layout=Layout(())))]
    error, without = (float(np.linalg.norm(x - expected) / np.linalg.norm(expected)) for x in map(np.stack, scored))
    return error < TOLERANCE < without / 3, f"logits' relative error {error:.1e}, without LoRA {without:.1e}"


def fits_in_memory(source: Located, device: torch.device, at_most: float = 10e9) -> tuple[bool, str]:
    """Training in batches of 64 x 192 tokens with gradient checkpointing."""
    rows = Rows(tuple(f"{i} {' '.join(TEXTS * 8)}" for i in range(128)), np.arange(128) % len(LABELS), LABELS)
    facts = fitted(source, device, rows, max_length=192, batch_size=64, epochs=1, gradient_checkpointing=True).facts()
    peak, cut = facts["peak_memory_bytes"], facts["truncated_texts"]
    return peak <= at_most and cut >= 128, f"{peak / 1e9:.2f} of {at_most / 1e9:g} GB"


def fitted(source: Located, device: torch.device, rows: Rows, **train: Any) -> Trained:
    """A short fine-tune in bf16."""
    spec = TrainSpec(precision="bf16", learning_rate=5e-4, **{"batch_size": 8} | train)
    base = FrozenBase(Engine(load_backbone(source, device=device, dtype=torch.bfloat16)), spec.max_length)
    with tempfile.TemporaryDirectory() as folder:
        return Lora(base, LoraRecipe.of(spec, 0), Path(folder)).fit(rows, ROWS)


def prompts_without_eos(source: Located, device: torch.device) -> tuple[bool, str]:
    """A prompt ends with nothing that the model ends its own answers with."""
    model = PromptedModel(source, device)
    last = [model.encode_prompt(*PromptTemplate().fill(LABELS.names, text))[-1] for text in TEXTS]
    ends = {*model.ends, model.tokenizer.eos_token_id}
    return ends.isdisjoint(last), f"the last token is {model.tokenizer.decode(last[0])!r}"


def answers_prompts(source: Located, device: torch.device) -> tuple[bool, str]:
    """Plain texts, zero-shot: every answer is a label, and three quarters are right."""
    answers = Prompted(PromptedModel(source, device), PromptTemplate(), LABELS).predict(TEXTS)
    right = int((answers.label_ids == ROWS.label_ids).sum())
    valid = sum(outcome == "valid" for outcome in answers.outcomes or ())
    return valid == len(TEXTS) and right * 4 >= 3 * len(TEXTS), f"{valid} labels, {right} right, of {len(TEXTS)}"


CLASSIFYING = (ends_with_one_eos, pools_at_eos, reloads_in_stock, fits_in_memory)
CHECKS = {GPU_DEFAULT: CLASSIFYING, PROMPT_DEFAULT: (*CLASSIFYING, prompts_without_eos, answers_prompts)}


def run(source: Located, checks: Sequence[Callable[..., tuple[bool, str]]], device: torch.device) -> int:
    """Prints a line for each check: whether it passed, and what was seen. Gives how many failed, or broke off."""
    failed = 0
    for check in checks:
        gc.collect()  # the models of the check before would count as memory of this one
        try:
            good, seen = check(source, device)
        except Exception as error:  # noqa: BLE001 -- told in the table; the others still say something
            good, seen = False, f"{type(error).__name__}: {error}"
        sys.stdout.write(f"{'PASS' if good else 'FAIL'}  {source.base.name:12}{check.__name__:22}{seen}\n")
        failed += not good
    return failed


def main() -> int:
    try:
        if not torch.cuda.is_available():
            raise ModelUnavailable("torch sees no CUDA GPU here.", hint="Run it on a machine with one.")
        sources = [pull(allowed_models(None)[name]) for name in CHECKS]
    except ModelUnavailable as error:
        sys.stderr.write(f"{error.detail} {error.hint}\n")
        return 2
    return min(1, sum(run(source, CHECKS[source.base.name], torch.device("cuda")) for source in sources))


if __name__ == "__main__":
    sys.exit(main())
