"""Parts of a batch: their loss and gradients, computed here or by processes of their own beside this one."""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.ml.backbone import load_backbone
from service.ml.engine import Engine
from worker.methods.trainable import Trainable

LABEL_SMOOTHING = 0.1
TOKEN_DROPOUT = 0.1
"""Of a text's tokens but the first and last, what is left out at each step; nothing where LoRA's dropout is 0."""
_GRACE_SECONDS = 1.0  # in which what it has open can be closed
Computed = tuple[Tensor, tuple[Tensor, ...]]
"""A part's loss and the gradients of all weights."""


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, shortest first.

    Args:
        rows: Positions among the train rows.
        whole: What the batch's losses are divided by.
        seed: Of what is dropped.
    """

    rows: NDArray[np.int64]
    whole: float
    seed: int


class Parts:
    """What computes them: the weights as they are at the time, and the train rows.

    Args:
        trainable: The weights, on an engine.
        ids: N lists of token ids.
        targets: `(N,)` label ids.
        of_label: `(K,)`, each label's weight.
    """

    def __init__(self, trainable: Trainable, ids: list[list[int]], targets: Tensor, of_label: Tensor) -> None:
        self.trainable, self.ids, self.targets, self.of_label = trainable, ids, targets, of_label
        self.checkpointing = False
        self._loss = nn.CrossEntropyLoss(weight=of_label, label_smoothing=LABEL_SMOOTHING, reduction="sum")

    def checkpoint_activations(self) -> None:
        """From here on they are computed twice instead of kept."""
        self.checkpointing = True
        model: Any = self.trainable.engine.backbone.model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def compute(self, part: Part) -> Computed:
        trainable = self.trainable
        model, device = trainable.engine.backbone.model, trainable.engine.backbone.device
        drawn, ids = torch.Generator(device).manual_seed(part.seed), [self.ids[i] for i in part.rows]
        if trainable.dropout:
            ids = without_some(ids, TOKEN_DROPOUT, np.random.default_rng(part.seed))
        model.train(self.checkpointing)  # transformers asks; every dropout of the base is 0
        try:
            with trainable.engine.changed(trainable.change):
                logits = trainable.logits(ids, drawn)
                loss = self._loss(logits, self.targets[part.rows]) / part.whole
                return loss.detach(), torch.autograd.grad(loss, list(trainable.weights.values()))
        finally:
            model.eval()
            trainable.let_go()


def without_some(ids: list[list[int]], share: float, rng: np.random.Generator) -> list[list[int]]:
    """Texts without about a `share` of their tokens; the first and the last stay, which may be a model's own marks.

    One token by itself stays too. Texts of one length lose as many, so what is sorted by length stays so.
    Source: word dropout, Iyyer et al. 2015, ACL, P15-1162.
    """
    rounded, kept = rng.random(), []
    for row in ids:
        n = int(share * (len(row) - 2) + rounded) if len(row) > 3 else 0
        kept.append(np.delete(row, 1 + rng.choice(len(row) - 2, n, replace=False)).tolist() if n else row)
    return kept


class HelperGone(Exception):
    """A helper has ended by itself or by the system's hand."""


class Helper:
    """A process that computes parts as this one does, on the same weights in shared memory. For CPUs.

    Threads of one process would take turns at Python. Raises HelperGone where the process has ended.
    """

    peak_bytes = 0
    _loaded = False

    def __init__(self, parts: Parts, threads: int) -> None:
        # Started anew, not forked: a copy of a process with threads hangs where one of them held a lock.
        context = torch.multiprocessing.get_context("spawn")
        trainable, backbone = parts.trainable, parts.trainable.engine.backbone
        weights = {name: tensor.detach() for name, tensor in trainable.weights.items()}
        self._gradients = tuple(torch.zeros_like(tensor) for tensor in weights.values())
        for tensor in (*weights.values(), *self._gradients):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        self._pipe, theirs = context.Pipe()
        lengths = torch.tensor([len(row) for row in parts.ids])
        given = (
            backbone.source, next(backbone.model.parameters()).dtype, trainable.layout, trainable.scale,
            trainable.dropout, weights, torch.tensor([token for row in parts.ids for token in row]), lengths,
            parts.targets, parts.of_label, parts.checkpointing,
        )  # fmt: skip
        self._process = context.Process(target=_help, args=(theirs, threads, self._gradients, given))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(_GRACE_SECONDS)
        self._process.kill()  # it has nothing of its own, and may be loading or at work
        self._process.join()

    def wait(self) -> None:
        """Until it has loaded the base."""
        with _or_gone():
            self._loaded = self._loaded or self._pipe.recv()

    def begin(self, part: Part) -> None:
        self.wait()
        with _or_gone():
            self._pipe.send(part)

    def computed(self) -> Computed:
        """Of the part that was begun; its gradients stand until the next is begun."""
        with _or_gone():
            loss, self.peak_bytes = self._pipe.recv()
            return torch.tensor(loss), self._gradients


@contextmanager
def _or_gone() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise HelperGone("a process that computed parts of the batches is gone; memory may have run out.") from error


def peak_bytes() -> int:
    """The largest resident size of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage has begins with the size of whoever started the process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _help(pipe: Connection, threads: int, gradients: tuple[Tensor, ...], given: tuple[Any, ...]) -> None:
    """Ends when the other end of the pipe is closed, however that comes about."""
    for told in (signal.SIGTERM, signal.SIGINT):  # a whole group may be: the other has a step to end
        signal.signal(told, signal.SIG_IGN)
    torch.set_num_threads(threads)
    source, dtype, layout, scale, dropout, weights, tokens, lengths, targets, of_label, checkpointing = given
    engine = Engine(load_backbone(source, device=torch.device("cpu"), dtype=dtype))
    ids = [row.tolist() for row in torch.split(tokens, lengths.tolist())]
    parts = Parts(Trainable(engine, layout, scale, dropout, weights), ids, targets, of_label)
    if checkpointing:
        parts.checkpoint_activations()
    with suppress(EOFError, OSError):
        pipe.send(True)
        while True:
            loss, computed = parts.compute(pipe.recv())
            for kept, gradient in zip(gradients, computed, strict=True):
                kept.copy_(gradient)
            pipe.send((float(loss), peak_bytes()))
