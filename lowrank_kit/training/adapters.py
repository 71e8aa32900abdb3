"""PEFT carries every adapter: attach it with given factors, and export it as plain LoRA on the original base."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from lowrank_kit.adapters.adapter import Adapter, Batches, FineTuning
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.config import TrainConfig
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_json
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import is_transposed, set_weight, weight_of
from lowrank_kit.models.load import load_like
from lowrank_kit.models.weight_files import REMEDY, save_tensors
from lowrank_kit.plan import Plan
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.training.adapter_files import load_adapter
from lowrank_kit.training.optimizer import adamw
from lowrank_kit.training.precision import hold_in_float32
from lowrank_kit.training.untouched import SubtractInitial

ADAPTER = "default"
FROZEN = {"both": (), "down": ("lora_B",), "up": ("lora_A",)}
BASE_FILE = "base.json"


@runtime_checkable
class Adapted(Protocol):
    """A model that a method has made ready to train."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that learn, a newly initialised head included."""
        ...

    def optimizer(self, settings: TrainConfig) -> torch.optim.Optimizer:
        """AdamW over what learns, with the method's learning rates."""
        ...

    def export(self, folder: Path, base: str) -> None:
        """Write what stock libraries load; ``base`` is the original model's hub id or folder."""
        ...


@dataclass(frozen=True)
class AdaptedModel:
    """A PEFT model, with the float32 factors that its adapter started from (empty when their product is zero).

    ``base_fingerprint`` is that of the original model, before any product was taken out of it. ``new_modules`` are
    those that started at random.
    """

    model: PeftModel
    method: Adapter
    plan: Plan
    initial: Mapping[str, LowRankFactors]
    base_fingerprint: str
    new_modules: tuple[str, ...]

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that learn, a newly initialised head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def optimizer(self, settings: TrainConfig) -> torch.optim.Optimizer:
        """AdamW; newly initialised modules, and with LoRA+ the up factors, may learn faster."""
        return adamw(self.model, settings, new=self.new_modules, up_ratio=self.method.up_learning_rate_ratio)

    def layer(self, name: str) -> LoraLayer:
        """The adapted layer that stands at the linear ``name`` of the original model."""
        return self.model.get_base_model().get_submodule(name)

    def factors(self, name: str) -> LowRankFactors:
        """A copy of the adapter's present factors at a linear, float64 on CPU."""
        layer = self.layer(name)
        up, down = (part[ADAPTER].weight.detach().cpu().double() for part in (layer.lora_B, layer.lora_A))
        return LowRankFactors(up, down)

    def export(self, folder: Path, base: str) -> None:
        """Write a PEFT LoRA adapter on the ORIGINAL base, which `PeftModel.from_pretrained` loads without us.

        An initial product ``B0 A0`` is subtracted inside the adapter: ``B A - B0 A0 = [B -B0] [A; A0]`` of rank 2r,
        or of rank r where a factor never moved: ``B (A - A0)``, ``(B - B0) A``.

        Args:
            folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
            base: hub id or folder of the original model, as the adapter's users will load it.
        """
        # DoRA's magnitudes and trained heads stay as they are.
        state = {
            name: tensor
            for name, tensor in get_peft_model_state_dict(self.model, save_embedding_layers=False).items()
            if not name.endswith((".lora_A.weight", ".lora_B.weight"))
        }
        ranks, alphas = {}, {}
        for name, rank in self.plan.ranks.items():
            factors = self._export_factors(name)
            ranks[name] = factors.down.shape[0]
            alphas[name] = self.method.scaling(rank) * ranks[name]
            state[f"base_model.model.{name}.lora_A.weight"] = factors.down.float()
            state[f"base_model.model.{name}.lora_B.weight"] = factors.up.float()
        trained = self.model.peft_config[ADAPTER]
        config = _lora_config(ranks, alphas, trained.task_type, trained.modules_to_save, use_dora=trained.use_dora)
        config.fan_in_fan_out = trained.fan_in_fan_out
        config.base_model_name_or_path = base
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
        (folder / BASE_FILE).write_text(json.dumps({"path": base, "fingerprint": self.base_fingerprint}))

    def _export_factors(self, name: str) -> LowRankFactors:
        now, start = self.factors(name), self.initial.get(name)
        if start is None:
            return now
        if self.method.train == "down":
            return LowRankFactors(now.up, now.down - start.down)
        if self.method.train == "up":
            return LowRankFactors(now.up - start.up, now.down)
        return LowRankFactors(torch.cat([now.up, -start.up], 1), torch.cat([now.down, start.down], 0))


