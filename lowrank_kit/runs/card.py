"""The model card (README.md) of an exported checkpoint or adapter: how it was made, what it scores, how to load it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from lowrank_kit.assets import CATALOGUE
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord, read_records
from lowrank_kit.files import plain, read_as, read_json, read_yaml
from lowrank_kit.markdown import fenced, in_markdown
from lowrank_kit.models.load import PACKAGED
from lowrank_kit.runs.shareable import PLACE, is_on_hub, portable, portable_model

UNKNOWN = "unknown"
STATES = {"dense": "base model", "majority_class": "majority class", "compressed": "before recovery"}
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

- Base model: {{ base }}
- Licence of the base: {{ base_licence }}
{{ facts }}

## How to load it

{{ loading }}

## How to serve it

{{ serving }}

## Measured results

{{ results }}

## Recipe

{{ recipe }}
"""
DENSE = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name})"""
LOWRANK = """\
import lowrank_kit  # or: trust_remote_code=True below, without lowrank_kit
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name})"""
ADAPTER = """\
from peft import PeftModel
from transformers import {head}

base = {head}.from_pretrained({base}{labels})
model = PeftModel.from_pretrained(base, {name})"""
NOTE = """\

`{place}/NAME` stands for a folder on the machine that this was made on, by its last component: give your own. A
model that is packaged with lowrank_kit is fetched by `python -m lowrank_kit.assets`; `--list` says where."""
SERVE_STOCK = "vllm serve {name}"
SERVE = """\
vllm serve {name} --trust-remote-code  # not needed where lowrank_kit is installed beside vLLM"""
SERVE_ADAPTER = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={name}"
NOT_SERVED = """\
Some matrices share a factor, which servers cannot load: `python -m lowrank_kit.export FOLDER --format serve` writes
them out."""
HEADS = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}


@dataclass(frozen=True)
class _Plan:
    """What a card says of a plan."""

    ranks: dict[str, int]
    parameters_before: int
    parameters_after: int


def write_card(
    folder: Path, run: Path | None, name: str, measured: Checkpoint = "final", command: str | None = None
) -> None:
    """Write ``folder/README.md`` for the checkpoint or PEFT adapter that lies there.

    ``run`` is the directory of the run that made it; None: the card says only what the weights do. ``name`` is what
    the reader will load it by, a hub id or a folder. ``measured`` says which of the run's figures are this one's;
    ``command`` makes the run again. No folder of this machine is in the card.
    """
    config = read_yaml(run / "config.yaml") if run else {}
    records = read_records(run / "results.json") if run else []
    plan: _Plan | None = read_as(run / "plan.json", _Plan) if run else None
    adapter = read_json(folder / "adapter_config.json", dict)
    manifest = (read_json(run / "manifest.json", dict) if run else None) or {}
    base, licence = _base(config.get("model", {}))
    method = config.get("method", {}).get("name", "a low-rank method")
    data = ModelCardData(
        license=licence[0],
        base_model=base if is_on_hub(config.get("model", {}).get("path", "")) else None,
        library_name="peft" if adapter else "transformers",
        tags=["lowrank_kit", "low-rank", *([config["method"]["name"]] if config else [])],
    )
    ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=in_markdown(Path(name).name),
        summary=_summary(method, base, adapter is not None),
        base=in_markdown(base),
        base_licence=in_markdown(licence[1]),
        facts="\n".join(f"- {in_markdown(line)}" for line in _facts(plan, folder, manifest)),
        loading=fenced(_loading(folder, adapter, base, name), "python"),
        serving=_serving(folder, adapter, base, name),
        results=_results(records, measured),
        recipe=_recipe(config, command),
    ).save(folder / "README.md")


def _summary(method: str, base: str, is_adapter: bool) -> str:
    done = "A PEFT LoRA adapter for" if is_adapter else "A compressed form of"
    return f"{done} {in_markdown(base)}, made with `{plain(str(method)).replace('`', '')}` by lowrank_kit."


