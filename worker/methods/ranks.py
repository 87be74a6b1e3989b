"""Ranks: processes, with a GPU each where there are, that train one model together.

They find each other by the variables that `torchrun` sets. Rank 0 is the job's own process: order of rows, optimizer,
validation and checkpoints are its. Each other holds the same frozen base; at every step it is told the weights and its
parts of the batch, and adds its gradients to the sum. So a checkpoint fits any number of ranks.
"""

import atexit
import gc
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from service.core import logs
from service.ml.adapter import Layout
from service.ml.backbone import load_backbone
from service.ml.base_models import locate_at
from service.ml.device import pick_device
from service.ml.engine import Engine
from worker.methods.parts import Computed, HelperGone, Part, Parts
from worker.methods.trainable import Trainable

log = logging.getLogger("tuneproof.worker")
_WAIT = timedelta(days=30)  # rank 0 prompts and judges meanwhile; whoever starts ranks ends all when one has died


def world_size() -> int:
    """How many ranks this job has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this process is."""
    return int(os.environ.get("RANK", "0"))


@cache
def meeting_place() -> Any:
    """The store by which the ranks find each other; rank 0 opens it. To be asked for early: its port may be taken.

    Raises HelperGone where another process has taken the port.
    """
    with _or_gone():
        store, _rank, _world_size = next(rendezvous("env://", timeout=_WAIT))
        return store


def _first_is_there() -> bool:
    try:
        meeting_place().num_keys()
    except (HelperGone, RuntimeError):
        return False
    return True


class Ranks:
    """All ranks, as rank 0 sees them.

    Raises HelperGone, from any method, where one of them has ended.
    """

    def __init__(self, parts: Parts) -> None:
        trainable, backbone = parts.trainable, parts.trainable.engine.backbone
        _join(backbone.device)
        self._parts = parts
        known = {
            "base": backbone.source.base.name, "revision": backbone.source.revision,
            "dtype": str(next(backbone.model.parameters()).dtype), "layers": trainable.layout.layers,
            "scale": trainable.scale, "dropout": trainable.dropout, "weights": list(trainable.weights),
        }  # fmt: skip
        lengths = torch.tensor([len(row) for row in parts.ids])
        tokens = torch.tensor([token for row in parts.ids for token in row])
        _tell(known, [lengths, tokens, parts.targets, parts.of_label, *self._weights])

    @property
    def _weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self._parts.trainable.weights.values()]

    def compute(self, parts: Sequence[Part]) -> Computed:
        """The sum over all parts; each rank takes every so-manieth. Raises torch.OutOfMemoryError where one ran out."""
        step = {
            "checkpointing": self._parts.checkpointing,
            "parts": [(len(part.rows), part.whole, part.seed) for part in parts],
        }
        _tell(step, [torch.cat([torch.from_numpy(part.rows) for part in parts]), *self._weights])
        return _sum_over_ranks(self._parts, parts)


