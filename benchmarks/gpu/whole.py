"""Llama-2-7B's shape whole, in bfloat16: start of an adapter, attribution, compression, resident and streamed.

The weights are random and made on the device; all read 128 windows of 2048 random tokens. The aims on one card are 60 s
for Astra's start, 120 s for GRASP, 300 s for a compression, and 24 GiB. Streamed, the ordinary command compresses a
checkpoint on disk.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import astra_init
import compress
import grasp
import streamed
import torch
from part import LLAMA_2_7B, NARROW, Figures, Part

BLOCKS = 32


def main() -> None:
    part = Part(__doc__ or "")
    windows, blocks = part.windows(*part.pick((128, 2048), (4, 64))), part.pick(BLOCKS, 3)
    part.measure("astra", partial(astra, part, blocks, windows))
    part.measure("grasp", partial(removed, part, blocks, windows))
    part.measure("svd_llm", partial(resident, part, blocks, windows))
    part.measure("svd_llm, streamed", partial(from_disk, part, blocks))
    part.finish()


def astra(part: Part, blocks: int, windows: torch.Tensor) -> Figures:
    """An adapter of rank 128 on every linear, ready to train."""
    model, rank, clock = part.llama(blocks), part.pick(128, 8), compress.Clock()
    with clock("start"):
        astra_init.initialise_astra(model, list(windows), rank)
    return {"blocks": blocks, "rank": rank, **clock.seconds}


def removed(part: Part, blocks: int, windows: torch.Tensor) -> Figures:
    """GRASP by one backward pass; about a third of the blocks is redundant."""
    model, clock = part.llama(blocks), compress.Clock()
    settings = Namespace(batch_size=4, redundant=blocks // 3)
    with clock("all"):
        chosen = grasp.compress(model, windows, settings, propagate=False)
    return {"blocks": blocks, "redundant": sorted(chosen), **clock.seconds}


def resident(part: Part, blocks: int, windows: torch.Tensor) -> Figures:
    """SVD-LLM at ratio 0.2."""
    model, clock = part.llama(blocks), compress.Clock()
    with part.scratch() as cache, clock("all"):
        compress.compress(model, compress.svd_llm(0.2), part.samples(windows), Path(cache), clock)
    return {"blocks": blocks, "phases": dict(clock.seconds)}


def from_disk(part: Part, blocks: int) -> Figures:
    """SVD-LLM at ratio 0.2 by the command, a block in memory at a time."""
    sizes, threads = part.pick(LLAMA_2_7B, NARROW), torch.get_num_threads()
    with part.scratch() as folder:
        settings = {
            **{"hidden": sizes["hidden_size"], "inner": sizes["intermediate_size"], "dtype": "bfloat16"},
            **{"heads": sizes["num_attention_heads"], "vocabulary": sizes["vocab_size"], "method": "svd_llm"},
            **{"ratio": 0.2, "samples": part.pick(128, 4), "seq_len": part.pick(2048, 64), "threads": threads},
            **{"folder": Path(folder), "device": part.device},
        }
        return streamed.compress(Namespace(**settings), blocks)


if __name__ == "__main__":
    main()
