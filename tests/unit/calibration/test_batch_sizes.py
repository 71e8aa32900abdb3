"""Every statistic is a mean over tokens, sequences or rows: it does not matter how these come in batches."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lowrank_kit.adapters.lora_ga import LoraGA
from lowrank_kit.calibration.batches import batches_of, check_room
from lowrank_kit.calibration.gradients import stream_gradients, weight_gradients
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models import memory
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.initialise import adapt

SIZES = [1, 4, 6, 64]
LENGTHS = [2, 3, 5, 8, 13, 21, 30, 30, 7, 16]


def samples(labels=None):
    """Rows of very different lengths; with ``labels`` of tokens, the first half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, 64, (length,), generator=generator)
        row = {"input_ids": ids}
        if labels == "tokens":
            row["labels"] = torch.cat([torch.full((length // 2,), -100), ids[length // 2 :]])
        if labels == "classes":
            row["labels"] = torch.tensor(number % 2)
        rows.append(row)
    return CalibrationSamples(tuple(rows))


def activations(request):
    def collect(tiny_model, size):
        model = tiny_model("llama", initializer_range=0.2)
        layout, batches = layout_of(model), samples().batches(size, 0)
        found = {}
        for _, layers in stream_statistics(model, layout, batches, request, layout.linears):
            for layer in layers:
                found[layer.ref.name] = layer.magnitudes if request.magnitudes else layer.moments.gram
        return found

    return collect


def gradients(part, **options):
    def collect(tiny_model, size):
        model = tiny_model("llama", initializer_range=0.2)
        layout, batches = layout_of(model), samples().batches(size, 0)
        request = GradientRequest(**{"moments" if part in ("gram", "energy") else part: True}, **options)
        found = {}
        for _, layers in stream_gradients(model, layout, batches, layout.linears, request):
            found |= {name: torch.as_tensor(getattr(layer, part)) for name, layer in layers.items()}
        return found

    return collect


def gradients_ahead(tiny_model, size):
    model = tiny_model("gpt2", initializer_range=0.2)
    layout = layout_of(model)
    return weight_gradients(BlockWalk(model, layout, samples("tokens").batches(size, 0)), layout.linears, ahead=2)


def influence(distance):
    def collect(tiny_model, size):
        model = tiny_model("llama", initializer_range=0.2)
        return {"": block_influence(model, replace(samples(), batch_size=size), distance=distance)}

    return collect


def losses(tiny_model, size):
    ids = torch.randint(3, 64, (9, 12), generator=torch.Generator().manual_seed(0))
    return {"": torch.tensor(perplexity(tiny_model("llama", initializer_range=0.2), ids, size).per_window)}


def lora_ga_start(family, head, labels):
    """The product that the adapter starts from, of every matrix; its sign and basis are the SVD's own affair."""

    def collect(tiny_model, size):
        model = tiny_model(family, head, initializer_range=0.2)
        torch.manual_seed(0)
        method = LoraGA(name="lora_ga", rank=2, direction="ArBr")
        ready = adapt(model, method, replace(samples(labels), batch_size=size))
        found = {}
        for name, module in ready.model.named_modules():
            if hasattr(module, "lora_A"):
                spans = module.lora_A["default"].weight, module.lora_B["default"].weight.T
                for factor, span in zip("AB", spans, strict=True):
                    basis = torch.linalg.qr(span.detach().double().T).Q
                    found[f"{name} {factor}"] = basis @ basis.T
        assert found
        return found

    return collect


STATISTICS = {
    "input moments": activations(StatisticsRequest(moments="input")),
    "output moments": activations(StatisticsRequest(moments="output")),
    "magnitudes": activations(StatisticsRequest(magnitudes=True)),
    "gradient moments": gradients("gram"),
    "energy of gradients": gradients("energy"),
    "clipped gradients": gradients("gram", clipping=(0.5, 2.0), margin=0.125),
    "Fisher information": gradients("fisher"),
    "mean gradient": gradients("mean"),
    "gradient two tokens ahead": gradients_ahead,
    "cosine influence": influence("cosine"),
    "angular influence": influence("angular"),
    "perplexity": losses,
    "lora_ga on text": lora_ga_start("llama", "causal", None),
    "lora_ga on answers": lora_ga_start("llama", "causal", "tokens"),
    "lora_ga of a classifier": lora_ga_start("bert", "classification", "classes"),
    "lora_ga of an encoder-decoder": lora_ga_start("t5", "seq2seq", "tokens"),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_is_the_same_for_every_batch_size(statistic, tiny_model):
    found = [STATISTICS[statistic](tiny_model, size) for size in SIZES]
    for one, other in pairwise(found):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert (other[name].double() - value.double()).norm() <= 1e-4 * value.double().norm(), name


def test_batches_are_as_large_as_their_largest_tensor_allows(tiny_model, monkeypatch):
    model, rows = tiny_model("llama"), samples()
    sizes = [len(batch["input_ids"]) for batch in batches_of(model, rows)]
    assert sizes == [8, 2]
    # 48 numbers a token are the widest tensor, the longest row has 30 tokens.
    monkeypatch.setattr(memory, "NUMBERS_AT_ONCE", 3 * 30 * 48)
    assert [len(batch["input_ids"]) for batch in batches_of(model, rows)] == [3, 3, 3, 1]
    monkeypatch.setattr(memory, "NUMBERS_AT_ONCE", 1)
    assert {len(batch["input_ids"]) for batch in batches_of(model, rows)} == {1}


def test_a_row_that_cannot_fit_is_refused_before_the_work(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(LowRankKitError, match=r"window of 1000 tokens needs .* lower calibration\.seq_len") as found:
        check_room(model, 1000, 2**20)
    fits = int(str(found.value).split("seq_len to ")[1].split()[0])
    check_room(model, fits, 2**20)
    with pytest.raises(LowRankKitError):
        check_room(model, fits + 2, 2**20)
