"""Calls that would let a file or a text run code, or look the other way: none stands in what is shipped."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("tuneproof", "service", "worker", "migrations", "benchmarks", "tools")
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle", "imp"}
"""Read objects that run code as they are read."""
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "joblib.load", "numpy.fromfile", "yaml.load",
    "yaml.unsafe_load", "os.system", "os.popen", "tempfile.mktemp", "pandas.read_pickle", "pd.read_pickle",
    "ssl._create_unverified_context",
}  # fmt: skip
ARGUMENTS = {
    ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True), ("verify", False),
    ("autoescape", False),
}  # fmt: skip


ALLOWED = {"worker/card.py": ["autoescape=False"]}
"""A model card is Markdown and no page; `test_card.py` holds what names may do there."""


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def banned(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{name.name}" for name in node.names]
            found += [name for name in whole if name.partition(".")[0] in MODULES or name in CALLS]
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            found += [called] if called in CALLS else []
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                found += [f"{keyword.arg}={value}"] if (keyword.arg, value) in ARGUMENTS else []
    return found


@pytest.mark.parametrize("room", SHIPPED)
def test_nothing_shipped_makes_a_banned_call(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): banned(file.read_text()) for file in files}
    assert {file: calls for file, calls in found.items() if calls != ALLOWED.get(file, [])} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import torch\ntorch.load('x')", "from torch import load", "from pickle import loads",
        "np.load('x', allow_pickle=True)", "AutoModel.from_pretrained('x', trust_remote_code=True)", "eval('1')",
        "subprocess.run('x', shell=True)", "httpx.get('x', verify=False)", "yaml.load(x)", "import dill as d",
        "jinja2.Environment(autoescape=False)", "import os\nos.system('x')",
    ],
)  # fmt: skip
def test_what_is_banned_is_found(source):
    assert banned(source)


@pytest.mark.parametrize("source", ["np.load('x')", "re.compile('x')", "f(trust_remote_code=False)", "model.eval()"])
def test_what_is_not_is_left_alone(source):
    assert banned(source) == []
