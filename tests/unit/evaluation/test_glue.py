import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation import glue

LABELS = np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 0])
GUESSES = np.array([1, 0, 1, 0, 1, 1, 0, 0, 1, 1])
# Counted by hand: 4 true positives, 2 false positives, 1 false negative, 3 true negatives.


def test_accuracy_f1_and_matthews_from_the_counts():
    tp, fp, fn, tn = 4, 2, 1, 3
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.score("accuracy", LABELS, GUESSES) == 0.7
    assert glue.score("f1", LABELS, GUESSES) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert glue.score("matthews", LABELS, GUESSES) == pytest.approx(matthews)


def test_correlations_from_their_definitions():
    draw = np.random.default_rng(0)
    labels = draw.normal(size=50)
    values = labels + draw.normal(size=50)
    centred = (labels - labels.mean(), values - values.mean())
    pearson = (centred[0] @ centred[1]) / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    ranks = [scipy.stats.rankdata(x) for x in (labels, values)]
    assert glue.score("pearson", labels, values) == pytest.approx(pearson)
    assert glue.score("spearman", labels, values) == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman", "f1"])
@pytest.mark.parametrize("size", [1, 6])
def test_a_constant_scores_zero_without_a_warning(metric, size):
    labels = LABELS[-size:] if size > 1 else np.array([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glue.score(metric, labels, np.zeros(size)) == 0.0
        assert glue.score(metric, np.zeros(size), np.zeros(size)) == 0.0


def test_the_standard_error_of_accuracy_is_exact():
    assert glue.standard_error("accuracy", LABELS, GUESSES) == pytest.approx(np.sqrt(0.7 * 0.3 / 10))


def test_the_bootstrap_agrees_with_theory_for_a_correlation():
    draw = np.random.default_rng(1)
    labels = draw.normal(size=2000)
    values = 0.5 * labels + np.sqrt(0.75) * draw.normal(size=2000)
    # Asymptotic standard error of Pearson's r of a bivariate normal: (1 - r^2) / sqrt(n).
    error = glue.standard_error("pearson", labels, values)
    assert error == pytest.approx(0.75 / np.sqrt(2000), rel=0.2)
    assert error == glue.standard_error("pearson", labels, values)


def test_the_majority_is_the_mode_or_the_mean():
    assert glue.majority([0.0, 2.0, 2.0, 1.0], is_regression=False) == 2
    assert glue.majority([0.0, 5.0, 2.5, 2.5, 5.0], is_regression=True) == 3.0


def test_predictions_are_the_largest_logit_or_the_value_itself():
    assert glue.predictions_of(np.array([[0.1, 0.3, 0.2], [2.0, 0.0, 1.0]])).tolist() == [1, 0]
    assert glue.predictions_of(np.array([[0.1], [4.0]])).tolist() == [0.1, 4.0]


class CountsTokens(nn.Module):
    """Its logits are the sum and the number of a row's tokens."""

    def __init__(self, at_nine: float = 0.0) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []
        self.at_nine = at_nine

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        total = (input_ids * attention_mask).sum(1).float()
        total[(input_ids == 9).any(1)] += self.at_nine
        return SimpleNamespace(logits=torch.stack([total, attention_mask.sum(1).float()], 1))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


ROWS = [[3, 4], [9], [1, 1, 1, 1, 1, 1], [2, 2, 2], [5, 5, 5, 5], [7, 1]]


def encoded():
    return datasets.Dataset.from_list([{"input_ids": ids, "labels": 0} for ids in ROWS])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_logits_come_back_in_the_order_of_the_rows(tokenizer, batch_size):
    model = CountsTokens().train()
    logits = glue.predict(model, encoded(), tokenizer, batch_size, "cpu")
    assert logits.tolist() == [[sum(ids), len(ids)] for ids in ROWS]
    assert not model.training
    # Longest first: what does not fit into memory fails at once, and little padding is run.
    widths = [width for _, width in model.shapes]
    assert widths == [6, 4, 3, 2, 2, 1][::batch_size]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_predictions(tokenizer, value):
    with pytest.raises(LowRankKitError, match="1 of 6 rows have logits that are not finite"):
        glue.predict(CountsTokens(value), encoded(), tokenizer, 4, "cpu")
