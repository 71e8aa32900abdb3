"""PEFT's comparison of methods on MetaMathQA for the starts that read weights or data first, in its result schema.

    python experiments/peft_metamath/run.py [--methods astra pissa ...] [--experiment peft_metamath] [--runs FOLDER]
        [--results FOLDER] [--limit ROWS] [--batch-size ROWS] [OVERRIDE ...]

Each method is a run of `python -m lowrank_kit.run experiment=peft_metamath method=NAME`, found again and continued by
its configuration. Its adapter is then loaded by PEFT alone onto the original base, answers the test rows of GSM8K, and
reads 100 texts of Wikipedia beside the base. ``FOLDER/NAME.json`` has what PEFT's own script writes (`run_info`,
`train_info`, `meta_info`), and under ``lowrank_kit`` what it has not.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.data.sources import DatasetRef, PackagedSource, open_source
from lowrank_kit.files import read_json, read_yaml
from lowrank_kit.models.load import ModelSource, load_tokenizer, local_path
from lowrank_kit.runs.provenance import origin, parse_study

METHODS = ["lora", "astra", "pissa", "milora", "olora", "corda", "eva", "lora_ga"]
MAX_LENGTH = 768
WIKIPEDIA_TEXTS, TEXTS_AT_ONCE = 100, 4
# Of the last steps, of those that were logged, the mean loss is told.
STEPS_AVERAGED = 250
# What stands before an answer: in MetaMathQA, then in GSM8K. The first of these that occurs counts.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def main() -> None:
    arguments = _arguments()
    for method in arguments.methods:
        folder = (arguments.runs / f"{arguments.experiment}-{method}").resolve()
        words = [f"experiment={arguments.experiment}", f"method={method}", *arguments.overrides, f"run.dir={folder}"]
        started = datetime.now(UTC).replace(microsecond=0)
        subprocess.run([sys.executable, "-m", "lowrank_kit.run", *words], check=True)
        result = judged(folder, started.isoformat(), arguments)
        arguments.results.mkdir(parents=True, exist_ok=True)
        file = arguments.results / f"{method}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
        [*_, last] = result["train_info"]["metrics"]
        print(f"{method}: accuracy {last['test accuracy']:.4f}, forgetting {last['forgetting']:.4f} -> {file}")


def judged(folder: Path, started: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of a finished run."""
    config, manifest = read_yaml(folder / "config.yaml"), read_json(folder / "manifest.json", dict)
    settings = config["model"]
    source = ModelSource(settings["path"], settings.get("revision"), settings.get("gguf_file"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.get("dtype", "float32"))
    base = AutoModelForCausalLM.from_pretrained(local_path(source), revision=source.revision, dtype=dtype).to(device)
    tokenizer = load_tokenizer(source)
    texts = wikipedia(config["data"]["source"])
    before = losses(base, tokenizer, texts)
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    after = losses(model, tokenizer, texts)
    rows = open_source(config["data"]["source"], config["data"].get("root")).load(
        DatasetRef("gsm8k", "openai/gsm8k", "main"), "test"
    )
    prompt = next(iter(config["task"]["instructions"].values()))["prompt"]
    asked = rows.dataset.select(range(min(arguments.limit or len(rows.dataset), len(rows.dataset))))
    answers = list(generate(model, tokenizer, prompt, asked["question"], arguments.batch_size))
    accuracy = sum(map(is_right, answers, asked["answer"])) / len(asked)
    train, plan = config["train"], read_json(folder / "plan.json", dict)
    history = read_json(folder / "history.json", list)
    steps = history[-1]["step"]
    late = [entry["loss"] for entry in history if "loss" in entry and entry["step"] > steps - STEPS_AVERAGED]
    seconds = {stage: facts["seconds"] for stage, facts in manifest["stages"].items()}
    memory = manifest["stages"]["train"].get("peak_cuda_bytes", 0)
    metrics = {
        "step": steps,
        "test accuracy": accuracy,
        "train loss": sum(late) / len(late),
        "train samples": steps * train["batch_size"],
        "forgetting": after["unshifted"] - before["unshifted"],
    }
    return {
        "run_info": {
            "created_at": started,
            "total_time": sum(seconds.values()),
            "experiment_name": f"lora/{settings['name']}-{config['method']['name']}",
            "peft_branch": "lowrank_kit",
            "train_config": {
                "model_id": settings["path"],
                "dtype": config.get("dtype", "float32"),
                "max_seq_length": config["task"]["max_length"],
                "batch_size": train["batch_size"],
                "batch_size_eval": arguments.batch_size,
                "max_steps": steps,
                "seed": config["seed"],
                "grad_norm_clip": train.get("max_grad_norm", 1.0),
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": train["learning_rate"], "weight_decay": train["weight_decay"]},
                "lr_scheduler": train["scheduler"],
                "query_template": prompt.replace("{instruction}", "{query}"),
                "generation_kwargs": {"max_length": MAX_LENGTH},
            },
            "peft_config": read_json(folder / "adapter/adapter_config.json", dict),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": seconds["train"],
            "file_size": (folder / "adapter/adapter_model.safetensors").stat().st_size,
            "num_trainable_params": plan["trained_parameters"],
            "num_total_params": sum(p.numel() for p in model.parameters()),
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": {"sha": manifest["model"]["fingerprint"], "created_at": None},
            "dataset_info": {name: {"sha": facts["sha256"]} for name, facts in manifest["data"].items()},
            "package_info": {f"{name}-version": version for name, version in manifest["versions"].items()},
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "accelerator": torch.cuda.get_device_name() if device == "cuda" else "none",
            },
            "pytorch_info": torch.__config__.show(),
        },
        "lowrank_kit": {
            "provenance": arguments.provenance,
            "run": origin(folder),
            "seconds": seconds,
            "test rows": len(asked),
            "next-token loss, before and after": [before["next token"], after["next token"]],
        },
    }


