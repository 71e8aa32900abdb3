"""Hidden states before some blocks, kept so that forward passes need not begin at the embedding again."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from lowrank_kit.deferred import PreTrainedModel, Tensor, nn, torch
from lowrank_kit.models.forward import forward_replaced
from lowrank_kit.models.layout import ModelLayout

HIDDEN_BYTES = 4 * 2**30
"""Hidden states kept at once, on the CPU; those before one block are kept even if they alone need more."""


class Prefix:
    """The hidden states of every batch before the blocks at which passes are to begin.

    They hold as long as no block before the one in question changes. Where not all fit `HIDDEN_BYTES`, those before
    every second (third, ...) of the blocks are kept, the first one's always: a pass begins at the nearest one below.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        batches: Sequence[Mapping[str, Tensor]],
        blocks: Collection[int],
    ) -> None:
        """Run the model, in evaluation mode, up to the last of these blocks."""
        self._blocks = [model.get_submodule(path) for path in layout.blocks]
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        size = tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize
        every = math.ceil(len(blocks) / max(1, HIDDEN_BYTES // size))
        self._states: dict[int, list[Tensor]] = {start: [] for start in sorted(blocks)[::every]}
        with ExitStack() as stack, torch.no_grad():
            for start in self._states:
                hook = self._blocks[start].register_forward_pre_hook(self._recorder(start))
                stack.callback(hook.remove)
            for batch in batches:
                with suppress(_Reached):
                    model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False)

    @contextmanager
    def resumed(self, batch: int, block: int, device: "torch.device") -> Iterator[None]:
        """Forward passes of batch number ``batch`` compute no more of the blocks before ``block`` than they have to."""
        start = max((start for start in self._states if start <= block), default=0)
        with ExitStack() as stack:
            if start:
                known = self._states[start][batch].to(device)
                for passed in self._blocks[:start]:
                    stack.enter_context(forward_replaced(passed, handing_over(known)))
            yield

    def _recorder(self, start: int) -> Callable[..., None]:
        def record(_module: "nn.Module", inputs: tuple[Tensor, ...]) -> None:
            self._states[start].append(inputs[0].cpu())
            if start == max(self._states):
                raise _Reached

        return record


class _Reached(Exception):
    """Unwinds a forward pass whose rest is not needed."""


def handing_over(known: Tensor) -> Callable[..., Tensor]:
    """A block's forward that computes nothing and hands over what is known behind it."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return known

    return forward
