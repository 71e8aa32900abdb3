"""Adapters on a generative model: what training takes at Llama-2-7B's widths, and what they reach on a small model.

First two blocks of a random model in bfloat16, four rows of 1024 tokens a step: seconds of the start and of a step,
tokens a second, and peak memory. Then the small model and its text: every method trains on the same windows at the same
learning rate, and is judged by its mean loss on text that it did not see. One seed: a look, no study.
"""

import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from part import Figures, Part

from lowrank_kit.adapters.adapter import Adapter
from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.pissa import Pissa
from lowrank_kit.config import TrainConfig
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.training.adapters import AdaptedModel
from lowrank_kit.training.initialise import adapt

METHODS: dict[str, Callable[..., Adapter]] = {
    "lora": Lora,
    "astra": Astra,
    "pissa": partial(Pissa, iterations=16),
    "dora": Dora,
}


def main() -> None:
    part = Part(__doc__ or "")
    for name in METHODS:
        part.measure(f"{name}, a step", partial(steps, part, name))
    for name in METHODS:
        part.measure(f"{name}, learnt", partial(learnt, part, name))
    part.finish()


def steps(part: Part, name: str) -> Figures:
    """A few steps at full width."""
    rows, length = part.pick((4, 1024), (2, 32))
    model = part.llama(2)
    started = perf_counter()
    samples = part.samples(part.windows(*part.pick((32, 1024), (4, 32))))
    ready = adapt(model, METHODS[name](name=name, rank=part.pick(64, 4)), samples, task_type="CAUSAL_LM")
    part.synchronise()
    start = perf_counter() - started
    batches = part.windows(rows * 8, length).to(part.device).split(rows)
    seconds = [seconds for seconds, _ in trained(part, ready, batches)]
    step = median(seconds[2:])
    found = {"start": start, "step": step, "tokens a second": rows * length / step, "learns": ready.trained_parameters}
    del model, ready
    gc.collect()
    return found


def learnt(part: Part, name: str) -> Figures:
    """The losses while training, and the loss on other text before and after."""
    source, (length, rows, count) = ModelSource(str(part.small / "model")), part.pick((256, 8, 60), (32, 2, 3))
    model = load_model(source, "causal", device=part.device).model
    tokenizer = load_tokenizer(source)

    def windows(split: str) -> torch.Tensor:
        text = (part.small / f"data/text/mine/{split}.txt").read_text("utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    learning, judged = windows("validation"), windows("test")[: part.pick(64, 4)]
    before = perplexity(model, judged, batch_size=8, device=part.device).nll
    method = METHODS[name](name=name, rank=part.pick(64, 4))
    ready = adapt(model, method, part.samples(learning[: part.pick(64, 4)]), task_type="CAUSAL_LM")
    batches = learning[: rows * count].to(part.device).split(rows)
    losses = [loss for _, loss in trained(part, ready, batches)]
    after = perplexity(ready.model, judged, batch_size=8, device=part.device).nll
    return {"before": before, "after": after, "losses": losses}


def trained(part: Part, ready: AdaptedModel, batches: tuple[torch.Tensor, ...]) -> list[tuple[float, float]]:
    """Train on every batch once; seconds and loss of each step."""
    optimizer, found = ready.optimizer(TrainConfig(learning_rate=2e-4)), []
    ready.model.train()
    for ids in batches:
        part.synchronise()
        started = perf_counter()
        loss = ready.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        part.synchronise()
        found.append((perf_counter() - started, float(loss)))
    return found


if __name__ == "__main__":
    main()
