"""The phases of a training step: named ranges that any profiler shows, and that one observer can
follow.

    with phase("encoder"):
        ...

A range costs about a microsecond on the host while nobody looks, and nothing on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.profiler import record_function

# In the order in which a joint step begins them. Each holds what is called inside it, but for the
# phases that begin inside it: the optimizer's updates belong to "optimizer" alone.
PHASES = (
    "encoder",  # features of the frozen encoders
    "vae_forward",
    "reconstruction_losses",  # pixels, KL, LPIPS, and the discriminator's judgement of x_hat
    "alignment",  # the forward pass of the frozen SiT that L_REPA goes through
    "vae_backward",  # of all of these
    "discriminator",  # forward and backward
    "sit",  # forward and backward
    "optimizer",  # clipping, AdamW, EMA
)


class Observer(Protocol):
    """Told when a phase begins and ends; phases may lie inside each other."""

    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...


_observer: Observer | None = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is called inside belongs to the phase `name`, one of `PHASES`."""
    assert name in PHASES, name
    observer = _observer
    with record_function(name):
        if observer:
            observer.begin(name)
        try:
            yield
        finally:
            if observer:
                observer.end(name)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of all phases inside."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
