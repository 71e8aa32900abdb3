"""A causal model as lm-eval knows one, with a bound on the memory of a forward pass."""

import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import lm_eval.api.task
import torch
from jaxtyping import Int64
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit import distributed
from lowrank_kit.data.special_tokens import Opening, opening_of, plain_ids
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.load import input_device
from lowrank_kit.models.memory import rows_that_fit

# Its warnings tell of overrides that are meant, and one of its bars cannot be switched off.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = partial(tqdm, disable=True)

# The two strings, and the tokens of context and continuation.
Request = tuple[tuple[str, str], list[int], list[int]]
# Of context and continuation; an array takes a ninth of the memory of a list of numbers.
Tokens = dict[tuple[str, str], "tuple[array[int], array[int]]"]


class BoundedLM(HFLM):
    """`HFLM` on a loaded model; batches are as large as ``batch_size`` and `rows_that_fit` allow: lm-eval keeps
    all logits of a batch and their log-softmax.

    Requests are sorted by length, and those that differ in their last token share a forward pass, as in `HFLM`.
    Several processes that are asked the same answer a share each, and all get all answers.
    A prompt longer than the model reads is an error, where `HFLM` cuts off its beginning. The tokenizer is left as it
    is: lm-eval would give one without padding token one. What ``tokens`` holds is not tokenised again: models with one
    tokenizer share it. Prompts begin as ``opening`` says (None: by the rule ``auto``), and nothing is put behind them:
    `HFLM` takes whatever special tokens the tokenizer adds, so that with ``add_eos_token`` a prompt ends before its
    answer, and a token of the answer is lost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        tokens: Tokens | None = None,
        opening: Opening | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size="auto", max_length=max_length)
        self._device = input_device(model)
        self.advance: Callable[[float], None] = lambda share: None
        """Called with the share of the present requests that was answered, of those that are this process's."""
        self.cut_middle = False
        """Whether a prompt that leaves no room for what is to be generated loses its middle, or is an error."""
        self.cache_hook = self
        self._tokens: Tokens = {} if tokens is None else tokens
        self.opening = opening_of("auto", tokenizer, model.config) if opening is None else opening
        self._most_rows, self._first, self._share, self._asking = batch_size, 0, 1.0, ""

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As in `HFLM`, without bars of its own."""
        self._asking = str(requests[0].task_name)
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """As in `HFLM`, in batches of ``batch_size``; where tokens are drawn, the same ones every time."""
        self._asking = str(requests[0].task_name)
        room = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        if self.cut_middle and max(room) < self.max_length:
            requests = [self._cut(*asked) for asked in zip(requests, prompts, room, strict=True)]
        else:
            lengths = [len(prompt) + new for prompt, new in zip(prompts, room, strict=True)]
            self._refuse_longer(
                lengths, f"(with the {max(room)} to be generated) ", " or task.benchmarks.NAME.max_new_tokens"
            )
        return distributed.in_shares(self._generate, requests, [len(prompt) for prompt in prompts])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, behind BOS as the rule has it; with ``add_special_tokens=False``, of the text alone."""
        if add_special_tokens is False:
            return plain_ids([string], self.tokenizer)[0]
        return self.opening.encode([string], self.tokenizer)[0]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", **_: Any
    ) -> tuple[Int64[Tensor, "rows tokens"], Int64[Tensor, "rows tokens"]]:
        """Token ids and attention mask of several texts, each as in `tok_encode`; none is cut."""
        ids = {"input_ids": self.opening.encode(strings, self.tokenizer)}
        padded = self.tokenizer.pad(ids, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def add_partial(self, *_: object) -> None:
        """Take note of an answer: `HFLM` offers each to its ``cache_hook``."""
        self.advance(self._share)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        known = self._tokens.get((context, continuation))
        if known is None:
            first, second = super()._encode_pair(context, continuation)
            known = self._tokens[context, continuation] = array("i", first), array("i", second)
        return known[0].tolist(), known[1].tolist()

    def _loglikelihood_tokens(self, requests: list[Request], *rest: Any, **more: Any) -> list[tuple[float, bool]]:
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        self._refuse_longer(lengths)
        # Those that share a forward pass stay together.
        passes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            passes[*context, *continuation[:-1]].append(i)

        def answer(mine: Sequence[list[int]]) -> list[dict[int, tuple[float, bool]]]:
            asked = [requests[i] for together in mine for i in together]
            self._share = 1 / max(1, len(asked))
            answers = iter(super(BoundedLM, self)._loglikelihood_tokens(asked, *rest, **more) if asked else ())
            return [{i: next(answers) for i in together} for together in mine]

        sizes = [lengths[together[0]] for together in passes.values()]
        found: dict[int, tuple[float, bool]] = {}
        for answers in distributed.in_shares(answer, list(passes.values()), sizes):
            found |= answers
        return [found[i] for i in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        if not requests:
            return []
        self._share, chosen = 1 / len(requests), self.batch_size
        self.batch_size_per_gpu = self._most_rows
        try:
            with torch.random.fork_rng():
                # Requests for several texts to one prompt may be shared among processes.
                torch.manual_seed(distributed.number())
                return super().generate_until(list(requests), disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = chosen

    def _cut(self, request: Instance, prompt: list[int], room: int) -> Instance:
        """A prompt that is too long, without its middle, as LongBench does it (arXiv 2308.14508)."""
        if len(prompt) + room <= self.max_length:
            return request
        kept = self.max_length - room
        # Two texts, as there: a word that is cut in two at the seam is two halves of words.
        head, tail = prompt[: kept // 2], prompt[len(prompt) - kept // 2 :]
        return replace(request, arguments=(self.tok_decode(head) + self.tok_decode(tail), request.args[1]))

    def _refuse_longer(self, lengths: Sequence[int], counted: str = "", less: str = "") -> None:
        if (longest := max(lengths)) > self.max_length:
            too_long = sum(length > self.max_length for length in lengths)
            raise LowRankKitError(
                f"{too_long} of {len(lengths)} prompts of {self._asking} {counted}are longer than the "
                f"{self.max_length} tokens that the model reads, the longest has {longest}: use fewer shots{less}, "
                "raise model.max_length if it is set, or leave that benchmark out (~task.benchmarks.NAME)"
            )

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Request]) -> int:
        """Rows of the batch that the request at ``pos`` belongs to; its first one is its longest."""
        if pos == 0:
            self._first = 0
        _, context, continuation = n_reordered_requests[self._first]
        logits = (len(context) + len(continuation)) * self.model.config.get_text_config().vocab_size
        rows = rows_that_fit(logits, self._most_rows)
        if pos - self._first + 1 == rows:
            self._first = pos + 1
        return rows
