import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_kit.calibration.next_token_loss import next_token_loss
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.evaluation.speed import LiveTensors
from lowrank_kit.models import head
from lowrank_kit.models.head import Head

FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("gemma3_text", "phi3", "opt", "gpt2", "granite", "cohere2", "gemma4_text"),
]


def padded_batch(vocabulary=64):
    ids = torch.randint(3, vocabulary, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 1:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_whole_logits(family, tiny_model, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 4 * 64)
    model, batch = tiny_model(family, initializer_range=0.2), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    weight = next(p for n, p in model.named_parameters() if "0." in n and p.ndim == 2 and "vision" not in n)
    logits = model(**batch, use_cache=False).logits[:, :-1]
    whole = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    [expected] = torch.autograd.grad(whole, weight)
    loss, count = next_token_loss(model, batch)
    assert count == 13 + 8
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    [found] = torch.autograd.grad(loss, weight)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_labels_say_which_tokens_count(tiny_model):
    model, batch = tiny_model("llama"), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :5] = -100
    loss, count = next_token_loss(model, {**batch, "labels": labels})
    assert count == 9 + 8
    torch.testing.assert_close(loss / count, model(**batch, labels=labels).loss, rtol=1e-6, atol=0)


def test_a_large_vocabulary_takes_little_memory(tiny_model):
    """The logits of all 4 x 100 positions would be 400 MiB, and a loss has several copies of them."""
    model = tiny_model("llama", vocab_size=2**18)
    ids = torch.randint(3, 2**18, (4, 100), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with LiveTensors() as live:
        next_token_loss(model, batch)[0].backward()
        perplexity(model, ids, batch_size=4)
    assert live.peak_bytes < 5 * 4 * head.LOGITS_AT_ONCE


def test_a_model_without_head_is_refused(tiny_model):
    with pytest.raises(LowRankKitError, match="causal"):
        Head(tiny_model("llama", "base"))


def test_the_model_is_left_as_it_was(tiny_model):
    model, batch = tiny_model("llama"), padded_batch()
    before = model(**batch).logits
    next_token_loss(model, batch)
    assert "forward" not in model.model.__dict__
    assert torch.equal(model(**batch).logits, before)
