"""Every truncation with every allocation and every correction, and storages with each of these, on one tiny model."""

import copy
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_kit.allocations.allocation import Allocation
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.corrections.correction import Correction
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.layout import layout_of
from lowrank_kit.storages.storage import Storage
from lowrank_kit.structures.structure import Structure
from lowrank_kit.truncations.truncation import Truncation

TRUNCATIONS, ALLOCATIONS, CORRECTIONS = Truncation.known, Allocation.known, Correction.known
# One window is held out of three.
REFINE = {"refine": {"passes": 1}}
STORAGES, STRUCTURES = Storage.known, Structure.known
# Pairs with a storage other than the default: it meets factors and costs alone.
WITH_STORAGE = [
    choice
    for storage in STORAGES.keys() - {"factors"}
    for choice in (
        *((truncation, "lagrangian", "none", storage) for truncation in TRUNCATIONS),
        *(("two_sided", allocation, "none", storage) for allocation in ALLOCATIONS),
        *(("two_sided", "uniform", correction, storage) for correction in CORRECTIONS),
    )
]
ADDS_LOSSES = [name for name, allocation in ALLOCATIONS.items() if allocation.adds_losses]
CHOICES = [
    *((*choice, "factors", "none") for choice in product(TRUNCATIONS, ALLOCATIONS, CORRECTIONS)),
    *((*choice, "none") for choice in sorted({*WITH_STORAGE})),
    *(("two_sided", *choice, "channels") for choice in product(ADDS_LOSSES, CORRECTIONS, STORAGES)),
]
SETTINGS = {"two_sided": {"input_shrinkage": 0.1, "gradient_clipping": (0.1, 10.0), "window_margin": 0.125}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=1, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def windows(count, seed):
    return torch.randint(3, 64, (count, 16), generator=torch.Generator().manual_seed(seed))


def refused(method, layout):
    """Whether the combination is refused, from shapes alone, by one message that says what to use instead."""
    try:
        method.check(layout)
    except ConfigError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert "method." in message
    return True


@pytest.mark.parametrize(("truncation", "allocation", "correction", "storage", "structure"), CHOICES)
def test_it_ends_with_the_budget_and_a_checkpoint_or_is_refused(
    truncation, allocation, correction, storage, structure, model, cache, tmp_path
):
    method = TruncatedSVD(
        name="any",
        ratio=0.4,
        rank_multiple=1,
        correction=CORRECTIONS[correction](**REFINE.get(correction, {})),
        truncation=TRUNCATIONS[truncation](**SETTINGS.get(truncation, {})),
        allocation=ALLOCATIONS[allocation](),
        storage=STORAGES[storage](),
        structure=STRUCTURES[structure](),
    )
    layout = layout_of(model)
    if refused(method, layout):
        return
    samples = CalibrationSamples(tuple({"input_ids": row} for row in windows(4, seed=0)), batch_size=3)
    work = Compression(method, Context(copy.deepcopy(model), layout, samples, cache, windows(1, seed=1)))
    work.calibrate()
    plan = work.plan()
    compressed = work.apply(plan)
    # A basis that several matrices share is one parameter, counted once.
    left = sum(p.numel() for name, p in compressed.named_parameters() if "proj" in name)
    step = max(sum(candidate.shape) for candidate in work.calibrate().candidates)
    assert left == plan.parameters_after
    assert method.budget(layout) - step < left <= method.budget(layout)
    save_compressed(compressed, tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        expected, found = (m(windows(2, seed=2)).logits for m in (compressed, loaded))
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected)


def test_what_is_refused_is_known(model):
    """No combination is refused by accident."""
    layout = layout_of(model)
    found = {
        (truncation, allocation, correction, structure)
        for structure in STRUCTURES
        for truncation in TRUNCATIONS
        for allocation in ALLOCATIONS
        for correction in CORRECTIONS
        if refused(
            TruncatedSVD(
                name="any",
                ratio=0.4,
                rank_multiple=1,
                correction=CORRECTIONS[correction](),
                truncation=TRUNCATIONS[truncation](),
                allocation=ALLOCATIONS[allocation](),
                structure=STRUCTURES[structure](),
            ),
            layout,
        )
    }
    joint = {("joint", a, c, "none") for a in ALLOCATIONS for c in CORRECTIONS.keys() - {"none"}}
    channels = {(t, a, c, "channels") for t in TRUNCATIONS for a in ALLOCATIONS for c in CORRECTIONS}
    assert found == joint | channels - {("two_sided", a, c, "channels") for a in ADDS_LOSSES for c in CORRECTIONS}
