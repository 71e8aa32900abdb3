"""Methods at Llama-2-7B's widths on few blocks, and their ratio to the published procedure: what a block costs.

Compressions read 128 windows of 2048 random tokens; their phases are seconds of two blocks, and 32 take sixteen times
as much. Published procedures take two blocks, GRASP's four; in float32 and with 32 windows, but for CorDA.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import astra_init
import compress
import grasp
import torch
from part import Figures, Part

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.models.factored import ranks_of

RATIO = 0.2
FEW = 2


def main() -> None:
    part = Part(__doc__ or "")
    windows = part.windows(*part.pick((128, 2048), (4, 64)))
    with part.scratch() as cache:
        # Both read one decomposition: the second shows what another allocation or ratio costs.
        for method in ("svd_llm", "hisvd", "kfac_svd"):
            part.measure(method, partial(compressed, part, method, windows, Path(cache)))
    settings = Namespace(batch_size=4, redundant=1, full_backward=False)
    part.measure(
        "grasp, published / ours", partial(grasp_against_published, part, windows[: part.pick(32, 4)], settings)
    )
    part.measure("astra, corda / ours", partial(astra_against_corda, part, windows))
    part.measure("svd_llm, published / ours", partial(against_published, part, windows[: part.pick(32, 4)]))
    part.finish()


def compressed(part: Part, name: str, windows: torch.Tensor, cache: Path) -> Figures:
    """Seconds of every phase of a compression by its name."""
    model, clock = part.llama(FEW), compress.Clock()
    [config] = Composer().jobs(force_dotted([f"method={name}", f"method.ratio={RATIO}", *part.words()]), multirun=False)
    compress.compress(model, config.method, part.samples(windows), cache, clock)
    found = dict(clock.seconds)
    found[compress.FORWARD] -= found.get(compress.DECOMPOSITION, 0.0) + found.get(compress.CACHE, 0.0)
    return {"blocks": FEW, "phases": found, "factored": len(ranks_of(model))}


def against_published(part: Part, windows: torch.Tensor) -> Figures:
    """SVD-LLM in float32, ours and as published."""
    blocks, found = FEW, {}
    for name in ("ours", "published"):
        model, clock = part.llama(blocks, torch.float32), compress.Clock()
        with part.scratch() as cache, clock("all"):
            if name == "ours":
                compress.compress(model, compress.svd_llm(RATIO), part.samples(windows, 4), Path(cache), clock)
            else:
                compress.compress_as_published(model, windows.to(part.device), RATIO, clock)
        found[name] = dict(clock.seconds)
        del model
    return {"blocks": blocks, **found, "ratio": found["published"]["all"] / found["ours"]["all"]}


def grasp_against_published(part: Part, windows: torch.Tensor, settings: Namespace) -> Figures:
    """GRASP on four blocks in float32: our one pass, and the published loop."""
    blocks, clock = 4, compress.Clock()
    model = part.llama(blocks, torch.float32)
    with clock("ours"):
        ours = grasp.compress(model, windows, settings, propagate=False)
    model = part.llama(blocks, torch.float32)
    with clock("published"):
        published = grasp.compress_as_published(model, windows.to(part.device), settings)
    found = dict(clock.seconds)
    return {"blocks": blocks, **found, "ratio": found["published"] / found["ours"], "same blocks": ours == published}


def astra_against_corda(part: Part, windows: torch.Tensor) -> Figures:
    """The start of an adapter of rank 128 on every linear: Astra's, and CorDA's by PEFT."""
    blocks, rank, clock = FEW, part.pick(128, 8), compress.Clock()
    starts = {"astra": astra_init.initialise_astra, "corda": astra_init.initialise_peft_corda}
    for name, start in starts.items():
        model = part.llama(blocks)
        sequences = list(windows) if name == "astra" else list(windows.to(part.device))
        with clock(name):
            start(model, sequences, rank)
        del model
    found = dict(clock.seconds)
    return {"blocks": blocks, "rank": rank, **found, "ratio": found["corda"] / found["astra"]}


if __name__ == "__main__":
    main()
