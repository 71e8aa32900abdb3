"""Recovery: training behind a compression."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from lowrank_kit.config.method import Method
from lowrank_kit.config.runtime import RuntimeConfig
from lowrank_kit.config.section import Section
from lowrank_kit.config.tasks import InstructionSet, SingleTask
from lowrank_kit.errors import did_you_mean

NO_SETS = ("text", "task")
"""What `recovery.data` may name beside the sets of its own."""


class RecoveryConfig(Section):
    """Training behind the compression; the schedule is `train`."""

    what: Literal["none", "factors", "lora", "adapter"] = "none"
    """What learns: nothing; of the replaced blocks alone, the low-rank factors and norms, or LoRA that is merged
    afterwards; or the adapter of `method`, in every linear that it names. The replaced blocks are those with a factored
    linear; of a model without any (blocks dropped, merged or pruned), for LoRA, all of them."""
    method: SerializeAsAny[Method] | None = Field(default=None, exclude_if=lambda method: method is None)
    """For `adapter`: any method that adapts, `recovery.method=astra`. It starts from the compressed model, and is kept
    apart in adapter/ and merged in recovered/."""
    loss: Literal["next_token", "distill"] = "next_token"
    """`next_token`, or `distill`: the divergence KL(original || compressed) of the predictions, at temperature 1. It
    keeps the original model in memory beside the compressed one."""
    data: str = "text"
    """Name of an instruction set; `text`: the windows that the method was calibrated on; `task`: what adapters learn
    of the task, `task.instructions`."""
    max_length: int = Field(default=256, ge=2)
    """Longest instruction with its answer in tokens, cut off beyond it; windows of text are as long as they are."""
    train_on_prompt: bool = False
    """Learn to predict the instructions too, not the answers alone."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling numerator of LoRA, which scales by alpha / rank."""
    sets: dict[str, InstructionSet] = Field(default_factory=dict)
    """The instruction sets by name; add your own with `recovery.sets.NAME={}`."""

    @property
    def instructions(self) -> InstructionSet | None:
        """The set to train on; None: text, the task's own sets, or no training."""
        return None if self.what == "none" or self.data in NO_SETS else self.sets[self.data]

    @property
    def learns_the_task(self) -> bool:
        """Whether it trains on `task.instructions`."""
        return self.what != "none" and self.data == "task"

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.what != "none"

    def requirements(self, method: Method, runtime: RuntimeConfig, task: SingleTask) -> Iterator[str]:
        """What of the rest of a run does not go with this recovery, a sentence each."""
        if not self.trains:
            return
        if not method.compresses:
            yield (
                f"recovery.what={self.what} trains what a compression left, and method={method.name} compresses "
                "nothing: choose a method that does, or recovery=none"
            )
        elif self.what == "factors" and not method.factorises:
            yield (
                f"recovery.what=factors trains low-rank factors, and method={method.name} leaves none: use "
                "recovery=lora"
            )
        elif method.rounds:
            yield (
                f"recovery.what={self.what} trains weights, and method={method.name} rounds them to few bits "
                "(method.storage.bits): use recovery=none, or storage=factors"
            )
        if self.method is not None and not self.method.adapts:
            yield (
                f"recovery.method={self.method.name} is no adapter: choose one, for example recovery.method=astra or "
                "recovery.method=lora"
            )
        if self.data == "task" and not task.teaches:
            yield (
                f"recovery.data=task: task={task.name} has nothing to learn from (task.instructions): choose a task "
                f"that has, such as commonsense, or recovery.data=text, or one of {', '.join(self.sets)}"
            )
        if runtime.placement is not None:
            yield runtime.not_for_training
        if runtime.weights == "streamed":
            yield "recovery trains the whole model: use runtime.weights=resident, or recovery=none"
        if runtime.kind in ("fsdp", "deepspeed"):
            yield "recovery trains a model that every process holds whole: use runtime=ddp or runtime=single"

    @model_validator(mode="after")
    def _trains_on_one_of_its_sets(self) -> "RecoveryConfig":
        if self.data not in (*NO_SETS, *self.sets):
            hint = did_you_mean(self.data, (*NO_SETS, *self.sets))
            raise ValueError(f"data='{self.data}' is neither text nor one of the instruction sets{hint}")
        return self

    @model_validator(mode="after")
    def _an_adapter_has_a_method(self) -> "RecoveryConfig":
        if (self.what == "adapter") != (self.method is not None):
            raise ValueError("what=adapter and method go together: recovery=adapter recovery.method=astra")
        return self
