"""How many rows a forward pass may take, from the size of the largest tensor that each of them makes."""

from lowrank_kit.deferred import torch

NUMBERS_AT_ONCE = 2**27
"""Numbers in the largest tensor of a forward pass: 512 MiB a copy in float32."""


def rows_that_fit(numbers_a_row: int, wanted: int) -> int:
    """Rows of a batch, at most ``wanted`` and at least one, whose largest tensor has ``numbers_a_row`` for each."""
    return max(1, min(wanted, NUMBERS_AT_ONCE // numbers_a_row))


def free_bytes(device: "torch.device") -> int:
    """Memory that is free now: the machine's, or the GPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
