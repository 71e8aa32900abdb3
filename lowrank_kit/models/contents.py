"""What a model is made of, by the content of its files: no weight is read into a model for this."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lowrank_kit.files import sha256
from lowrank_kit.models.load import ModelSource, local_path

# All that transformers reads from a checkpoint folder: weights, configuration, tokenizer.
_READ = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")


def contents(source: ModelSource) -> dict[str, str]:
    """Return the SHA-256 of every file that the model may be loaded from, by its name.

    Of a model of the hub: the commit that its name stands for, under ``commit``. Errors as for `load_model`.
    """
    path = local_path(source)
    folder = Path(path)
    if not folder.is_dir():
        found = try_to_load_from_cache(path, source.gguf_file or "config.json", revision=source.revision)
        # A snapshot's folder is named by its commit.
        return {"commit": Path(found).parent.name} if isinstance(found, str) else {}
    gguf = source.gguf_file or Path(source.path).name
    # Of a pipe or a device the end may never come.
    files = [file for file in folder.iterdir() if (file.suffix in _READ or file.name == gguf) and file.is_file()]
    # hashlib releases the interpreter lock, so threads read files side by side.
    with ThreadPoolExecutor() as pool:
        return dict(zip([file.name for file in sorted(files)], pool.map(sha256, sorted(files)), strict=True))
