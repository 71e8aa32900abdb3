"""Write a run's model for others to load, with a model card: dense, lowrank, serve, or lora for an adapter.

dense multiplies the factors out (a stock checkpoint), lowrank keeps them, serve keeps them as servers like them, lora
is plain PEFT on the original base: the adapter of a run, or what --rank, --energy or --parameters extracts from a full
fine-tune.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from lowrank_kit.config.plugins import let_here
from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.files import plain, read_json
from lowrank_kit.runs.status import read_status

DTYPES = ("float32", "bfloat16", "float16")


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit export", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint folder")
    parser.add_argument("--format", choices=("dense", "lowrank", "serve", "lora"), required=True, help="what to write")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as stored)")
    parser.add_argument(
        "--multiple", type=_positive, metavar="N",
        help="with --format serve: ranks become multiples of N, filled up with zeros (128 for GPU kernels; default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=_positive, metavar="N", help="extract a LoRA of this rank from a fully fine-tuned checkpoint"
    )
    parser.add_argument(
        "--energy", type=_share, metavar="SHARE", help="the same, every matrix with as many components as hold so much"
    )
    parser.add_argument(
        "--parameters", type=_positive, metavar="N",
        help="the same, all matrices together with so many parameters, where they hold most",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="what it was trained from (default: the run's own model)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="choose components by the outputs on this text, not by the weights",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument(
        "--method-prefixes", nargs="+", default=[], metavar="PACKAGE",
        help="packages of your own methods, which may be imported; what a run names itself is not",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    let_here(options.method_prefixes)
    try:
        if options.multiple and options.format != "serve":
            raise ConfigError(f"--multiple is for --format serve: --format {options.format} leaves ranks as they are")
        _check_output(options.output)
        _check_extraction(options)
        is_adapter = options.format == "lora" and not _extracts(options)
        source = adapter_in(options.source) if is_adapter else checkpoint_in(options.source)
        if options.push_to_hub:
            # A hub that cannot be written to is found out before anything is.
            _check_hub()
        _check_whole(source)
        _export(source, options)
        print(f"{options.format} checkpoint: {options.output}")
        if options.push_to_hub:
            print(f"pushed: {_push(options.output, options.push_to_hub, options.private)}")
    except Exception as error:
        return explained(error)
    return 0


def checkpoint_in(source: Path) -> Path:
    """Find the model: a checkpoint folder itself, or in a run directory ``recovered/``, else ``checkpoint/``.

    Raises `ConfigError` where there is none; for a run that trained an adapter it says where that lies.
    """
    for folder in (source / "recovered", source / "checkpoint", source):
        if (folder / "config.json").is_file():
            return folder
    if (adapter := _adapter(source)) is not None:
        raise ConfigError(
            f"'{source}' holds an adapter, no model: '{adapter}' is plain PEFT LoRA already, which "
            f"PeftModel.from_pretrained(base, '{adapter}') loads on the original base; --format lora writes it with a "
            "model card"
        )
    if not source.is_dir():
        raise ConfigError(f"'{source}' is not a folder: give a run directory or a checkpoint folder")
    raise ConfigError(
        f"'{source}' has neither checkpoint/config.json (a finished compression run) nor config.json (a checkpoint)"
    )


def adapter_in(source: Path) -> Path:
    """Find the adapter of a run directory, or the adapter folder itself; `ConfigError` where there is none."""
    if (folder := _adapter(source)) is None:
        raise ConfigError(
            f"'{source}' has no adapter: --format lora is for runs of a method that adapts; from a full fine-tune "
            "--rank N, --energy SHARE or --parameters N extracts one"
        )
    return folder


def _adapter(source: Path) -> Path | None:
    folders = (source / "adapter", source)
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output '{output}' exists and is not an empty folder: choose another")


def _check_whole(source: Path) -> None:
    """Raise `LowRankKitError` for a checkpoint or adapter that is not what its run left."""
    run = source.parent
    status = read_status(run, thorough=True) if (run / "config.yaml").is_file() else None
    if status is not None and status.state == "damaged":
        raise LowRankKitError(
            f"{run} is not as the run left it: {status.error}. Restore that from a copy, or make the run again"
        )


def _extracts(options: argparse.Namespace) -> list[str]:
    """The options that ask for a LoRA out of a full fine-tune."""
    asked = {"--rank": options.rank, "--energy": options.energy, "--parameters": options.parameters}
    return [name for name, value in asked.items() if value]


def _check_extraction(options: argparse.Namespace) -> None:
    extracts = _extracts(options)
    if len(extracts) > 1:
        raise ConfigError(
            "--rank gives all matrices one rank, --energy each its own, --parameters all a common budget: choose one "
            "of them"
        )
    if extracts and options.format != "lora":
        raise ConfigError(f"{extracts[0]} is for --format lora, not for --format {options.format}")
    if (options.base or options.text) and not extracts:
        raise ConfigError("--base and --text are for extracting a LoRA: add --rank N, --energy SHARE or --parameters N")
    if options.text is not None and not options.text.is_file():
        raise ConfigError(f"--text '{options.text}' is not a file")


def _base_of(source: Path, options: argparse.Namespace) -> str:
    manifest = read_json(source.parent / "manifest.json", dict) or {}
    base = options.base or manifest.get("model", {}).get("path")
    if base is None:
        raise ConfigError(f"'{source}' does not say what it was trained from: add --base MODEL")
    return str(base)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0, 1 at most")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _export(source: Path, options: argparse.Namespace) -> None:
    # Imported only now: a wrong command is answered before torch and transformers are loaded.
    from lowrank_kit.retrace import command_elsewhere
    from lowrank_kit.runs.card import write_card

    output: Path = options.output
    extracts = _extracts(options)
    if options.format == "lora" and not extracts:
        from lowrank_kit.training.adapter_files import check_adapter

        check_adapter(source)
    run = next((folder for folder in (source, source.parent) if (folder / "config.yaml").is_file()), None)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the target: a rename is atomic only within one file system.
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        whole = Path(temporary, "whole")
        if extracts:
            _extract(source, options, whole)
        elif options.format == "lora":
            _copy_adapter(source, whole)
        else:
            _save_model(source, options, whole)
        if options.format == "lora" and options.push_to_hub:
            _forget_folders(whole)
        # Asked for by its own folder, the model from before a recovery may be written too.
        before_recovery = (source.parent / "recovered").is_dir() and source.name == "checkpoint"
        measured: Literal["compressed", "final"] = "compressed" if before_recovery else "final"
        command = command_elsewhere(run, options.method_prefixes) if run else None
        write_card(whole, run, options.push_to_hub or output.name, measured, command)
        whole.replace(output)


def _copy_adapter(source: Path, output: Path) -> None:
    """Copy an adapter's folder: what was checked, and regular files beside it. A link could show any file of this
    machine, and of a pipe the end may never come."""
    from lowrank_kit.training.adapter_files import CHECKED

    left_out = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        # The hub's cache has links alone.
        if str(name) in CHECKED or (file.is_file() and not file.is_symlink() and str(name) != "README.md"):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, output / name)
        elif file.is_symlink() or not (file.is_file() or file.is_dir()):
            left_out.append(str(name))
    if left_out:
        print(f"left out, for they are no regular files: {plain(', '.join(left_out))}")


def _extract(source: Path, options: argparse.Namespace, output: Path) -> None:
    from lowrank_kit.training.extract import Wanted, write_extraction

    wanted = Wanted(options.rank, options.energy, options.parameters)
    found, parameters = write_extraction(_base_of(source, options), source, output, wanted, options.text)
    ranks, left = found.adapted.plan.ranks.values(), sorted(found.left.items(), key=lambda entry: entry[1])
    print(
        f"{len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}, {parameters} parameters; of a difference it "
        f"leaves out {sum(found.left.values()) / len(left):.1%} in the mean, {left[-1][1]:.1%} at most ({left[-1][0]})"
    )
    if found.elsewhere:
        most = max(found.elsewhere, key=lambda name: found.elsewhere[name])
        print(
            f"not in it: {len(found.elsewhere)} other tensors that changed, by {found.elsewhere[most]:.2%} at most "
            f"({most})"
        )


def _forget_folders(adapter: Path) -> None:
    """Take this machine's folder of the base out of what is published."""
    from lowrank_kit.runs.shareable import portable_model
    from lowrank_kit.training.adapters import BASE_FILE

    for name, key in (("adapter_config.json", "base_model_name_or_path"), (BASE_FILE, "path")):
        file = adapter / name
        content = read_json(file, dict) or {}
        if content.get(key):
            file.write_text(json.dumps({**content, key: portable_model(content[key])}, indent=2), "utf-8")


