"""How many rows a forward pass may take: from the size of the largest tensor that each of them makes, and from what a
device had no room for."""

import gc
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from lowrank_kit import distributed
from lowrank_kit.deferred import torch

T = TypeVar("T")

log = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 2**27
"""Numbers in the largest tensor of a forward pass: 512 MiB a copy in float32."""


def rows_that_fit(numbers_a_row: int, wanted: int) -> int:
    """Rows of a batch, at most ``wanted`` and at least one, whose largest tensor has ``numbers_a_row`` for each."""
    return fewer(max(1, min(wanted, NUMBERS_AT_ONCE // numbers_a_row)))


@dataclass
class _Tries:
    """``halvings`` of all batches so far, and the ``most`` rows that were read at once since the last of them."""

    halvings: int = 0
    most: int = 1


_tries: ContextVar[_Tries | None] = ContextVar("tries", default=None)


def fewer(rows: int) -> int:
    """So many rows of a batch, or what `within_memory` has left of them."""
    if (tries := _tries.get()) is None:
        return rows
    left = max(1, rows >> tries.halvings)
    tries.most = max(tries.most, left)
    return left


def within_memory(work: Callable[[], T]) -> T:
    """Do ``work``; where the device runs out of memory, again from its start, with batches of half as many rows.

    Only work that changes nothing but files may be done again. Raises `torch.OutOfMemoryError` where rows one by one
    are too much, or several processes work together: they could not agree.
    """
    token = _tries.set(tries := _Tries())
    try:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if tries.most == 1 or distributed.size() > 1:
                    raise
            # Behind the handler: the error holds on to what its frames had.
            tries.halvings, tries.most = tries.halvings + 1, 1
            log.warning("the device is out of memory: again, with batches of 1/%d the rows", 2**tries.halvings)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        _tries.reset(token)


def free_bytes(device: "torch.device") -> int:
    """Memory that is free now: the machine's, or the GPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
