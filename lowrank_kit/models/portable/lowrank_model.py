"""The model classes of compressed checkpoints: stock ones that take their form from a configuration."""

from typing import Any

from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from lowrank_kit.models.portable.entries import checked, relative
from lowrank_kit.models.portable.form import give_form
from lowrank_kit.models.portable.linears import LowRankLinear
from lowrank_kit.models.portable.parallel import check_heads, tensor_parallel_plan


class LowRankModel(PreTrainedModel):
    """Goes before a stock model class: its linears take their compressed form, before any weight is loaded.

    ``config.lowrank`` holds ``format``; ``ranks``, the rank of every factored linear by its path in the base model;
    ``shared_down``, the linears whose ``down`` weight is another one's (one parameter, stored once); where there are
    any, ``pivot_rows``, that number of those that are `PivotLinear`, ``rounded``, bits and group of the linears, or
    halves of factored ones, that are `RoundedLinear`, ``experts``, the modules that are `ListedExperts`, ``shapes``
    ``[out, in]`` of the linears that are narrower than the stock ones, and ``shortcuts``, the decoder layers that are
    `SlicedLayer`. Raises `ValueError`, with the entry, where they describe no such model.
    """

    _stock_base: type[PreTrainedModel]
    _tied_weights_keys: dict[str, str] | None
    _shared_down: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        lowrank = checked(config.lowrank)
        text: Any = config.get_text_config()
        if lowrank["shared_down"] and text._attn_implementation in ("vllm", "sglang"):
            raise ValueError(
                f"some matrices of this checkpoint share a factor that is stored once, and {text._attn_implementation} "
                "would leave the others' without values and say nothing: write them out by lowrank_kit.export "
                "--format serve"
            )
        # Where the stock base model looks for it, and no part of what is saved.
        text.base_model_tp_plan = tensor_parallel_plan(type(text).base_model_tp_plan, lowrank)
        super().__init__(config, *args, **kwargs)
        path = self.base_path
        lowrank = relative(lowrank, path or self.base_model_prefix)
        base = self.get_submodule(path)
        # Some stock classes ask AutoModel for their base model, and have been given ours.
        if base is self or not isinstance(base, LowRankModel):
            give_form(base, lowrank)
        prefix = f"{path}." if path else ""
        self._shared_down = {
            f"{prefix}{name}.down.weight": f"{prefix}{owner}.down.weight"
            for name, owner in lowrank["shared_down"].items()
        }
        # transformers 4 has a list here: without sharing it is left alone, and the checkpoint loads there too.
        if self._shared_down:
            self._tied_weights_keys = (self._tied_weights_keys or {}) | self._shared_down
        # The stock class has called it too early: new weights are initialised and tied here.
        self.post_init()

    @property
    def base_path(self) -> str:
        """The module path of the stock base model; '' if that is what this is."""
        return next(path for path, module in self.named_modules() if isinstance(module, self._stock_base))

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The stock class's tied weights, none if the embedding is not tied, and the shared factors."""
        return super().get_expanded_tied_weights_keys(all_submodels) | self._shared_down

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """The rules by concrete names, without those for dense linears where there are factors, which have their own.

        transformers writes all layers' names with the same wildcard, be a linear dense in one and factored in another.
        """
        factored = {name: module for name, module in self.named_modules() if isinstance(module, LowRankLinear)}
        own = {f"{name}.{part}" for name, module in factored.items() for part in module._parameters}
        rules: dict[str, str] = super()._expand_parallel_plan(plan)
        rules = {name: style for name, style in rules.items() if name not in factored and name not in own}
        check_heads(self, rules, getattr(self, "_tp_size", None) or 1)
        return rules


def _validate(config: Any) -> None:
    """Check all but that the heads divide the hidden size: a sliced one they need not, head_dim is explicit."""
    for validator in config.__class_validators__:
        if validator.__name__ != "validate_architecture":
            validator(config)


def derive_classes(
    stock_config: type[PretrainedConfig],
    *stock_models: type[PreTrainedModel],
    mixin: type[LowRankModel] = LowRankModel,
) -> tuple[Any, ...]:
    """Make the classes of a compressed checkpoint from the stock ones: the configuration's, then each model's.

    The first of ``stock_models`` is the base model, which the others consist of and a head.
    """
    config = type(
        f"LowRank{stock_config.__name__}",
        (stock_config,),
        {
            "__module__": __name__,
            "__annotations__": {"lowrank": dict | None},
            "lowrank": None,
            "model_type": f"lowrank_{stock_config.model_type}",
            "validate": _validate,
        },
    )
    attributes = {"__module__": __name__, "config_class": config, "_stock_base": stock_models[0]}
    models = [type(f"LowRank{stock.__name__}", (mixin, stock), dict(attributes)) for stock in stock_models]
    AutoModel.register(config, models[0], exist_ok=True)
    return config, *models