def wikipedia(source: str) -> list[str]:
    """The first texts of FineWiki, as PEFT takes them; without the hub those of the packaged Wikipedia paragraphs."""
    if source == "hub":
        rows = datasets.load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True)
        return [row["text"] for row in rows.take(WIKIPEDIA_TEXTS)]
    return PackagedSource().load(DatasetRef("text/wikipedia"), "test").dataset["text"][:WIKIPEDIA_TEXTS]


@torch.inference_mode()
def losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, float]:
    """Mean losses over the tokens of some texts, in nats.

    `next token` is that of every token from those before it. `unshifted` is what PEFT's script computes: the logits at
    a token against that token itself, which they do not predict. Its table says `forgetting` of that one.
    """
    totals, counts = {"next token": 0.0, "unshifted": 0.0}, {"next token": 0, "unshifted": 0}
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = tokenizer(
            list(texts[start : start + TEXTS_AT_ONCE]),
            truncation=True, max_length=MAX_LENGTH, padding=True, padding_side="left", return_tensors="pt",
        ).to(model.device)  # fmt: skip
        logits = model(**batch).logits
        for row, tokens, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
            row, tokens = row[mask.bool()].float(), tokens[mask.bool()]
            for name, loss in (
                ("next token", cross_entropy(row[:-1], tokens[1:], reduction="sum")),
                ("unshifted", cross_entropy(row, tokens, reduction="sum")),
            ):
                totals[name] += loss.item()
                counts[name] += len(tokens) - (name == "next token")
    return {name: totals[name] / counts[name] for name in totals}


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, questions: Sequence[str], batch_size: int
) -> Iterator[str]:
    """The likeliest answers to questions that stand in the place of ``{instruction}``, each behind its prompt."""
    settings = GenerationConfig(max_length=MAX_LENGTH, pad_token_id=tokenizer.pad_token_id)
    settings.eos_token_id = tokenizer.eos_token_id
    for start in range(0, len(questions), batch_size):
        prompts = [prompt.replace("{instruction}", question) for question in questions[start : start + batch_size]]
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        yield from tokenizer.batch_decode(model.generate(**batch, generation_config=settings), skip_special_tokens=True)


def is_right(generated: str, reference: str) -> bool:
    """Whether the last answer in a generated text is that of the reference, as a number if both are numbers."""
    found, expected = final_answer(generated), final_answer(reference)
    if expected is None:
        raise ValueError(f"no answer in the reference: {reference!r}")
    if found is None:
        return False
    number, right = as_number(found), as_number(expected)
    return found == expected if right is None else number == right


def final_answer(text: str) -> str | None:
    """What stands behind the last mark, up to the line's end, without what surrounds a number; None without a mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")


def as_number(text: str) -> float | None:
    """A decimal number or a fraction of two, as a float; None for anything else, such as 1,000."""
    parts = text.split("/")
    try:
        numerator, denominator = Decimal(parts[0].strip()), Decimal(parts[1].strip()) if len(parts) > 1 else Decimal(1)
        return float(numerator / denominator) if len(parts) <= 2 else None
    except (InvalidOperation, ZeroDivisionError):
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of every run, as for lowrank_kit.run")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--experiment", default="peft_metamath", choices=["peft_metamath", "peft_metamath_small"])
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--limit", type=int, metavar="ROWS", help="of the test set; all if not given")
    parser.add_argument(
        "--batch-size", type=int, default=51, metavar="ROWS", help="of generation (default: %(default)s)"
    )
    return parse_study(parser)


if __name__ == "__main__":
    main()
