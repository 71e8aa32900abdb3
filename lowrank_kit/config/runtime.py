"""How many processes work on a run, and where each of them holds the model."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, model_validator

from lowrank_kit import launcher
from lowrank_kit.config.section import Section


class RuntimeConfig(Section):
    """Processes, as torchrun or `accelerate launch` starts them; none of it changes what is computed, but rounding."""

    kind: Literal["single", "spread", "ddp", "fsdp", "deepspeed"] = "single"
    """`single`: one process, one device. `spread`: one process; models too large for a device are evaluated over all
    devices of the machine, its memory and its disk. `ddp`: each process holds the whole model and reads its share of
    every step's rows. `fsdp`: training shards the model over them (PyTorch FSDP2). `deepspeed`: the same by ZeRO."""
    options: dict[str, Any] = Field(default_factory=dict)
    """`spread`: arguments of `from_pretrained` (device_map, max_memory, offload_folder). `fsdp`: `fsdp_config` of
    transformers' TrainingArguments. `deepspeed`: DeepSpeed's own configuration."""

    weights: Literal["resident", "streamed"] = "resident"
    """`streamed`: while it is compressed, the model lies in memory a block at a time; each comes from the checkpoint's
    safetensors and goes, compressed, to the new checkpoint. For the SVD family without correction or probe. With
    kind=ddp every process takes its share of the calibration windows through the blocks. What is evaluated is loaded
    whole, or spread with kind=spread."""

    @model_validator(mode="after")
    def _nothing_shards_what_streams(self) -> "RuntimeConfig":
        if self.weights == "streamed" and self.kind in ("fsdp", "deepspeed"):
            raise ValueError(
                f"weights=streamed has a block in memory at a time, and kind={self.kind} shards models that are "
                "trained: use kind=ddp for several processes, single or spread for one"
            )
        return self

    @model_validator(mode="after")
    def _options_are_somebodys(self) -> "RuntimeConfig":
        if self.options and self.kind in ("single", "ddp"):
            raise ValueError(f"kind={self.kind} has no options: choose runtime=fsdp, zero2 or zero3, or leave them out")
        return self

    @property
    def placement(self) -> dict[str, Any] | None:
        """How `from_pretrained` spreads a model that is evaluated; None: it lies on one device."""
        return self.options if self.kind == "spread" else None

    @property
    def not_for_training(self) -> str:
        """What is said where a model that is spread would be trained."""
        return (
            "runtime=spread is for models that are evaluated: train with another, and evaluate what was exported with "
            "method=none model.path=FOLDER runtime=spread"
        )

    @property
    def shards(self) -> bool:
        """Whether a process holds a part of the model only while it trains."""
        stage = self.options.get("zero_optimization", {}).get("stage", 0)
        return self.kind == "fsdp" or (self.kind == "deepspeed" and stage == 3)

    def unmet(self, started: int, launched: bool) -> str | None:
        """What is wrong with so many processes, ``launched`` by a launcher or not, or with what is installed."""
        how = "torchrun --nproc-per-node N (accelerate launch --multi_gpu --num_processes N) -m lowrank_kit.run ..."
        if self.kind in ("single", "spread") and started > 1:
            return f"{started} processes were started for one run: use runtime=ddp, fsdp, zero2 or zero3"
        if self.kind not in ("single", "spread") and not launched:
            return f"runtime.kind={self.kind} is for several processes: start them with {how}, or use runtime=single"
        if self.kind == "ddp" and (option := launcher.sharding()):
            return (
                f"accelerate was told to shard the model ({option}, or its configuration file), and runtime.kind="
                "ddp does not: use runtime=fsdp, zero2 or zero3, or start it with accelerate launch --multi_gpu"
            )
        if self.kind == "deepspeed" and find_spec("deepspeed") is None:
            return "runtime.kind=deepspeed needs the package deepspeed: pip install deepspeed, or use runtime=fsdp"
        return None
