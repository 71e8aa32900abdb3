import copy
import math

import pytest
import torch
from rich.progress import Progress

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models import head

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "opt", "gpt2"]


def windows(count: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(1))


def log_likelihoods(model, ids: torch.Tensor) -> torch.Tensor:
    """float64 throughout, one window at a time, by the definition."""
    model = copy.deepcopy(model).double()
    rows = []
    with torch.no_grad():
        for window in ids:
            logits = model(window[None]).logits[0, :-1]
            logits = logits - logits.max(1, keepdim=True).values
            log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
            rows.append(torch.stack([log_probabilities[i, t] for i, t in enumerate(window[1:])]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_definition_in_float64(tiny_model, family):
    model = tiny_model(family)
    reference = -log_likelihoods(model, windows())
    found = perplexity(model, windows())
    assert found.nll == pytest.approx(float(reference.mean()), rel=1e-6)
    assert found.value == pytest.approx(math.exp(float(reference.mean())), rel=1e-5)
    assert found.per_window == pytest.approx(reference.mean(1).tolist(), rel=1e-5)
    assert found.tokens == reference.numel() == 5 * 11


def test_agrees_with_the_loss_of_transformers(tiny_model):
    model = tiny_model("gemma2")
    with torch.no_grad():
        loss = float(model(windows(), labels=windows()).loss)
    assert perplexity(model, windows()).nll == pytest.approx(loss, rel=1e-6)


def test_the_standard_error_is_that_of_resampled_windows(tiny_model):
    model, ids = tiny_model("llama"), windows(64, 4)
    found = perplexity(model, ids, batch_size=64)
    means = torch.tensor(found.per_window)
    draws = torch.randint(64, (4000, 64), generator=torch.Generator().manual_seed(0))
    bootstrap = means[draws].mean(1).exp().std()
    assert found.stderr == pytest.approx(float(bootstrap), rel=0.1)
    assert perplexity(model, ids[:1]).stderr is None


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_batches_and_slices_of_rows_change_nothing(tiny_model, monkeypatch, batch_size):
    model = tiny_model("llama").train()
    whole = perplexity(model, windows())
    assert not model.training
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * 64)
    assert perplexity(model, windows(), batch_size).per_window == pytest.approx(whole.per_window, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_window_with_logits_that_are_not_finite_is_named(tiny_model, value):
    model, ids = tiny_model("llama"), windows().clamp(max=62)
    ids[3, 4] = 63
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = value
    with pytest.raises(LowRankKitError, match="window 3 of 5 has logits that are not finite"):
        perplexity(model, ids, batch_size=2)


def test_a_logit_of_minus_infinity_is_an_error_though_the_loss_is_finite(tiny_model):
    model = tiny_model("gpt2")
    model.lm_head = torch.nn.Linear(32, 64)
    with torch.no_grad():
        model.lm_head.bias[0] = -torch.inf
    with pytest.raises(LowRankKitError, match="window 0"):
        perplexity(model, windows())


def test_agrees_with_rolling_log_likelihoods_of_lm_eval(tiny_model):
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    model, ids = tiny_model("llama"), windows()
    judge = hf.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=32, add_bos_token=False)
    requests = [(("", ""), window[:1].tolist(), window[1:].tolist()) for window in ids]
    sums = [found[0] for found in judge._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert perplexity(model, ids).nll == pytest.approx(-sum(sums) / (5 * 11), rel=1e-6)


def test_the_bar_counts_windows(tiny_model):
    progress = Progress(disable=True)
    perplexity(tiny_model("llama"), windows(), 2, progress=progress, description="wikitext2")
    [task] = progress.tasks
    assert (task.description, task.completed, task.total) == ("wikitext2", 5, 5)