def _base(model: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    """The base as the reader knows it, and its licence: the hub's identifier, and in words."""
    path = str(model.get("path", ""))
    if path.startswith(PACKAGED):
        asset = CATALOGUE[path.removeprefix(PACKAGED)]
        return f"{asset.note} (packaged with lowrank_kit)", (asset.licence.split()[0].lower(), asset.licence)
    if not path:
        return UNKNOWN, (UNKNOWN, UNKNOWN)
    licence = _licence_of(path, model.get("revision"))
    shown = path if is_on_hub(path) else f"{model['name']} (a local folder)"
    words = licence or f"{UNKNOWN}: the base's card was not found or names none; find out before you share this"
    return shown, (licence or UNKNOWN, words)


def _licence_of(path: str, revision: str | None) -> str | None:
    """What the card of a hub repository or a folder says; None if there is no card, or no way to it."""
    try:
        file = (
            Path(path) / "README.md" if Path(path).exists() else hf_hub_download(path, "README.md", revision=revision)
        )
        found = ModelCard.load(file).data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return str(found) if found else None


def _facts(plan: _Plan | None, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    if plan:
        before, after = plan.parameters_before, plan.parameters_after
        ranks = sorted(plan.ranks.values())
        lines.append(
            f"Parameters of the block linears: {before:,} before, {after:,} after ({100 * (after / before - 1):+.1f} %)"
        )
        lines.append(f"Ranks of {len(ranks)} matrices: {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}")
    config = read_json(folder / "config.json", dict) or {}
    lowrank = config.get("lowrank") or {}
    if factored := lowrank.get("ranks"):
        pivots = len(lowrank.get("pivot_rows") or ())
        lines.append(
            f"Stored as two factors: {len(factored)} matrices{f', {pivots} of them by pivot rows' if pivots else ''}"
        )
    if versions := manifest.get("versions"):
        lines.append(f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return lines


def _loading(folder: Path, adapter: Mapping[str, Any] | None, base: str, name: str) -> str:
    if adapter is None:
        config = read_json(folder / "config.json", dict) or {}
        return (LOWRANK if "auto_map" in config else DENSE).format(name=_quoted(name))
    head = HEADS.get(str(adapter.get("task_type")), "AutoModel")
    where = adapter.get("base_model_name_or_path")
    shown = portable_model(where) if where else base
    labels = ", num_labels=NUMBER_OF_CLASSES" if head.endswith("SequenceClassification") else ""
    return ADAPTER.format(head=head, base=_quoted(shown), labels=labels, name=_quoted(name))


def _serving(folder: Path, adapter: Mapping[str, Any] | None, base: str, name: str) -> str:
    config = read_json(folder / "config.json", dict) or {}
    if (config.get("lowrank") or {}).get("shared_down"):
        return NOT_SERVED
    if adapter is None:
        command = (SERVE if "auto_map" in config else SERVE_STOCK).format(name=shlex.quote(name))
    elif adapter.get("task_type") == "CAUSAL_LM":
        where = adapter.get("base_model_name_or_path")
        ranks = [adapter.get("r", 8), *(adapter.get("rank_pattern") or {}).values()]
        # The values that vLLM takes.
        rank = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= max(ranks)), max(ranks))
        shown = shlex.quote(portable_model(where) if where else base)
        command = SERVE_ADAPTER.format(base=shown, rank=rank, name=shlex.quote(name))
    else:
        return "Servers of language models take no adapter of a classifier."
    return fenced(command, "console")


def _quoted(text: str) -> str:
    # JSON's quotes are Python's, and nothing leaves the string.
    return json.dumps(text, ensure_ascii=False)


def _results(records: Sequence[EvalRecord], measured: Checkpoint) -> str:
    states = {**STATES, "final": "after recovery", measured: "this model"}
    shown = [record for record in records if record.checkpoint in states]
    if not shown:
        return "None: the run was not evaluated, or this checkpoint is of no run directory."
    lines = ["| task | metric | of | value | ± s.e. | n | source |", "|---|---|---|---:|---:|---:|---|"]
    for record in shown:
        error = "" if record.stderr is None else f"{record.stderr:.4g}"
        lines.append(
            f"| {in_markdown(record.task)} | {in_markdown(record.metric)} | {states[record.checkpoint]} "
            f"| {record.value:.4g} | {error} | {record.n} | {in_markdown(record.source)} |"
        )
    return "\n".join([*lines, "", "Measured on the checkpoint of the run, in the run's number format."])


def _recipe(config: Mapping[str, Any], command: str | None) -> str:
    if not config:
        return "Unknown: this checkpoint is of no run directory."
    shown = {key: value for key, value in portable(config).items() if key not in ("run", "tracker", "runtime")}
    typed = f"{fenced(command, 'console')}\n\nWith every setting:\n\n" if command else ""
    text = typed + fenced(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip(), "yaml")
    return text + (f"\n{NOTE.format(place=PLACE)}" if f"{PLACE}/" in text else "")
