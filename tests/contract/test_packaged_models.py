import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.data.sources import DatasetRef, PackagedSource, open_source
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.factored import ranks_of
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.plain import Plain
from lowrank_kit.truncations.two_sided import TwoSided

pytestmark = pytest.mark.assets

SMOLLM2 = ModelSource("packaged://smollm2_135m")
MINILM = ModelSource("packaged://minilm_l6")


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load_model(SMOLLM2, "causal")


@pytest.fixture(scope="module")
def minilm(minilm_path):
    return load_model(MINILM, "base")


def test_smollm2_has_the_published_architecture(smollm2):
    layout = layout_of(smollm2.model)
    assert smollm2.new_modules == ()
    assert len(layout.blocks) == 30
    assert layout.roles == ("q", "k", "v", "o", "gate", "up", "down")
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    shapes = {ref.role: (ref.out_features, ref.in_features) for ref in layout.linears}
    assert shapes["k"] == shapes["v"] == (192, 576)
    assert shapes["gate"] == (1536, 576)
    assert smollm2.model.lm_head.weight is smollm2.model.get_input_embeddings().weight


def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = load_tokenizer(SMOLLM2)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    best = smollm2.model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


def test_minilm_has_the_published_architecture(minilm):
    layout = layout_of(minilm.model)
    assert len(layout.blocks) == 6
    assert {(r.role, r.out_features, r.in_features) for r in layout.linears} == {
        *((role, 384, 384) for role in "qkvo"),
        ("up", 1536, 384),
        ("down", 384, 1536),
    }


def test_minilm_puts_paraphrases_together(minilm):
    tokenizer = load_tokenizer(MINILM)
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell on Tuesday."]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    hidden = minilm.model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    meal, paraphrase, market = (hidden * mask).sum(1) / mask.sum(1)
    assert cosine_similarity(meal, paraphrase, dim=0) > 0.5 > 0.3 > cosine_similarity(meal, market, dim=0)


def test_minilm_classifier_is_new_and_its_fingerprint_is_that_of_the_encoder(minilm):
    torch.manual_seed(3)
    classifier = load_model(MINILM, "classification", num_labels=3)
    assert classifier.new_modules == ("classifier",)
    prints = [fingerprint(model, layout_of(model)) for model in (classifier.model, minilm.model)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("name", "split", "count", "columns"),
    [
        ("glue/mrpc", "train", 306, "sentence1 sentence2 label idx"),
        ("glue/rte", "validation", 70, "sentence1 sentence2 label idx"),
        ("glue/sst2", "train", 654, "sentence label idx"),
        ("arc_challenge", "test", 1172, "id question choices answerKey"),
        ("arc_easy", "validation", 570, "id question choices answerKey"),
        ("gsm8k", "test", 1319, "question answer"),
        ("lambada_openai", "test", 5153, "text"),
        ("mmlu", "dev", 285, "question subject choices answer"),
        ("openbookqa", "test", 500, "id question_stem choices answerKey"),
        ("piqa", "validation", 1838, "goal sol1 sol2 label"),
        ("squad", "validation", 1000, "id title context question answers"),
        ("math_geometry", "test", 479, "problem level type solution"),
    ],
)
def test_packaged_benchmark_rows_are_whole_and_in_hub_columns(asset, name, split, count, columns):
    asset("benchmark_rows")
    rows = open_source("packaged").load(DatasetRef(name), split).dataset
    assert len(rows) == count
    assert set(rows.column_names) == set(columns.split())


@pytest.mark.parametrize(
    ("name", "count"),
    [("boolq", 9427), ("hellaswag", 39905), ("piqa", 16113), ("social_iqa", 33410), ("winogrande", 40398)],
)
def test_packaged_training_rows_have_the_columns_of_the_validation_rows(asset, name, count):
    train, validation = asset("training_rows"), asset("benchmark_rows")
    lines = (train / name / "train.jsonl").read_text("utf-8").splitlines()
    first = json.loads((validation / name / "validation.jsonl").read_text("utf-8").splitlines()[0])
    assert len(lines) == count
    shared = {key: type(value) for key, value in json.loads(lines[0]).items()}
    assert shared.items() <= {key: type(value) for key, value in first.items()}.items()
    assert not any("\\nAnswer:" in line for line in lines)


def test_reading_comprehension_rows_hold_no_prompt(asset):
    asset("benchmark_rows")
    squad = open_source("packaged").load(DatasetRef("squad"), "validation").dataset
    assert all(any(answer in row["context"] for answer in row["answers"]["text"]) for row in squad)
    assert not any(row["question"].startswith("Question") or "Answer:" in row["question"] for row in squad)


@pytest.mark.parametrize("name", ["wikipedia", "openwebtext"])
def test_running_text_is_a_hundred_thousand_words_without_repetition(asset, name):
    asset("running_text")
    splits = [
        open_source("packaged").load(DatasetRef(f"text/{name}"), s).dataset["text"] for s in ("validation", "test")
    ]
    texts = [text for split in splits for text in split]
    assert len(texts) == len(set(texts)) == 1000
    assert 90_000 < sum(len(text.split()) for text in texts) < 120_000


def test_on_real_weights_and_text_each_better_metric_loses_less(smollm2_path, asset):
    """Values cut to half of their parameters: plain, activation-aware, and with the loss's gradients."""
    asset("running_text")
    tokenizer = load_tokenizer(SMOLLM2)
    validation, test = (
        tokenizer("\n\n".join(PackagedSource().load(DatasetRef("text/wikipedia"), split).dataset["text"]))["input_ids"]
        for split in ("validation", "test")
    )
    rows = torch.tensor(validation[: 5 * 256]).split(256)
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in rows), batch_size=2)
    windows = torch.tensor(test[: 4 * 256]).view(4, 256)
    found = {}
    for truncation in (Plain(), Optimal(), TwoSided()):
        model = load_model(SMOLLM2, "causal").model
        layout = layout_of(model)
        share = sum(r.in_features * r.out_features for r in layout.select(["v"]))
        ratio = 0.5 * share / sum(r.in_features * r.out_features for r in layout.linears)
        method = TruncatedSVD(name="v", ratio=ratio, roles=("v",), truncation=truncation, allocation=Uniform())
        context = Context(model, layout, samples)
        statistics = method.calibrate(context)
        plan = method.decide(layout, statistics.candidates, None)
        assert set(ranks_of(model)) == set()
        method.apply(plan, statistics, context)
        assert set(ranks_of(model).values()) == {72}
        found[truncation.kind] = perplexity(model, windows).nll
    assert found["two_sided"] < found["optimal"] < found["plain"]