def follow(folder: Path) -> int:
    """Any rank but 0: does as it is told until rank 0 is gone. Gives the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a whole group may be told: rank 0 has a step to end
        signal.signal(number, signal.SIG_IGN)
    models_dir = json.loads((folder / "job.json").read_text(encoding="utf-8")).get("models_dir")
    device, parts = pick_device(), None
    try:
        _join(device)
        while "over" not in (given := _told(device))[0]:
            told, tensors = given
            if "base" in told:
                parts = None  # two bases may not fit
                gc.collect()
                torch.cuda.empty_cache()
                parts = _set_up(told, tensors, Path(models_dir) if models_dir else None, device)
            elif parts is not None:
                _take_part(parts, told, *tensors)
    except HelperGone as error:
        if _first_is_there():  # it would wait for this rank for ever
            log.error("rank %d fails\n%s", rank(), logs.where(error.__cause__ or error))
            return os.EX_TEMPFAIL
    return 0


def _set_up(told: dict[str, Any], tensors: list[Tensor], models_dir: Path | None, device: torch.device) -> Parts:
    lengths, tokens, targets, of_label, *weights = tensors
    dtype: torch.dtype = getattr(torch, told["dtype"].removeprefix("torch."))
    source = locate_at(told["base"], told["revision"], models_dir)
    engine = Engine(load_backbone(source, device=device, dtype=dtype))
    layout = Layout(tuple((name, rank, n_in, n_out) for name, rank, n_in, n_out in told["layers"]))
    named = dict(zip(told["weights"], weights, strict=True))
    ids = [row.tolist() for row in torch.split(tokens, lengths.tolist())]
    return Parts(Trainable(engine, layout, told["scale"], told["dropout"], named), ids, targets, of_label)


def _take_part(parts: Parts, told: dict[str, Any], rows: Tensor, *weights: Tensor) -> None:
    if told["checkpointing"] and not parts.checkpointing:
        parts.checkpoint_activations()
    parts.trainable.load(dict(zip(parts.trainable.weights, weights, strict=True)))
    pieces = torch.split(rows, [n for n, _whole, _seed in told["parts"]])
    asked = zip(pieces, told["parts"], strict=True)
    try:
        _sum_over_ranks(parts, [Part(piece.numpy(), whole, seed) for piece, (_n, whole, seed) in asked])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()  # rank 0 has raised it too, and asks for less


def _sum_over_ranks(parts: Parts, whole: Sequence[Part]) -> Computed:
    """Loss and gradients of all the parts, of which this rank computes its own."""
    weights = list(parts.trainable.weights.values())
    sizes = [1, *(weight.numel() for weight in weights)]
    failed = torch.zeros(1)
    try:
        summed = torch.zeros(sum(sizes), device=weights[0].device)
        for part in whole[dist.get_rank() :: dist.get_world_size()]:
            loss, gradients = parts.compute(part)
            summed += torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
    except torch.OutOfMemoryError:
        failed += 1
    with _or_gone():
        dist.all_reduce(failed)
        if failed:
            raise torch.OutOfMemoryError("on one of the ranks")
        dist.all_reduce(summed)
    loss, *pieces = torch.split(summed, sizes)
    return loss[0], tuple(piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True))


def _join(device: torch.device) -> None:
    """Waits for all ranks. NCCL, unless some of them share a GPU."""
    if dist.is_initialized():
        return
    n_here, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % n_gpus)
    with _or_gone():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if n_here <= n_gpus else "gloo", timeout=_WAIT,
            store=meeting_place(), rank=rank(), world_size=world_size(),
        )  # fmt: skip
    atexit.register(_leave)


def _leave() -> None:
    if rank() == 0:
        with suppress(HelperGone):
            _tell({"over": True}, [])
    dist.destroy_process_group()  # or its threads may end the process by an abort


def _tell(message: dict[str, Any], tensors: Sequence[Tensor]) -> None:
    """To every other rank. JSON and numbers: nothing is read by pickle."""
    message["tensors"] = [(str(tensor.dtype), tensor.shape, tensor.device.type == "cpu") for tensor in tensors]
    text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    with _or_gone():
        for tensor in (torch.tensor([len(text)]), text, *tensors):
            dist.broadcast(tensor.contiguous(), 0)


def _told(device: torch.device) -> tuple[dict[str, Any], list[Tensor]]:
    """What rank 0 tells."""
    with _or_gone():
        dist.broadcast(size := torch.zeros(1, dtype=torch.int64), 0)
        dist.broadcast(text := torch.zeros(int(size), dtype=torch.uint8), 0)
        message, tensors = json.loads(bytes(text.tolist())), []
        for dtype, shape, on_cpu in message.pop("tensors"):
            kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
            tensors.append(torch.zeros(shape, dtype=kind, device="cpu" if on_cpu else device))
            dist.broadcast(tensors[-1], 0)
        return message, tensors


@contextmanager
def _or_gone() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.distributed has no narrower one for a peer that closed its connection
        raise HelperGone("a process that trains the same model is gone.") from error
