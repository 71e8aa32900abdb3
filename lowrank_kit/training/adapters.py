"""PEFT carries every adapter: attach it with given factors, and export it as plain LoRA on the original base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lowrank_kit.methods.base import Adapter, InitialisedAdapter, LowRankFactors, Plan
from lowrank_kit.models.linear import set_weight, weight_of
from lowrank_kit.training.untouched import SubtractInitial

ADAPTER = "default"
FROZEN = {"both": (), "down": ("lora_B",), "up": ("lora_A",)}


@dataclass(frozen=True)
class AdaptedModel:
    """A PEFT model, with the float32 factors that its adapter started from (empty when their product is zero)."""

    model: PeftModel
    method: Adapter
    plan: Plan
    initial: Mapping[str, LowRankFactors]

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that learn, a newly initialised head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

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
        state = {
            name: tensor
            for name, tensor in get_peft_model_state_dict(self.model, save_embedding_layers=False).items()
            if ".lora_" not in name
        }
        ranks, alphas = {}, {}
        for name, rank in self.plan.ranks.items():
            factors = self._export_factors(name)
            ranks[name] = factors.down.shape[0]
            alphas[name] = self.method.scaling(rank) * ranks[name]
            state[f"base_model.model.{name}.lora_A.weight"] = factors.down.float()
            state[f"base_model.model.{name}.lora_B.weight"] = factors.up.float()
        trained = self.model.peft_config[ADAPTER]
        config = _lora_config(ranks, alphas, task_type=trained.task_type, modules_to_save=trained.modules_to_save)
        config.fan_in_fan_out = trained.fan_in_fan_out
        config.base_model_name_or_path = base
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")

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
) -> AdaptedModel:
    """Wrap ``model`` with the planned adapter; the model is changed in place.

    Args:
        model: the original model.
        method: scaling, dropout, and which factors learn.
        plan: the rank of every adapted linear.
        factors: what every adapted linear starts from; empty for PEFT's own start (B = 0).
        new_modules: newly initialised modules, which learn in full and are saved with the adapter.
        task_type: PEFT's name of the task (``SEQ_CLS``, ``CAUSAL_LM``), or None.
    """
    alphas = {name: method.alpha_of(rank) for name, rank in plan.ranks.items()}
    config = _lora_config(plan.ranks, alphas, task_type=task_type, modules_to_save=list(new_modules) or None)
    config.use_rslora, config.lora_dropout = method.rslora, method.dropout
    initial = {name: _as_stored(start) for name, start in factors.items()}
    adapted = AdaptedModel(get_peft_model(model, config), method, plan, initial)
    for name, start in adapted.initial.items():
        layer = adapted.layer(name)
        _start_from(layer, start)
        if isinstance(method, InitialisedAdapter) and method.base == "untouched":
            SubtractInitial.install(layer, ADAPTER, start)
        else:
            _take_out_of_base(layer, start)
    for name in plan.ranks:
        adapted.layer(name).frozen_peft_weight_names = {ADAPTER: FROZEN[method.train]}
    # PEFT freezes what the layers declare, here and whenever an adapter is loaded or switched.
    adapted.model.set_adapter(ADAPTER)
    return adapted


def _lora_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    task_type: str | None,
    modules_to_save: list[str] | None,
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
