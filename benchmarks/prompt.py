"""What the shared prefix saves: our decoding against stock `generate`, one row at a time and in batches.

One model for all (a Qwen3 of random weights), the same prompts, the same most new tokens; constrained against
constrained (stock by `prefix_allowed_tokens_fn`), free against free. A ratio is the median over rounds that run every
side once. Stock's single rows are timed on a sample in each round; the answers are compared on every row. `--quick`
times stock's batches on a sample too, in one round, and compares the answers of some 50 rows.
"""

import random
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from _measures import Measure, parser, seconds, write
from worker.methods.decoding import Constrained, Free, generate
from worker.methods.label_trie import LabelTrie
from worker.methods.prompts import PromptTemplate

N, VOCABULARY, END, STOCK_BATCH, LEAST_MARGIN = 300, 32_000, 0, 16, 1e-4
AT_LEAST = {"constrained_vs_single": 15, "constrained_vs_batched": 10, "free_vs_single": 8}
THINGS = ("card", "transfer", "top_up", "refund", "cash_withdrawal", "direct_debit", "exchange", "account",
          "card_payment", "virtual_card", "identity_check")  # fmt: skip
MATTERS = ("not_working", "fee_charged_twice", "still_pending", "declined_abroad", "wrong_amount", "limit_reached",
           "how_to_cancel")  # fmt: skip
LABELS = [f"{thing}_{matter}" for thing in THINGS for matter in MATTERS]
OPENINGS = ("Hello, ", "Hi there, ", "Sorry but ", "Please help, ", "Can you tell me why ", "I do not understand why ",
            "", "Good morning, ", "Is it normal that ", "I would like to know why ")  # fmt: skip
SUBJECTS = ("my new card", "the transfer to my landlord", "the money I added yesterday", "my refund from the shop",
            "the cash I took out abroad", "a direct debit I never agreed to", "the exchange rate", "my account",
            "a payment at the supermarket", "the card in the app", "the check of my passport")  # fmt: skip
EVENTS = ("is still pending", "was declined twice", "has a fee that nobody told me about", "shows the wrong amount",
          "does not go through", "is over some limit", "cannot be cancelled", "has disappeared")  # fmt: skip
CLOSINGS = ("?", " and it is urgent.", " since Monday, what should I do now?", ", can you look into it for me please?",
            " even though I have enough money.", ".", " when I am on holiday?")  # fmt: skip


def written_texts(n: int) -> list[str]:
    """`n` texts of a bank's customers, put together by chance; they differ."""
    chance = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < n:
        words = [chance.choice(part) for part in (OPENINGS, SUBJECTS, (" ",), EVENTS, CLOSINGS)]
        texts["".join(words)] = None
    return list(texts)


def trained_tokenizer() -> Tokenizer:
    """Byte-level BPE over the texts and labels, split into words as Qwen's: `_fee` is one."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([*written_texts(2000), *LABELS * 20, *PromptTemplate().fill((), "")], trainer)
    return tokenizer


def random_qwen3() -> Any:
    """Half of Qwen3-0.6B in every width, 8 layers."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, eos_token_id=END, bos_token_id=None,
        pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    for layer in model.model.layers:
        # Sharp attention: else it is even over the prompt, the text counts for little and all get the same label.
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 8.0)
    return model


@torch.inference_mode()
def stock(model: Any, prompts: list[list[int]], batch: int, n_new: int, trie: LabelTrie | None, **more: Any) -> Any:
    """Stock greedy `generate`, batch by batch in the order given, padded on the left. Returns each batch's output."""
    outputs = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[END] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        # Bound now, for the length differs by batch.
        allowed = trie and (lambda _row, seen, longest=longest: trie.allowed_after(seen[longest:].tolist()))
        given = {"attention_mask": mask, "prefix_allowed_tokens_fn": allowed, **more}
        outputs.append(model.generate(ids, max_new_tokens=n_new, do_sample=False, pad_token_id=END, **given))
    return outputs


