"""Speed and memory of models side by side: reading a prompt (prefill) and generating with a cache (decode)."""

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Int64
from rich.progress import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_kit.config import SpeedConfig
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.progress import Bar


@dataclass(frozen=True)
class Speed:
    """One model's measurements.

    ``prefill_seconds`` and ``decode_seconds`` are of the repeats, for ``batch * prompt`` and ``batch * new``
    tokens; ``peak_extra_bytes`` is the most that tensors besides the parameters held at once; multiplications are
    those of matrix products and attention, per token, the last position's logits included.
    """

    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    prefill_tokens: int
    decode_tokens: int
    parameter_bytes: int
    peak_extra_bytes: int
    prefill_multiplies_per_token: float
    decode_multiplies_per_token: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Median over the repeats."""
        return self.prefill_tokens / median(self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over the repeats."""
        return self.decode_tokens / median(self.decode_seconds)


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    settings: SpeedConfig,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Measure causal models on the same random tokens, in turn, so that a noisy machine disturbs all alike.

    Prefill computes the logits of the last position only, as ``generate`` does. Every model does all of its work
    twice before it is timed. Raises `ConfigError` for more tokens than a model has positions.
    """
    tokens = _tokens(models, settings).to(device)
    passes = {name: _Pass(model.eval(), tokens, settings.prompt_tokens, device) for name, model in models.items()}
    costs = {name: a_pass.cost() for name, a_pass in passes.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    bar = Bar(progress, "speed", settings.repeats * len(models))
    for _ in range(settings.repeats):
        for name, a_pass in passes.items():
            seconds[name].append(a_pass.timed())
            bar.advance()
    return {
        name: Speed(
            prefill_seconds=tuple(prefill for prefill, _ in seconds[name]),
            decode_seconds=tuple(decode for _, decode in seconds[name]),
            prefill_tokens=settings.batch_size * settings.prompt_tokens,
            decode_tokens=settings.batch_size * settings.new_tokens,
            parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            **costs[name],
        )
        for name, model in models.items()
    }


def speedup(dense: Speed, compressed: Speed) -> tuple[float, float]:
    """How many times faster prefill and decode are: medians over pairs of neighbouring repeats."""
    pairs = ((dense.prefill_seconds, compressed.prefill_seconds), (dense.decode_seconds, compressed.decode_seconds))
    prefill, decode = (median(slow / fast for slow, fast in zip(*pair, strict=True)) for pair in pairs)
    return prefill, decode


def ideal_speedup(dense: Speed, compressed: Speed) -> tuple[float, float]:
    """What `speedup` would be if time were proportional to multiplications."""
    return (
        dense.prefill_multiplies_per_token / compressed.prefill_multiplies_per_token,
        dense.decode_multiplies_per_token / compressed.decode_multiplies_per_token,
    )


def speed_records(dense: Speed, compressed: Speed, source: str, versions: Mapping[str, str]) -> list[EvalRecord]:
    """Both models' figures under the task "speed", and how many times faster the compressed one is and could be."""
    metrics = ("prefill_tokens_per_second", "decode_tokens_per_second", "parameter_bytes", "peak_extra_bytes")
    states: tuple[tuple[Checkpoint, Speed], ...] = (("dense", dense), ("final", compressed))
    n = len(dense.prefill_seconds)
    records = [
        EvalRecord("speed", metric, float(getattr(speed, metric)), None, n, 0, source, versions, checkpoint)
        for metric in metrics
        for checkpoint, speed in states
    ]
    for name, (prefill, decode) in (
        ("speedup", speedup(dense, compressed)),
        ("ideal_speedup", ideal_speedup(dense, compressed)),
    ):
        records.append(EvalRecord("speed", f"prefill_{name}", prefill, None, n, 0, source, versions))
        records.append(EvalRecord("speed", f"decode_{name}", decode, None, n, 0, source, versions))
    return records


def check_positions(settings: SpeedConfig, model: PretrainedConfig) -> None:
    """Raise `ConfigError` for more tokens than a model of this configuration has positions."""
    length = settings.prompt_tokens + settings.new_tokens
    positions = getattr(model.get_text_config(), "max_position_embeddings", length)
    if length > positions:
        raise ConfigError(
            f"eval.speed.prompt_tokens={settings.prompt_tokens} and eval.speed.new_tokens={settings.new_tokens} "
            f"are more than the model's {positions} positions"
        )


def _tokens(models: Mapping[str, PreTrainedModel], settings: SpeedConfig) -> Int64[Tensor, "batch tokens"]:
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    length = settings.prompt_tokens + settings.new_tokens
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (settings.batch_size, length), generator=generator)


class _Pass:
    """One model's work: read the prompt, then the other tokens one by one, whatever it would have said itself."""

    def __init__(
        self, model: PreTrainedModel, tokens: Int64[Tensor, "batch tokens"], prompt: int, device: str | torch.device
    ) -> None:
        self._model, self._device = model, torch.device(device)
        self._prompt, self._rest = tokens[:, :prompt], tokens[:, prompt:]

    def timed(self) -> tuple[float, float]:
        """Seconds of prefill and of decode."""
        clock = [self._now()]
        cache = self._prefill()
        clock.append(self._now())
        self._decode(cache)
        clock.append(self._now())
        return clock[1] - clock[0], clock[2] - clock[1]

    def cost(self) -> dict[str, Any]:
        """What needs no clock: multiplications per token, and memory."""
        with LiveTensors() as live:
            self._decode(self._prefill())
        with _flop_counter() as prefill:
            cache = self._prefill()
        with _flop_counter() as decode:
            self._decode(cache)
        return {
            "peak_extra_bytes": live.peak_bytes,
            "prefill_multiplies_per_token": prefill.get_total_flops() / 2 / self._prompt.numel(),
            "decode_multiplies_per_token": decode.get_total_flops() / 2 / self._rest.numel(),
        }

    def _prefill(self) -> Any:
        return self._model(input_ids=self._prompt, use_cache=True, logits_to_keep=1).past_key_values

    def _decode(self, cache: Any) -> None:
        for column in self._rest.split(1, dim=1):
            self._model(input_ids=column, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _flop_counter() -> FlopCounterMode:
    def attention(
        query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
    ) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (width + value[3])

    # The one attention kernel that torch's own table of costs lacks.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


class LiveTensors(TorchDispatchMode):
    """Highest sum of bytes of the tensors made while it is entered, each for as long as it lives.

    Exact and the same in every run, where resident memory depends on what the allocator kept from before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._now_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes; what it is given was there before or is counted already."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._now_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._now_bytes)
                weakref.finalize(storage, self._forget, storage.nbytes())
        return result

    def _forget(self, size: int) -> None:
        self._now_bytes -= size
