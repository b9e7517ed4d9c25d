"""Whole renderings on tensors that pretend to be on a GPU and hold nothing: what the host would do is seen by each call
of an operator of torch.

The device is torch's "meta", which the kernels for GPUs are told to serve: any build of torch has it, and autograd runs
there. What makes the host wait for the GPU, what is copied from the host, what mixes devices and what would be launched
is recorded."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdrr.geometry import precision
from diffdrr.kernels import autograd, dispatch

OPERATORS = ("render", "render_with_slopes", "ray_gradient", "weigh", "backproject")
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "_linalg_check_errors"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "sym_size"}
MOVES = {"_to_copy", "copy_", "index", "index_put_"}
PACKAGE = Path(dispatch.__file__).parents[1]


@dataclass
class Record:
    "What the host did."

    launches: list[str] = field(default_factory=list)  # operators that start a kernel of torch
    kernels: list[str] = field(default_factory=list)  # of this package
    copies: list[str] = field(default_factory=list)  # from the host, and where in the package
    waits: list[str] = field(default_factory=list)


def caller() -> str:
    "Say where in the package an operator was called."
    places = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
    return f"{Path(places[-1].filename).name}:{places[-1].name}" if places else "?"


class Watch(TorchDispatchMode):
    "Write down what operators do."

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, options = function._schema.name.split("::")[-1], options or {}
        given = tensors_in((arguments, options))
        if any(x.is_meta for x in given) and waits(name, given, options):
            self.record.waits.append(f"{name} at {caller()}")
        result = function(*arguments, **options)
        if any(x.is_meta for x in tensors_in(result)):
            self.see_launch(function, name, given)
        return result

    def see_launch(self, function: torch._ops.OpOverload, name: str, given: list[torch.Tensor]) -> None:
        "Count it, and find copies from the host. A number there, without a dimension, travels with the launch."
        if any(not x.is_meta and (x.dim() or name in MOVES) for x in given):
            self.record.copies.append(f"{name} at {caller()}")
        if not function.is_view and name not in ALLOCATES:
            self.record.launches.append(name)


def waits(name: str, given: list[torch.Tensor], options: dict) -> bool:
    "Say whether the host has to know what an operator finds."
    by_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given[1:])
    to_host = name == "_to_copy" and torch.device(options.get("device") or "meta").type != "meta"
    return name in WAITS or by_mask or to_host


class WatchFactories(TorchFunctionMode):
    "Find tensors that are made of numbers of Python, on the host; `torch.full` makes them on the GPU."

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if made and result.is_meta and not any(x.is_meta for x in tensors_in(arguments[:1])):
            self.record.copies.append(f"{function.__name__} at {caller()}")
        return result


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def undeclared(name: str):
    "Do what an operator of the kernels does, without torch in between."

    def operation(module, *arguments):
        return getattr(import_module(f"diffdrr.kernels.{module}"), name)(*arguments)

    return operation


@contextmanager
def watching() -> Iterator[Record]:
    "Record what is done on the pretended GPU, with the kernels left out."
    from diffdrr.kernels.gpu import launch

    record, is_full, autocast = Record(), precision.is_full, torch.autocast

    def leave_out(kernel, *_, **__):
        record.kernels.append(getattr(kernel, "__name__", str(kernel)))

    with ExitStack() as stack:
        for name in OPERATORS:
            stack.enter_context(patch.object(autograd, name, undeclared(name)))
        stack.enter_context(patch.object(launch, "start", leave_out))
        stack.enter_context(patch.object(precision, "is_full", lambda _: is_full("cuda")))
        stack.enter_context(patch.object(torch, "autocast", lambda _, **options: autocast("cpu", **options)))
        stack.enter_context(patch.dict(dispatch.DEVICES, triton="meta"))
        stack.enter_context(WatchFactories(record))
        stack.enter_context(Watch(record))
        yield record
