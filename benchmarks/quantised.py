"""Quantisers of the ecosystem on the dense model and on a factored one: perplexity on held-out text, and bytes.

    python -m lowrank_kit.export RUN --format serve --multiple 32 --output FOLDER
    python benchmarks/quantised.py FOLDER --text ROWS.jsonl [--ways int8 int4 bnb8 nf4 gptq awq] [--windows 4]

Every model is quantised (the linears of the blocks alone), saved, loaded anew by transformers, and measured as loaded.
Bytes are those of the tensors of the blocks in the files. The first windows of the text are measured on; gptq and awq
are calibrated on those behind them. What does not run is shown with its error. gptq and awq need llm-compressor, which
pins an older transformers: an environment of its own. torchao keeps 4 bits in a byte each
where a device has no kernel for packed ones, as a CPU has none.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import lowrank_kit  # noqa: F401  (registers the factored model's type)
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.load import ModelSource, load_model, local_path
from lowrank_kit.models.quantised import load_torchao
from lowrank_kit.runs.provenance import in_words, parse_study

MODEL = "packaged://smollm2_135m"
LENGTH, CALIBRATION, GROUP = 512, 8, 32


def main() -> None:
    arguments = _arguments()
    print(in_words(arguments.provenance), end="\n\n")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(local_path(ModelSource(MODEL)))
    rows = (json.loads(line)["text"] for line in arguments.text.read_text().splitlines())
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    windows = ids[: LENGTH * (arguments.windows + CALIBRATION)].view(-1, LENGTH)
    measured, calibration = windows[: arguments.windows], windows[arguments.windows :]
    print(f"{len(measured)} windows of {LENGTH} tokens of {arguments.text.name}\n")
    print("| model | quantised by | perplexity | s.e. | / dense | MB of the blocks |\n|---|---|---|---|---|---|")
    first = None
    with TemporaryDirectory() as folder:
        save_compressed(load_model(ModelSource(MODEL), "causal", torch.float32).model, Path(folder, "dense"))
        for name, path in (("dense", Path(folder, "dense")), (arguments.checkpoint.name, arguments.checkpoint)):
            for way in ("nothing", *arguments.ways):
                saved = Path(folder, f"{name}-{way}")
                try:
                    if way == "nothing":
                        saved = path
                    else:
                        WAYS[way](path, calibration).save_pretrained(saved)
                    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
                    found = perplexity(model, measured)
                # What a tool of others raises where it cannot.
                except Exception as error:
                    print(
                        f"| {name} | {way} | {type(error).__name__}: {' '.join(str(error).split())[:300]} | | | |",
                        flush=True,
                    )
                    continue
                first = first or found.value
                print(f"| {name} | {way} | {found.value:.2f} | {found.stderr:.2f} | {found.value / first:.3f} | "
                      f"{block_bytes(saved) / 1e6:.1f} |", flush=True)  # fmt: skip


def by_torchao(bits: int) -> Callable[[Path, Tensor], PreTrainedModel]:
    return lambda path, _: load_torchao(str(path), None, bits, GROUP, torch.float32)


def by_bitsandbytes(**options: object) -> Callable[[Path, Tensor], PreTrainedModel]:
    kind = BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])
    return lambda path, _: AutoModelForCausalLM.from_pretrained(path, quantization_config=kind, dtype=torch.float32)


def by_llm_compressor(method: str) -> Callable[[Path, Tensor], PreTrainedModel]:
    """4 bits in the same groups, symmetric, as vLLM serves them (compressed-tensors)."""

    def quantise(path: Path, calibration: Tensor) -> PreTrainedModel:
        from datasets import Dataset
        from llmcompressor import oneshot

        scheme = {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
        if method == "gptq":
            from llmcompressor.modifiers.gptq import GPTQModifier as Modifier
        else:
            from llmcompressor.modifiers.awq import AWQModifier as Modifier
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rows = Dataset.from_dict(
            {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
        )
        recipe = [Modifier(config_groups={"blocks": scheme}, ignore=["lm_head"])]
        oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=LENGTH, num_calibration_samples=len(rows))
        return model

    return quantise


WAYS = {
    "int8": by_torchao(8),
    "int4": by_torchao(4),
    "bnb8": by_bitsandbytes(load_in_8bit=True),
    "nf4": by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "gptq": by_llm_compressor("gptq"),
    "awq": by_llm_compressor("awq"),
}


def block_bytes(folder: Path) -> int:
    """Of the tensors in the files that are the blocks'."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if ".layers." in name:
                    tensor = tensors.get_tensor(name)
                    found += tensor.numel() * tensor.element_size()
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a factored checkpoint of the same model")
    parser.add_argument("--text", type=Path, required=True, metavar="ROWS.jsonl", help="rows with a column `text`")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    return parse_study(parser)


if __name__ == "__main__":
    main()
