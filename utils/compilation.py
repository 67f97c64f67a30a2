"""torch.compile, as this project uses it."""

import inspect
from typing import Any

import torch
import torch.nn as nn

# What makes code of the graphs. The tests that count graphs choose "aot_eager", which makes none.
BACKEND = "inductor"
# Graphs kept for one network: modes of training, and sizes of previews and evaluations. What comes
# after these runs uncompiled.
MOST_GRAPHS = 16
MOST_NETWORKS = 8  # of a run


def compile_network(net: nn.Module, *methods: str, cuda_graphs: bool = False) -> None:
    """Compile `forward` of `net`, and `methods` of it that are called alone, when they are first
    called; `net` stays the same module.

    Shapes are static: a preview of few images must not make the graph of a training step one for
    any number of images. `cuda_graphs`: `forward` is replayed as CUDA graphs, whose results last
    until the next `begin_step`; the methods are not, as they are called between steps as well.
    """
    mode = "reduce-overhead" if cuda_graphs else None
    net.compile(**_options(mode))
    for name in methods:
        setattr(net, name, torch.compile(getattr(net, name), **_options(None)))


def begin_step() -> None:
    """What CUDA graphs gave in the last step may be overwritten; all that they give from now on is
    kept, also when a network runs several times, until this is called again."""
    torch.compiler.cudagraph_mark_step_begin()


def list_length(config: Any) -> str:
    """What torch._dynamo calls the length of that list in its config."""
    return "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"


def _options(mode: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False}
    if BACKEND == "inductor":
        options["mode"] = mode
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.14
        # networks of one class, and an EMA, would share one short list of graphs
        options |= {"isolate_recompiles": True, "recompile_limit": MOST_GRAPHS}
    else:  # they do: the list is to be long enough for all of them
        from torch._dynamo import config as dynamo  # takes seconds to import

        setattr(dynamo, list_length(dynamo), MOST_NETWORKS * MOST_GRAPHS)
    return options
