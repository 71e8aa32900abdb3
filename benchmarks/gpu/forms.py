"""What else a card is used with: float16, each implementation of attention, device maps, two processes on one card.

The small model throughout. Mean losses are held against those of float32 on the same device; a form that is not
installed is named as such.
"""

import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from part import Figures, Part
from transformers import AutoModelForCausalLM

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.pipeline import execute

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def main() -> None:
    part = Part(__doc__ or "")
    with part.scratch() as folder:
        checkpoint = Path(folder, "run/checkpoint")
        part.measure("svd_llm, float16", partial(in_half, part, checkpoint.parent))
        for name in ATTENTION:
            part.measure(f"attention, {name}", partial(by_attention, part, name))
        part.measure("device_map of a compressed checkpoint", partial(spread, part, checkpoint))
        part.measure("two processes", partial(two_processes, part, Path(folder)))
    part.finish()


def in_half(part: Part, run: Path) -> Figures:
    """Compressed in float16 by the command, evaluation included."""
    words = ("method=svd_llm", f"device={part.device}", "dtype=float16", f"run.dir={run}", "calibration.cache=false")
    [config] = Composer().jobs(force_dotted(part.words(*words, "run.stages=[calibrate,plan,apply]")), multirun=False)
    execute(config)
    return {name: judged(part, run / "checkpoint", dtype=getattr(torch, name)) for name in ("float16", "float32")}


def by_attention(part: Part, name: str) -> Figures:
    """The dense model in bfloat16 by one implementation of attention."""
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        return {"left out": "flash_attn is not installed"}
    if name == "flex_attention" and part.rehearses:
        return {"left out": "compiles"}
    model = AutoModelForCausalLM.from_pretrained(
        part.small / "model", dtype=torch.bfloat16, attn_implementation=name
    ).to(part.device)
    return {"nll": perplexity(model, windows(part), batch_size=4, device=part.device).nll}


def spread(part: Part, checkpoint: Path) -> Figures:
    """Loaded by plain transformers, placed by accelerate."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.float32, device_map="auto"
    )
    nll = perplexity(model, windows(part), device=part.device).nll
    return {"nll": nll, "devices": sorted({str(parameter.device) for parameter in model.parameters()})}


def two_processes(part: Part, folder: Path) -> Figures:
    """Calibration shared by two processes: on one card they cannot talk by NCCL, so that gloo and the CPU remain."""
    words = part.words(
        "method=svd_llm", "device=cpu", "runtime=ddp", f"run.dir={folder / 'two'}", "calibration.cache=false"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "lowrank_kit.run", *words, "run.stages=[calibrate,plan,apply]"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return {"nll": judged(part, folder / "two/checkpoint")}


def judged(part: Part, folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Mean negative log-likelihood of a checkpoint."""
    model = load_model(ModelSource(str(folder)), "causal", dtype, part.device).model
    return perplexity(model, windows(part), device=part.device).nll


def windows(part: Part) -> torch.Tensor:
    """Text that nobody calibrated on."""
    text = (part.small / "data/text/mine/test.txt").read_text("utf-8")
    ids = torch.tensor(load_tokenizer(ModelSource(str(part.small / "model")))(text, verbose=False)["input_ids"])
    count, length = part.pick((16, 256), (4, 32))
    return ids[: count * length].view(count, length)


if __name__ == "__main__":
    main()
