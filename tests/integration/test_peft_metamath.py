"""The script that makes PEFT's result of a run: how it reads answers and what it measures."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments/peft_metamath/run.py"))


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        ("Question: 2+2\nAnswer:It is $2^2$. The answer is: 4", "2 + 2 = <<2+2=4>>4\n#### 4", True),
        ("The answer is: 4.0.", "#### 4", True),
        ("The answer is: 20/35", "#### 0.5714285714285714", True),
        ("The answer is: 50%", "#### 50", True),
        ("The answer is: $4\nQuestion: 3+3 The answer is: 6", "#### 4", False),
        ("The answer is: 4\nmore", "#### 4", True),
        ("The answer is: 1000", "#### 1,000", False),
        ("The answer is: 1,000", "#### 1,000", True),
        ("four", "#### 4", False),
        ("The answer is: 1/0", "#### 1", False),
        ("#### 4", "#### 5", False),
    ],
)
def test_an_answer_is_read_as_in_pefts_script(generated, reference, right):
    assert SCRIPT["is_right"](generated, reference) is right


def test_losses_of_texts_of_several_lengths_are_those_of_each_alone(tiny_model, checkpoint):
    model, tokenizer = (
        tiny_model("llama", initializer_range=0.3).eval(),
        AutoTokenizer.from_pretrained(checkpoint("llama")),
    )
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w1 w3 w5 w7", "w2", "w9 w8 w7 w6 w5"]
    found = SCRIPT["losses"](model, tokenizer, texts)
    predicted, unshifted, tokens = 0.0, 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        probabilities = logits.log_softmax(-1)
        predicted -= sum(float(probabilities[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
        unshifted -= sum(float(probabilities[i, ids[0, i]]) for i in range(ids.shape[1]))
        tokens += ids.shape[1]
    assert found["next token"] == pytest.approx(predicted / (tokens - len(texts)), rel=1e-5)
    assert found["unshifted"] == pytest.approx(unshifted / tokens, rel=1e-5)
