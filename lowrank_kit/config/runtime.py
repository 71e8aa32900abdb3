"""How many processes work on a run, and what of the model each of them holds."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, model_validator

from lowrank_kit.config.section import Section


class RuntimeConfig(Section):
    """Processes, as torchrun or `accelerate launch` starts them; none of it changes what is computed, but rounding."""

    kind: Literal["single", "ddp", "fsdp", "deepspeed"] = "single"
    """`single`: one process. `ddp`: each holds the whole model and reads its share of every step's rows. `fsdp`:
    training shards the model over them (PyTorch FSDP2). `deepspeed`: the same by DeepSpeed's ZeRO."""
    options: dict[str, Any] = Field(default_factory=dict)
    """`fsdp`: `fsdp_config` of transformers' TrainingArguments; `deepspeed`: DeepSpeed's own configuration."""

    @model_validator(mode="after")
    def _options_are_somebodys(self) -> "RuntimeConfig":
        if self.options and self.kind in ("single", "ddp"):
            raise ValueError(f"kind={self.kind} has no options: choose runtime=fsdp, zero2 or zero3, or leave them out")
        return self

    @property
    def shards(self) -> bool:
        """Whether a process holds a part of the model only while it trains."""
        stage = self.options.get("zero_optimization", {}).get("stage", 0)
        return self.kind == "fsdp" or (self.kind == "deepspeed" and stage == 3)

    def unmet(self, started: int, launched: bool) -> str | None:
        """What is wrong with so many processes, ``launched`` by a launcher or not, or with what is installed."""
        how = "torchrun --nproc-per-node N -m lowrank_kit.run ..."
        if self.kind == "single" and started > 1:
            return f"{started} processes were started for one run: add runtime=ddp, fsdp, zero2 or zero3"
        if self.kind != "single" and not launched:
            return f"runtime.kind={self.kind} is for several processes: start them with {how}, or use runtime=single"
        if self.kind == "deepspeed" and find_spec("deepspeed") is None:
            return "runtime.kind=deepspeed needs the package deepspeed: pip install deepspeed, or use runtime=fsdp"
        return None
