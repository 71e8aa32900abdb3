from functools import partial

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from lowrank_kit.config import TrainConfig
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.optimizer import adamw


class Line(nn.Module):
    """The logit is a weight per token, plus one in a head of its own; the loss has a known gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.modules_to_save = nn.Linear(1, 1, bias=False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        nn.init.zeros_(self.modules_to_save.weight)

    def forward(self, input_ids, attention_mask, labels=None):
        score = self.weight[input_ids[:, 0]] + self.modules_to_save(torch.ones(len(input_ids), 1))[:, 0]
        logits = torch.stack([-score, score], 1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


ROWS = datasets.Dataset.from_list([{"input_ids": [i % 2 + 1], "labels": i % 2} for i in range(8)])


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


@pytest.fixture
def train(tokenizer, tmp_path):
    def run(model: nn.Module, log=lambda metrics, step: None, optimizer=None, **settings):
        plain = {"max_steps": 1, "batch_size": 8, "warmup_ratio": 0.0, "scheduler": "constant", **settings}
        return fit(
            model,
            Examples(ROWS, DataCollatorWithPadding(tokenizer), ROWS, accuracy),
            TrainConfig(**plain),
            Session(tmp_path / "checkpoints", "cpu", 0, log),
            optimizer=optimizer,
        )

    return run


def test_the_first_step_of_adam_is_the_learning_rate_of_each_group(train):
    model = Line()
    model.modules_to_save.weight.data.fill_(0.5)
    optimizer = partial(adamw, model, new=("modules_to_save",))
    train(model, optimizer=optimizer, learning_rate=1e-3, head_learning_rate=1e-1)
    # Adam's first step is the learning rate, whatever the gradient's size.
    assert model.weight.detach().tolist() == pytest.approx([0.0, -1e-3, 1e-3, 0.0], rel=1e-3)
    assert model.modules_to_save.weight.item() == pytest.approx(0.4, rel=1e-3)
    assert model.frozen.tolist() == [1.0, 1.0, 1.0]


def test_steps_override_epochs_and_epochs_count_without_them(train):
    assert train(Line(), epochs=5.0, max_steps=2)[-1]["step"] == 2
    assert train(Line(), epochs=3.0, max_steps=None, batch_size=4)[-1]["step"] == 6
    assert train(Line(), epochs=0.5, max_steps=None, batch_size=2, gradient_accumulation=2)[-1]["step"] == 1


def test_the_log_has_the_first_loss_and_the_scores_under_their_names(train):
    seen = []
    history = train(Line(), lambda metrics, step: seen.append((step, metrics)), max_steps=4, eval_every=2)
    assert [step for step, metrics in seen if "eval/accuracy" in metrics] == [2, 4]
    assert seen[0][0] == 1
    assert seen[0][1]["train/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [2, 4]


def test_training_ends_at_the_first_look_after_the_loss_is_lost(train):
    model = Line()
    model.weight.data[1] = torch.nan
    with pytest.raises(LowRankKitError, match=r"loss is nan at step 1; lower train\.learning_rate \(now 0\.001\)"):
        train(model, max_steps=50)


def test_a_finished_training_leaves_its_last_checkpoint_to_the_caller(train, tmp_path):
    train(Line(), max_steps=4, save_every=2)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_checkpoint_with_a_file_cut_short_is_not_gone_on_from(train, tmp_path, name, keep):
    train(Line(), max_steps=2, save_every=2)
    file = tmp_path / "checkpoints/checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(LowRankKitError, match=rf"{file}' is .*remove '{file.parent}', and training starts over"):
        train(Line(), max_steps=4, save_every=2)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_the_state_of_its_optimiser_is_not_gone_on_from(train, tmp_path, name):
    train(Line(), max_steps=2, save_every=2)
    (tmp_path / "checkpoints/checkpoint-2" / name).unlink()
    with pytest.raises(LowRankKitError, match=f"{name}' is gone"):
        train(Line(), max_steps=4, save_every=2)