def reference(model: Any, prompt: list[int], n_new: int, trie: LabelTrie | None) -> tuple[list[int], float]:
    """Stock's answer to one prompt, END included, and the smallest distance of its first from its second choice."""
    (given,) = stock(model, [prompt], 1, n_new, trie, return_dict_in_generate=True, output_scores=True)
    answer = given.sequences[0, len(prompt) :].tolist()
    best = torch.stack(given.scores)[:, 0].topk(2, dim=-1).values
    return answer, float((best[:, 0] - best[:, 1]).min())


def check(model: Any, prompts: list[list[int]], n_new: int, trie: LabelTrie) -> str:
    """Compares every row's answers with stock's; SystemExit where one differs that may not."""
    free, constrained = Free(model, len(prompts), n_new, [END]), Constrained(model, len(prompts), trie)
    generate(model, prompts, free, lambda _n: None)
    generate(model, prompts, constrained, lambda _n: None)
    n_close = 0
    for row, prompt in enumerate(prompts):
        answer, margin = reference(model, prompt, n_new, None)
        labelled, label_margin = reference(model, prompt, n_new, trie)
        n_close += (margin <= LEAST_MARGIN) + (label_margin <= LEAST_MARGIN)
        if margin > LEAST_MARGIN and free.answers[row] != answer:
            raise SystemExit(f"row {row}: the free answer is not stock's (margin {margin:.2g})")
        if label_margin > LEAST_MARGIN and constrained.labels[row] != trie.label_of(labelled):
            raise SystemExit(f"row {row}: the constrained answer is not stock's (margin {label_margin:.2g})")
    labels = len(set(constrained.labels))
    return f"{len(prompts)} rows answered as stock does, both ways ({n_close} near-ties, {labels} labels given)"


def main() -> None:
    given = parser(__doc__).parse_args()
    rounds, n_checked, n_singly, n_batched = (1, 48, 24, 48) if given.quick else (3, N, 24, N)
    tokenizer, model = trained_tokenizer(), random_qwen3()
    texts = written_texts(N)
    messages = [PromptTemplate().fill(LABELS, text) for text in texts]
    prompts = [tokenizer.encode(f"{system}\n\n{user}\nLabel:").ids for system, user in messages]
    prompts.sort(key=len)  # for stock's batches; ours sort by themselves
    trie = LabelTrie([tokenizer.encode(f" {label}").ids for label in LABELS], [END])
    n_new = trie.longest + 1
    checked = check(model, prompts[:: N // n_checked], n_new, trie)
    few, many = prompts[:: N // n_singly], prompts[:: N // n_batched]
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, limit, rule in (
            ("free", None, lambda: Free(model, N, n_new, [END])),
            ("constrained", trie, lambda: Constrained(model, N, trie)),
        ):
            ours = seconds(lambda: generate(model, prompts, rule(), lambda _n: None))  # noqa: B023
            single = seconds(lambda: stock(model, few, 1, n_new, limit)) * N / len(few)  # noqa: B023
            batched = seconds(lambda: stock(model, many, STOCK_BATCH, n_new, limit)) * N / len(many)  # noqa: B023
            sides = {way: ours, f"{way}_single": single, f"{way}_batched": batched}
            sides |= {f"{way}_vs_single": single / ours, f"{way}_vs_batched": batched / ours}
            for name, value in sides.items():
                taken.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in taken.items()}
    title = (
        f"{N} prompts of {statistics.mean(map(len, prompts)):.0f} tokens, texts of "
        f"{statistics.mean(len(tokenizer.encode(text).ids) for text in texts):.0f}; at most {n_new} new ones; fp32, "
        f"{torch.get_num_threads()} threads. Stock singly: {len(few)} rows, scaled to {N}; in batches of "
        f"{STOCK_BATCH}: {len(many)} rows{', scaled too' if given.quick else ''}.\n{checked}"
    )
    table = Table("decoding", "ours, s", "stock singly, s", "stock batched, s", "vs single", "vs batched", title=title)
    for way in ("constrained", "free"):
        names = (way, f"{way}_single", f"{way}_batched", f"{way}_vs_single", f"{way}_vs_batched")
        table.add_row(way, *(f"{median[name]:.1f}" for name in names))
    Console().print(table)
    measures = [Measure(name, taken[name], at_least=least) for name, least in AT_LEAST.items()]
    write(given.json, measures, device="cpu", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