def _save_model(source: Path, options: argparse.Namespace, output: Path) -> None:
    import torch

    from lowrank_kit.models.checkpoint import save_compressed, save_dense
    from lowrank_kit.models.load import ModelSource, load_config, load_model, read_tokenizer
    from lowrank_kit.models.servable import make_servable

    model_source = ModelSource(str(source))
    stored = load_config(model_source).dtype or torch.float32
    model = load_model(model_source, "causal", dtype=stored).model
    tokenizer = read_tokenizer(model_source) if (source / "tokenizer_config.json").is_file() else None
    if options.format == "serve" and (kept := make_servable(model, options.multiple or 1)):
        print(
            f"{len(kept)} ranks are no multiples of {options.multiple}: filled up, these factors would be no smaller "
            f"than the dense matrix (first {kept[0]})"
        )
    save = save_dense if options.format == "dense" else save_compressed
    save(model, output, tokenizer, dtype=getattr(torch, options.dtype) if options.dtype else None)


def _check_hub() -> None:
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise LowRankKitError(
            "--push-to-hub: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or leave it out"
        )
    if get_token() is None:
        raise LowRankKitError("--push-to-hub needs an account: run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    # Its client raises what its own clients raise.
    except Exception as error:
        raise LowRankKitError(f"--push-to-hub: the hub does not let us in: {_first_line(error)}") from error


def _push(folder: Path, repository: str, private: bool) -> str:
    """Upload in one commit; returns the address."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=private, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:
        raise LowRankKitError(
            f"--push-to-hub: '{folder}' is written, but not on the hub: {_first_line(error)}; "
            f"try `hf upload {repository} {folder}`"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
