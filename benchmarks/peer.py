"""What a peer is, and how one is made of a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]
Peer = Callable[[Any, torch.device], Function]
"""Takes the shape and the device and gives the function that is timed; what a program would prepare
once, as masks, is prepared there.
"""

COMPILING = ("torch_compile", "torch_flex")
"""Peers that compile at run time, which takes seconds for each shape."""


class Absent(Exception):
    """The peer cannot run here; the message says why."""


def module(name: str) -> Any:
    """An optional package, or Absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name.partition('.')[0]} cannot be imported: {error}") from error


def always(function: Function) -> Peer:
    """The peer that is this function whatever the shape."""
    return lambda shape, device: function


def compiled(peer: Peer) -> Peer:
    """torch.compile of a plain formula, for one static shape; a graph that breaks is an error."""

    def build(shape: Any, device: torch.device) -> Function:
        torch._dynamo.reset()  # what other shapes left behind counts towards its limit
        return torch.compile(peer(shape, device), dynamic=False, fullgraph=True)

    return build


def on_cuda(peer: Peer, name: str) -> Peer:
    def build(shape: Any, device: torch.device) -> Function:
        if device.type != "cuda":
            raise Absent(f"{name} runs on CUDA only")
        return peer(shape, device)

    return build