def attach(
    model: PreTrainedModel,
    method: Adapter,
    plan: Plan,
    factors: Mapping[str, LowRankFactors],
    new_modules: Sequence[str],
    task_type: str | None,
    *,
    kept: Mapping[str, Kept] | None = None,
    batches: Batches = (),
) -> AdaptedModel:
    """Wrap ``model`` with the planned adapter; the model is changed in place.

    Args:
        model: the original model.
        method: scaling, dropout, PEFT's initialisation, and which factors learn.
        plan: the rank of every adapted linear.
        factors: what every adapted linear starts from; empty for an initialisation of PEFT.
        new_modules: newly initialised modules, which learn in full and are saved with the adapter.
        task_type: PEFT's name of the task (``SEQ_CLS``, ``CAUSAL_LM``), or None. The head of a classifier learns in
            full and is saved, new or trained.
        kept: what calibration kept of every target, for an initialisation of PEFT.
        batches: inputs of the model on its device, for the same.

    Raises:
        LowRankKitError: the method takes a product out of base weights that are shared.
    """
    if method.changes_base:
        _check_separate(model, plan)
    layout = layout_of(model)
    base_fingerprint = fingerprint(model, layout)
    heads = [layout.head] if task_type == "SEQ_CLS" and layout.head else []
    in_full = tuple(dict.fromkeys([*new_modules, *heads]))
    alphas = {name: method.alpha_of(rank) for name, rank in plan.ranks.items()}
    options = {
        "use_rslora": method.rslora,
        "lora_dropout": method.dropout,
        # One family has all its linears one way round.
        "fan_in_fan_out": is_transposed(model.get_submodule(next(iter(plan.ranks)))),
        **method.lora_options(),
    }
    config = _lora_config(plan.ranks, alphas, task_type, list(in_full) or None, **options)
    wrapped = method.wrap(model, config, kept or {}, batches)
    initial = {name: _as_stored(start) for name, start in factors.items()}
    adapted = AdaptedModel(wrapped, method, plan, initial, base_fingerprint, tuple(new_modules))
    for name, start in initial.items():
        layer = adapted.layer(name)
        _start_from(layer, start)
        if method.changes_base:
            _take_out_of_base(layer, start)
        else:
            SubtractInitial.install(layer, ADAPTER, start)
    if method.takes_from_base:
        initial.update({name: _as_stored(adapted.factors(name)) for name in plan.ranks})
    for name in plan.ranks:
        adapted.layer(name).frozen_peft_weight_names = {ADAPTER: FROZEN[method.train]}
    for name in in_full:
        # PEFT holds adapters in float32, and these in the base's dtype.
        hold_in_float32(wrapped.get_base_model().get_submodule(name).modules_to_save[ADAPTER])
    # PEFT freezes what the layers declare, here and whenever an adapter is loaded or switched.
    wrapped.set_adapter(ADAPTER)
    return adapted


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model that PEFT has put its layers into, or the model itself."""
    found: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def load_adapted(method: FineTuning, base_model: PreTrainedModel, folder: Path) -> nn.Module:
    """Read an export back: the adapter on ``base_model``, which is changed, or the checkpoint's own weights.

    Raises `LowRankKitError` for an adapter of ours that was trained on another base, which one that PEFT saved does not
    tell, and as `load_adapter` and `load_like`.
    """
    if not isinstance(method, Adapter):
        return load_like(base_model, folder)
    if (folder / BASE_FILE).is_file():
        base = read_json(folder / BASE_FILE, dict, REMEDY)
        found = fingerprint(base_model, layout_of(base_model))
        if found != base.get("fingerprint"):
            raise LowRankKitError(
                f"the adapter in {folder} belongs to another base: it was trained on '{base.get('path')}' (weights "
                f"{base.get('fingerprint')}), and these weights are {found}; load that model, in the dtype that it "
                "was trained in"
            )
    return load_adapter(base_model, folder)


def _lora_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    task_type: str | None,
    modules_to_save: list[str] | None,
    **options: Any,
) -> LoraConfig:
    """A LoRA configuration with one rank and alpha, and patterns for the linears that differ from the first."""
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        task_type=task_type,
        target_modules=sorted(ranks),
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        modules_to_save=modules_to_save,
        **options,
    )


def _check_separate(model: nn.Module, plan: Plan) -> None:
    """Two linears of one weight cannot each have a product of their own taken out of it."""
    holders: dict[int, str] = {}
    for name in plan.ranks:
        other = holders.setdefault(id(model.get_submodule(name).weight), name)
        if other != name:
            raise LowRankKitError(
                f"{other} and {name} share one weight, so no adapter can take its start out of it: use method.base="
                "untouched, or a method that starts at zero (lora, dora), or leave the role out (method.roles)"
            )


def _as_stored(factors: LowRankFactors) -> LowRankFactors:
    """Round as PEFT stores them: what is subtracted later must be exactly what the adapter started from."""
    return LowRankFactors(factors.up.detach().float().cpu(), factors.down.detach().float().cpu())


@torch.no_grad()
def _start_from(layer: LoraLayer, start: LowRankFactors) -> None:
    layer.lora_A[ADAPTER].weight.copy_(start.down)
    layer.lora_B[ADAPTER].weight.copy_(start.up)


def _take_out_of_base(layer: LoraLayer, start: LowRankFactors) -> None:
    base = layer.get_base_layer()
    product = layer.scaling[ADAPTER] * start.up.double() @ start.down.double()
    set_weight(base, weight_of(base).detach().double().cpu() - product)
