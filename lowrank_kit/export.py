"""Rewrite a compressed checkpoint: dense multiplies the factors out (a stock checkpoint), lowrank keeps them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowrank_kit.errors import ConfigError, LowRankKitError

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m lowrank_kit.export", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint folder")
    parser.add_argument("--format", choices=("dense", "lowrank"), required=True, help="what to write")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as stored)")
    options = parser.parse_args(arguments)
    try:
        _export(checkpoint_in(options.source), options.format, options.output, options.dtype)
    except LowRankKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{options.format} checkpoint: {options.output}")
    return 0


def checkpoint_in(source: Path) -> Path:
    """Find the model: a checkpoint folder itself, or in a run directory ``recovered/``, else ``checkpoint/``.

    Raises `ConfigError` where there is none; for a run that trained an adapter it says where that lies.
    """
    for folder in (source / "recovered", source / "checkpoint", source):
        if (folder / "config.json").is_file():
            return folder
    for folder in (source / "adapter", source):
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"'{source}' holds an adapter, no model: '{folder}' is plain PEFT LoRA already, which "
                f"PeftModel.from_pretrained(base, '{folder}') loads on the original base"
            )
    if not source.is_dir():
        raise ConfigError(f"'{source}' is not a folder: give a run directory or a checkpoint folder")
    raise ConfigError(
        f"'{source}' has neither checkpoint/config.json (a finished compression run) nor config.json (a checkpoint)"
    )


def _export(source: Path, style: str, output: Path, dtype_name: str | None) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output '{output}' exists and is not an empty folder: choose another")
    # Imported only now: a wrong command is answered before torch and transformers are loaded.
    import torch
    from transformers import AutoTokenizer

    from lowrank_kit.models.checkpoint import save_compressed, save_dense
    from lowrank_kit.models.load import ModelSource, load_config, load_model

    stored = load_config(ModelSource(str(source))).dtype or torch.float32
    model = load_model(ModelSource(str(source)), "causal", dtype=stored).model
    tokenizer = AutoTokenizer.from_pretrained(source) if (source / "tokenizer_config.json").is_file() else None
    save = {"dense": save_dense, "lowrank": save_compressed}[style]
    save(model, output, tokenizer, dtype=getattr(torch, dtype_name) if dtype_name else None)


if __name__ == "__main__":
    sys.exit(main())
