"""A Qwen3 of random weights in a folder, as a base model lies there, and texts that its tokenizer has a word for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from _ours import write_csv

NAME, N_LABELS, WORDS = "random-qwen3", 8, 2000
_SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 96, "vocab_size": WORDS + 3},
}  # fmt: skip
_SPECIAL = ("<unk>", "<pad>", "<eos>")


def save_random_qwen3(models_dir: Path, shape: str, device: str) -> Path:
    """Weights in bf16, as Qwen3's own are. Gives the folder, `models_dir/NAME`."""
    words = [*_SPECIAL, *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, pad, end = _SPECIAL
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, pad_token=pad, eos_token=end, model_max_length=512
    )
    config = Qwen3Config(
        max_position_embeddings=512, eos_token_id=2, pad_token_id=1, bos_token_id=None, tie_word_embeddings=True,
        dtype="bfloat16", **_SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(models_dir / NAME)
    tokenizer.save_pretrained(models_dir / NAME)
    return models_dir / NAME


def write_texts(file: Path, n: int, n_tokens: int) -> Path:
    """`n` rows, the texts of `n_tokens` tokens with the EOS that ends them, the labels in turn."""
    chance = np.random.default_rng(n_tokens)
    texts = [" ".join(f"w{i}" for i in row) for row in chance.integers(0, WORDS, (n, n_tokens - 1))]
    return write_csv(file, texts, [f"label {i % N_LABELS}" for i in range(n)])
