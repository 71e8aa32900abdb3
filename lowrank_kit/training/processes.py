"""What of a training depends on how many processes do it, and on what each of them holds."""

from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import Trainer

from lowrank_kit.config import RuntimeConfig, TrainConfig
from lowrank_kit.errors import ConfigError
from lowrank_kit.launcher import is_main


def rows_per_pass(settings: TrainConfig, processes: int) -> tuple[int, int]:
    """Return the rows of a process's forward pass, and its passes per optimiser step.

    All processes together read ``batch_size * gradient_accumulation`` rows a step, however many they are, so that the
    schedule does not depend on the machine; a pass is at most ``batch_size`` rows, as what fits a device.

    Raises:
        ConfigError: the rows of a step cannot be divided evenly.
    """
    step = settings.batch_size * settings.gradient_accumulation
    rows, rest = divmod(step, processes)
    if rest:
        raise ConfigError(
            f"{step} rows an optimiser step (train.batch_size={settings.batch_size} times train.gradient_accumulation="
            f"{settings.gradient_accumulation}) cannot be shared evenly by {processes} processes: make them a multiple "
            f"of {processes}, or start fewer processes"
        )
    a_pass = max(n for n in range(1, settings.batch_size + 1) if rows % n == 0)
    return a_pass, rows // a_pass


def sharding(runtime: RuntimeConfig) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that say how the model is sharded."""
    options = _copied(runtime.options)
    if runtime.kind == "fsdp":
        return {"fsdp": True, "fsdp_config": options}
    return {"deepspeed": options} if runtime.kind == "deepspeed" else {}


def make_whole(model: nn.Module, trainer: Trainer) -> None:
    """After a sharded training, give ``model`` whole parameters on the CPU in the first process; else do nothing.

    Those that learnt, of a PEFT model; of any other, all. To be called in every process.
    """
    trained_only = isinstance(model, PeftModel)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        state: dict[str, Any] = get_model_state_dict(model, options=options)
    elif trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        return
    if not is_main():
        return
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.requires_grad or not trained_only:
            module, _, leaf = name.rpartition(".")
            whole = nn.Parameter(state[name].to(parameter.dtype), parameter.requires_grad)
            model.get_submodule(module).register_parameter(leaf, whole)


def _copied(options: Any) -> Any:
    """As plain containers: transformers fills in what is left to it."""
    if isinstance(options, dict):
        return {key: _copied(value) for key, value in options.items()}
    return list(options) if isinstance(options, list | tuple) else options
