"""What a training step descends is the mean over all its rows or tokens, however they are split into passes."""

from copy import deepcopy
from functools import partial
from random import Random

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerFast

from lowrank_kit.config import RecoveryConfig, TrainConfig
from lowrank_kit.data.padding import RightPadded
from lowrank_kit.training import recover as recovery
from lowrank_kit.training.fit import Examples, Session, fit

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
KINDS = [
    *(("causal", family) for family in ("llama", "gpt2", "opt", "gemma3")),
    ("distillation", "gpt2"),
    *(("classification", family) for family in ("bert", "llama")),
    ("regression", "llama"),
]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def made(kind, tiny_model, family, seed=0):
    head = "causal" if kind in ("causal", "distillation") else "classification"
    more = {"num_labels": 1, "problem_type": "regression"} if kind == "regression" else {}
    model = deepcopy(tiny_model(family, head, seed=seed, initializer_range=0.3, **NO_DROPOUT.get(family, {}), **more))
    return model


def rows(kind, lengths, unlearnt):
    """Rows of these lengths; the first ``unlearnt`` tokens of a causal one have no label, not even all of them."""
    draw, made = torch.Generator().manual_seed(len(lengths)), []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 64, (length,), generator=draw).tolist()
        if kind == "classification":
            labels = number % 2
        elif kind == "regression":
            # -100 is a number like any other here.
            labels = -100.0 if number == 1 else number / 3
        else:
            hidden = min(unlearnt[number % len(unlearnt)], length)
            labels = [-100] * hidden + ids[hidden:]
        made.append({"input_ids": ids, "labels": labels})
    return made


def loss_by_hand(kind, model, teacher, examples):
    """One row at a time, without padding, by the definition of each loss."""
    total, items = torch.zeros((), dtype=torch.float64), 0
    for row in examples:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0].double()
        if kind == "regression":
            total, items = total + (logits[0] - row["labels"]) ** 2, items + 1
        elif kind == "classification":
            total, items = total - logits.log_softmax(-1)[row["labels"]], items + 1
        else:
            p = teacher(input_ids=ids).logits[0].double().softmax(-1).detach()
            for place, wanted in enumerate(row["labels"][1:]):
                if wanted == -100:
                    continue
                log_q = logits[place].log_softmax(-1)
                total = total + (
                    (p[place] * (p[place].log() - log_q)).sum() if kind == "distillation" else -log_q[wanted]
                )
                items += 1
    return total / items


def one_step(kind, model, teacher, examples, tokenizer, folder, batch_size, accumulation):
    """The first logged loss, and the gradient that an optimiser step of plain descent took."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    causal = kind in ("causal", "distillation")
    collate = DataCollatorForSeq2Seq(tokenizer) if causal else DataCollatorWithPadding(tokenizer)
    history = fit(
        model,
        Examples(datasets.Dataset.from_list(examples), collate),
        TrainConfig(
            max_steps=1, batch_size=batch_size, gradient_accumulation=accumulation, warmup_ratio=0.0, max_grad_norm=1e9,
            scheduler="constant",
        ),
        Session(folder, "cpu", 0),
        loss=partial(recovery._distil, teacher) if kind == "distillation" else None,
        optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    return history[0]["loss"], {name: before[name] - p.detach() for name, p in model.named_parameters()}


def drawn(seed):
    """Lengths of the rows, how much of them is not learnt, and the rows of a pass, of which the last has fewer."""
    draw = Random(seed)
    lengths = [draw.randint(2, 9) for _ in range(draw.randint(3, 7))]
    short = [size for size in range(2, len(lengths)) if len(lengths) % size]
    return lengths, [draw.randint(0, 9) for _ in range(3)], draw.choice(short)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_every_split_of_a_step_descends_the_mean_over_all_of_it(kind, family, seed, tiny_model, tokenizer, tmp_path):
    lengths, unlearnt, batch_size = drawn(seed)
    examples = rows(kind, lengths, unlearnt)
    if kind in ("causal", "distillation"):
        # Something is learnt.
        examples[0]["labels"] = examples[0]["input_ids"]
    # As many passes as the rows need, and perhaps one more than there are: the last may be short, or not there.
    accumulation = -(-len(examples) // batch_size) + seed % 2
    model, teacher = made(kind, tiny_model, family), made("causal", tiny_model, family, seed=1).eval()
    reference = deepcopy(model).eval()
    expected = loss_by_hand(kind, reference, teacher, examples)
    expected.backward()
    loss, gradient = one_step(kind, model, teacher, examples, tokenizer, tmp_path, batch_size, accumulation)
    assert loss == pytest.approx(expected.item(), rel=2e-4, abs=1e-6)
    scale = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=2e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(("kind", "family"), [("causal", "llama"), ("causal", "gpt2"), ("classification", "bert")])
@pytest.mark.parametrize("eval_batch_size", [1, 3, 4, 16])
def test_the_loss_on_evaluation_rows_is_their_mean(kind, family, eval_batch_size, tiny_model, tokenizer, tmp_path):
    examples = rows(kind, [9, 2, 4, 7, 3, 8, 2], [0, 5, 1])
    model = made(kind, tiny_model, family)
    expected = loss_by_hand(kind, model, model, examples).item()
    causal = kind == "causal"
    collate = DataCollatorForSeq2Seq(tokenizer) if causal else DataCollatorWithPadding(tokenizer)
    history = fit(
        model,
        Examples(
            datasets.Dataset.from_list(examples),
            collate,
            datasets.Dataset.from_list(examples),
            eval_batch_size=eval_batch_size,
        ),
        TrainConfig(max_steps=1, batch_size=4, learning_rate=1e-12, eval_every=1),
        Session(tmp_path, "cpu", 0),
    )
    [found] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_recovery_learns_the_mean_over_a_step_with_a_short_last_pass(tiny_model, tokenizer, tmp_path):
    """The same weights from one pass of six rows of unequal lengths and from passes of four and two."""
    examples = datasets.Dataset.from_list(rows("causal", [9, 2, 4, 7, 3, 8], [0, 4]))
    ended = []
    for batch_size, accumulation in ((6, 1), (4, 2)):
        model = made("causal", tiny_model, "llama")
        recovered = recovery.recover(
            model,
            Examples(examples, RightPadded(0)),
            RecoveryConfig(what="lora", rank=2),
            TrainConfig(max_steps=1, batch_size=batch_size, gradient_accumulation=accumulation, warmup_ratio=0.0),
            Session(tmp_path / str(batch_size), "cpu", 0),
            teacher=made("causal", tiny_model, "llama", seed=1).eval(),
        )
        ended.append(recovered.history[0])
    assert ended[1]["grad_norm"] == pytest.approx(ended[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("share", "rising"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.0, 0)])
def test_the_warm_up_is_a_share_of_the_steps(scheduler, share, rising, tiny_model, tokenizer, tmp_path):
    model, rates = made("classification", tiny_model, "bert"), []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    fit(
        model,
        Examples(datasets.Dataset.from_list(rows("classification", [3, 4], [0])), DataCollatorWithPadding(tokenizer)),
        TrainConfig(max_steps=8, batch_size=2, warmup_ratio=share, scheduler=scheduler),
        Session(tmp_path, "cpu", 0),
        optimizer=lambda _: Recorded(model.parameters(), lr=1.0),
    )
    assert rates[:rising] == pytest.approx([step / rising for step in range(rising)])
    if rising < 8:
        assert rates[rising] == 1.0
        assert scheduler != "constant" or rates[rising:] == [1.0] * (8 - rising)
