import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of

TEXTS = [
    "A man is playing a guitar.",
    "Yes.",
    "The committee, which met on Tuesday, could not agree on a single one of the seven proposals before it.",
    "Rain fell all night and the river rose.",
]
SEQUENCES = ((5, 9, 3), (7,), (4, 4, 8, 61, 33, 12, 3), (11, 30))


def gram_of(model, samples, batch_size=3):
    layout = layout_of(model)
    batches = samples.batches(batch_size, 0)
    request = StatisticsRequest(moments="output")
    return {
        layer.ref.name: layer.moments.gram / layer.moments.count
        for _, statistics in stream_statistics(model, layout, batches, request, layout.linears)
        for layer in statistics
    }


def assert_equal_statistics(model, *padded):
    first, *others = [gram_of(model, samples, batch_size) for batch_size, samples in enumerate(padded, 1)]
    for other in others:
        for name in first:
            assert (other[name] - first[name]).abs().max() <= 1e-6 * first[name].abs().max(), name


@pytest.mark.assets
@pytest.mark.parametrize("name", ["minilm_l6", "smollm2_135m"])
def test_padding_of_a_real_tokenizer_does_not_change_statistics(asset, name):
    path = asset(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Two blocks are enough: what padding disturbs, it disturbs in the first attention.
    model = AutoModel.from_pretrained(path, num_hidden_layers=2)
    left, right = (
        CalibrationSamples.from_padded([tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")])
        for side in ("left", "right")
    )
    alone = CalibrationSamples.from_padded([tokenizer([text], return_tensors="pt") for text in TEXTS])
    assert left.fingerprint() == right.fingerprint() == alone.fingerprint()
    assert_equal_statistics(model, left, right, alone)


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta", "qwen3"])
def test_padding_does_not_change_statistics(tiny_model, family):
    model = tiny_model(family)
    assert_equal_statistics(
        model, *(CalibrationSamples.from_padded(batches) for batches in (padded("left"), padded("right"), alone()))
    )


def padded(side):
    width = max(map(len, SEQUENCES))
    rows, masks = [], []
    for tokens in SEQUENCES:
        gap = [0] * (width - len(tokens))
        rows.append(gap + list(tokens) if side == "left" else list(tokens) + gap)
        masks.append([0] * len(gap) + [1] * len(tokens) if side == "left" else [1] * len(tokens) + [0] * len(gap))
    return [{"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}]


def alone():
    return [{"input_ids": torch.tensor([tokens])} for tokens in SEQUENCES]


def test_a_real_token_that_equals_the_padding_token_is_counted():
    samples = CalibrationSamples.from_padded(
        [{"input_ids": torch.tensor([[5, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}]
    )
    assert samples.tokens == 2


def test_decoder_inputs_are_cut_by_their_own_mask():
    batch = {
        "input_ids": torch.tensor([[3, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "decoder_input_ids": torch.tensor([[0, 7, 8, 9]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    (sample,) = CalibrationSamples.from_padded([batch]).sequences
    assert sample["input_ids"].tolist() == [3, 4]
    assert sample["decoder_input_ids"].tolist() == [0, 7, 8]


def test_an_encoder_decoder_reads_its_input_shifted_right():
    samples = CalibrationSamples(({"input_ids": torch.tensor([5, 6, 7])},)).with_decoder_inputs(0)
    assert samples.sequences[0]["decoder_input_ids"].tolist() == [0, 5, 6]
    assert samples.with_decoder_inputs(9).fingerprint() == samples.fingerprint()


def test_batches_are_right_padded_longest_first_with_masks():
    first, second = CalibrationSamples.from_padded(alone()).batches(3, pad_token_id=63)
    assert first["input_ids"].tolist() == [[4, 4, 8, 61, 33, 12, 3], [5, 9, 3] + [63] * 4, [11, 30] + [63] * 5]
    assert first["attention_mask"].sum(1).tolist() == [7, 3, 2]
    assert second["input_ids"].tolist() == [[7]]


def test_fingerprints_tell_samples_apart():
    def fingerprint(*rows):
        return CalibrationSamples(tuple({"input_ids": torch.tensor(row)} for row in rows)).fingerprint()

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert (
        len({fingerprint([1, 2], [3]), fingerprint([1], [2, 3]), fingerprint([1, 2, 3]), fingerprint([3], [1, 2])}) == 4
    )


def test_no_real_token_is_a_clear_error():
    empty = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(LowRankKitError, match=r"calibration\.samples"):
        CalibrationSamples.from_padded([empty])
