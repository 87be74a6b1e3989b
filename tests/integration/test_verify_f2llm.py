"""What is checked on the real models, on tiny ones: it passes where all is right, and fails where something is not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from service.ml.base_models import Located, find_base, locate
from tests.tiny import BERT, EOS, QWEN3, QWEN3_EOS, save_qwen3

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _verify_f2llm as verify

pytestmark = pytest.mark.more

CPU = torch.device("cpu")


def located(models_dir: Path, name: str) -> Located:
    return locate(find_base(name, models_dir))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Located:
    """A tiny Qwen3 with a pad token of its own beside its EOS, as the real ones have."""
    folder = tmp_path_factory.mktemp("models")
    save_qwen3(folder / "padded", appends_eos=False)
    config = folder / "padded" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "<|im_end|>"}))
    return located(folder, "padded")


def test_a_base_as_it_should_be_passes_every_check_of_classification(padded, tiny_models, capsys):
    assert verify.run(padded, verify.CLASSIFYING, CPU) == 0
    assert capsys.readouterr().out.count("PASS") == len(verify.CLASSIFYING)


def test_a_base_that_pads_with_eos_is_pooled_before_it_and_fails(tiny_models, capsys):
    assert verify.run(located(tiny_models, QWEN3), [verify.ends_with_one_eos, verify.pools_at_eos], CPU) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("PASS")
    assert second.startswith("FAIL")
    assert "1 before the last token" in second


def test_a_base_without_eos_fails_and_one_that_cannot_be_loaded_does(tiny_models, tmp_path, monkeypatch, capsys):
    assert verify.run(located(tiny_models, BERT), [verify.ends_with_one_eos], CPU) == 1
    source = located(tiny_models, QWEN3)
    broken = Located(source.base, tmp_path, source.revision)
    assert verify.run(broken, [verify.pools_at_eos, verify.answers_prompts], CPU) == 2
    assert capsys.readouterr().out.count("FAIL") == 3


def test_an_engine_that_answers_otherwise_than_stock_fails(padded, monkeypatch):
    score = verify.Engine.score
    monkeypatch.setattr(verify.Engine, "score", lambda *given: [logits * 1.01 for logits in score(*given)])
    assert not verify.reloads_in_stock(padded, CPU)[0]


def test_a_training_that_takes_more_memory_than_allowed_fails(padded):
    assert not verify.fits_in_memory(padded, CPU, at_most=1e6)[0]


def test_prompts_pass_without_eos_and_fail_with_it(tiny_models, monkeypatch):
    source = located(tiny_models, QWEN3_EOS)
    assert verify.prompts_without_eos(source, CPU)[0]
    encode_prompt = verify.PromptedModel.encode_prompt
    with_eos = lambda self, *said: [*encode_prompt(self, *said), self.tokenizer.convert_tokens_to_ids(EOS)]  # noqa: E731
    monkeypatch.setattr(verify.PromptedModel, "encode_prompt", with_eos)
    assert not verify.prompts_without_eos(source, CPU)[0]


def test_random_weights_answer_no_prompt(tiny_models):
    passed, seen = verify.answers_prompts(located(tiny_models, QWEN3), CPU)
    assert not passed, seen


def test_a_machine_without_a_gpu_or_without_the_hub_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.main() == 2
    assert "CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert verify.main() == 2  # tests reach no hub
    assert "hub" in capsys.readouterr().err


def test_the_program_looks_at_every_base_and_fails_where_one_check_does(padded, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify, "pull", lambda base: Located(base, padded.folder, padded.revision))
    checks = {
        name: (lambda _source, _device, good=good: (good, "seen"),)
        for name, good in ((verify.GPU_DEFAULT, True), (verify.PROMPT_DEFAULT, True))
    }
    monkeypatch.setattr(verify, "CHECKS", checks)
    assert verify.main() == 0
    monkeypatch.setitem(checks, verify.GPU_DEFAULT, (lambda _source, _device: (False, "seen"),))
    assert verify.main() == 1
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["PASS", "PASS", "FAIL", "PASS"]
