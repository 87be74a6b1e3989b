"""Tiny models of random weights, as their makers would save them, and a table that keywords decide.

Every builder writes a folder that `AutoModel…from_pretrained` reads: config.json, safetensors, tokenizer.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HIDDEN = 64
EOS = "<|endoftext|>"
# Every weight of the tiny models is drawn this wide: wide enough that two texts give clearly different states.
SPREAD = 0.1

QWEN3, QWEN3_EOS, QWEN3_STOCK = "tiny-qwen3", "tiny-qwen3-eos", "tiny-qwen3-stock"
BERT, DISTILBERT, ROBERTA = "tiny-bert", "tiny-distilbert", "tiny-roberta"
DECODERS = (QWEN3, QWEN3_EOS, QWEN3_STOCK)
ENCODERS = (BERT, DISTILBERT, ROBERTA)

KEYWORDS = {
    "billing": ("invoice", "charged", "refund", "payment", "price"),
    "delivery": ("parcel", "courier", "shipping", "late", "address"),
    "login": ("password", "account", "locked", "email", "code"),
    "praise": ("thanks", "great", "lovely", "perfect", "happy"),
}
_FILLERS = (
    "hello", "there", "please", "could", "you", "have", "a", "look", "at", "my", "the", "it", "was", "again", "today",
    "since", "monday", "and", "not", "yet", "sure",
)  # fmt: skip
_MARKUP = "Which of these categories does the text below belong to? Answer with the name only. Label: Text: "


def labelled_texts(n: int, seed: int = 0, labels: tuple[str, ...] = tuple(KEYWORDS)) -> tuple[list[str], list[str]]:
    """`n` texts and their labels, in turn: each holds one or two keywords of its label among fillers; all differ."""
    rng = np.random.default_rng(seed)
    texts: dict[str, str] = {}
    while len(texts) < n:
        label = labels[len(texts) % len(labels)]
        words = [*rng.choice(_FILLERS, rng.integers(2, 9)), *rng.choice(KEYWORDS[label], rng.integers(1, 3))]
        texts.setdefault(" ".join(rng.permutation(words)), label)
    return list(texts), list(texts.values())


def build_all(models_dir: Path) -> Path:
    """One folder per tiny model below `models_dir`."""
    save_qwen3(models_dir / QWEN3, appends_eos=False)
    save_qwen3(models_dir / QWEN3_EOS, appends_eos=True)
    save_qwen3(models_dir / QWEN3_STOCK, appends_eos=False, tokenizer_class="Qwen2Tokenizer")
    save_bert(models_dir / BERT)
    save_distilbert(models_dir / DISTILBERT)
    save_roberta(models_dir / ROBERTA)
    return models_dir


def save_qwen3(folder: Path, *, appends_eos: bool, tokenizer_class: str | None = None, seed: int = 0) -> None:
    """A Qwen3 with a language-model head, and a tokenizer without a pad token.

    Args:
        folder: Where to.
        appends_eos: Whether the tokenizer's own post-processor ends every text with EOS.
        tokenizer_class: Written into tokenizer_config.json, as the real Qwen3's says `Qwen2Tokenizer`.
        seed: Of the weights.
    """
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    backend = _byte_level_bpe(appends_eos=appends_eos)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, model_max_length=512)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None, tie_word_embeddings=True,
        initializer_range=SPREAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if tokenizer_class is not None:
        _edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, pad_token=None)


def save_bert(folder: Path, seed: int = 0) -> None:
    """A BERT with its pooler: the checkpoint lacks the last linear layer alone."""
    from transformers import BertConfig, BertModel

    tokenizer = _wordpiece()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
        initializer_range=SPREAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_distilbert(folder: Path, seed: int = 0) -> None:
    """A DistilBERT, whose checkpoint also lacks `pre_classifier`."""
    from transformers import DistilBertConfig, DistilBertModel

    tokenizer = _wordpiece()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, initializer_range=SPREAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_roberta(folder: Path, seed: int = 0) -> None:
    """A RoBERTa, whose checkpoint also lacks `classifier.dense`."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = _wordpiece()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=130, pad_token_id=tokenizer.pad_token_id, type_vocab_size=1,
        initializer_range=SPREAD,
    )  # fmt: skip
    torch.manual_seed(seed)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _corpus() -> list[str]:
    return [*labelled_texts(200, seed=99)[0], _MARKUP, *KEYWORDS]


def _byte_level_bpe(*, appends_eos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[EOS, "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _wordpiece() -> Any:
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Written down, not trained: the trainer breaks ties by chance, and a test must see the same ids every time.
    words = sorted({word for text in _corpus() for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    letters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *letters, *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, **dict(zip(names, special, strict=True))
    )


def _edit(file: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    body = {key: value for key, value in (json.loads(file.read_text()) | values).items() if value is not None}
    file.write_text(json.dumps(body, indent=2))
