import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowrank_kit.config import CalibrationConfig, CausalTask, EvalConfig, TextSet
from lowrank_kit.data import sources
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import open_source
from lowrank_kit.data.task_texts import TaskTexts, text_ref
from lowrank_kit.errors import ConfigError

BREAK = 999


def reader(bos: bool = False, longest: int = 64) -> Reader:
    """The word n is token n; every line break is one token, BREAK; BOS 998."""
    words = {str(i): i for i in range(998)} | {"<s>": 998, "\n": BREAK}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 998)])
    return Reader(PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest))


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


def write(file: Path, *texts: str, column: str = "text") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({column: text}) for text in texts]
    file.write_text("\n".join(lines) if file.suffix == ".jsonl" else texts[0])


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "text/first/validation.jsonl", numbers(0, 10), numbers(10, 50))
    write(tmp_path / "text/first/test.jsonl", numbers(100, 130))
    write(tmp_path / "second/test.txt", numbers(200, 240))
    write(tmp_path / "second/validation.txt", numbers(300, 340))
    return tmp_path


@pytest.fixture
def make(folder):
    def build(texts=("first", "second"), task=None, eval=None, calibration=None) -> TaskTexts:
        texts = texts if isinstance(texts, dict) else {name: {} for name in texts}
        texts = {name: TextSet(**text) for name, text in texts.items()}
        whole = CausalTask(kind="causal", name="p", texts=texts, **{"window": 8, **(task or {})})
        settings = CalibrationConfig(**(calibration or {"samples": 3, "seq_len": 5}))
        return TaskTexts(whole, open_source("local", folder), EvalConfig(**(eval or {})), settings)

    return build


def test_texts_are_found_with_and_without_the_prefix_as_rows_and_as_plain_text(make):
    texts = make()
    assert texts.names == ("first", "second")
    first, second = texts.evaluation(reader())
    assert first.windows.tolist() == [list(range(100 + 8 * i, 108 + 8 * i)) for i in range(3)]
    assert second.windows.shape == (5, 8)
    assert second.windows.flatten().tolist() == list(range(200, 240))
    assert first.source == "local: text/first/test.jsonl, test, 3 windows of 8 tokens, no BOS"
    assert second.source == "local: second/test.txt, test, 5 windows of 8 tokens, no BOS"


def test_rows_are_joined_once_by_the_separator_without_special_tokens_inside(make):
    windows = make(texts={"first": {}}).calibration(reader())
    assert windows.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [BREAK, BREAK, 10, 11, 12]]
    windows = make(texts={"first": {"separator": " "}}).calibration(reader(bos=True))
    assert windows.tolist() == [[998, *range(n, n + 4)] for n in (0, 4, 8)]


def test_held_out_windows_lie_behind_those_calibrated_on(make):
    texts = make()
    assert texts.calibrated_on == "first"
    assert texts.held_out(2, reader()).flatten().tolist() == list(range(13, 29))
    assert texts.held_out(1, reader()).dtype == torch.int64
    with pytest.raises(ConfigError, match=r"5 held-out windows .* 'validation' of first has 4 of 8 tokens"):
        texts.held_out(5, reader())


def test_hyper_parameters_are_chosen_on_calibration_splits_only(make, folder):
    (folder / "text/first/test.jsonl").unlink()
    (folder / "second/test.txt").unlink()
    texts = make(eval={"held_out": 2})
    first, second = texts.evaluation(reader())
    assert first.windows.flatten().tolist() == list(range(34, 50))
    assert second.windows.flatten().tolist() == list(range(324, 340))
    assert first.source.startswith("held out of calibration; ")
    assert set(texts.facts()) == {"first:validation", "second:validation"}


def test_what_a_rule_measures_on_is_not_what_it_is_judged_by(make):
    texts = make(eval={"held_out": 2})
    first, _ = texts.evaluation(reader())
    assert not set(texts.held_out(2, reader()).flatten().tolist()) & set(first.windows.flatten().tolist())
    with pytest.raises(ConfigError, match=r"3 held-out windows .* 'validation' of first has 2 of 8 tokens"):
        texts.held_out(3, reader())
    # The same windows for another calibration.
    again, _ = make(eval={"held_out": 2}, calibration={"samples": 3, "seq_len": 5}).evaluation(reader())
    assert again.windows.equal(first.windows)
    with pytest.raises(ConfigError, match=r"9 held-out windows .* 'validation' of first has 4 of 8 tokens"):
        make(eval={"held_out": 9}).evaluation(reader())


def test_the_limit_counts_windows(make):
    assert [len(text.windows) for text in make(eval={"limit": 4}).evaluation(reader())] == [3, 4]


def test_too_little_text_to_calibrate_on_says_how_much_there_is(make):
    texts = make(calibration={"samples": 11, "seq_len": 5})
    with pytest.raises(ConfigError, match=r"samples=11: 'validation' of first has 10 windows of calibration.seq_len=5"):
        texts.calibration(reader())
    assert make(calibration={"samples": 10, "seq_len": 5}).calibration(reader()).numel() == 50


def test_less_text_than_one_window_is_refused(make):
    with pytest.raises(ConfigError, match=r"'test' of first has 30 tokens, less than one window: lower task.window=31"):
        make(task={"window": 31}).evaluation(reader())
    assert len(make(task={"window": 30}, texts=["first"]).evaluation(reader())[0].windows) == 1


def test_windows_are_as_long_as_the_model_reads_but_no_longer(make):
    assert make(task={"window": None}).window(reader(longest=20)) == 20
    assert make(task={"window": None}).window(reader(longest=10**30)) == 2048
    with pytest.raises(ConfigError, match=r"task\.window=8 is longer than the 7 tokens"):
        make().evaluation(reader(longest=7))
    with pytest.raises(ConfigError, match=r"calibration\.seq_len=5 is longer than the 4 tokens"):
        make().calibration(reader(longest=4))


def test_a_long_text_is_tokenised_without_a_warning(make, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        make(texts=["first"]).evaluation(reader(longest=8))
    assert not caplog.records


def test_texts_that_the_source_lacks_are_left_out_with_a_warning(make, caplog):
    texts = make(texts=["absent", "second", "first"])
    assert texts.names == ("second", "first")
    assert texts.calibrated_on == "second"
    assert "data=local has second, first and not absent" in caplog.text


def test_no_text_at_all_is_an_error(make):
    with pytest.raises(ConfigError, match=r"data=local has none of the texts x, y; add your own: .*task\.texts\.NAME"):
        make(texts=["x", "y"])
    with pytest.raises(ConfigError, match=r"looked for .*text/x/test\.jsonl; sets here: second, text/first"):
        make(texts=["x"])


def test_the_text_to_calibrate_on_may_be_named_and_must_be_there(make, folder):
    assert make(task={"calibrate_on": "second"}).calibration(reader())[0].tolist() == list(range(300, 305))
    (folder / "second/validation.txt").unlink()
    with pytest.raises(ConfigError, match="no split 'validation' of 'text/second'"):
        make(task={"calibrate_on": "second"})
    assert make(texts=["second", "first"]).calibrated_on == "first"
    lonely = make(texts=["second"])
    assert len(lonely.evaluation(reader())) == 1
    with pytest.raises(ConfigError, match="lacks 'validation' of second"):
        lonely.calibration(reader())


def test_facts_tell_source_hash_and_tokens_once_known(make):
    texts = make()
    assert "tokens" not in texts.facts()["first:test"]
    texts.evaluation(reader())
    fact = texts.facts()["first:test"]
    assert (fact["source"], fact["rows"], fact["tokens"]) == ("local: text/first/test.jsonl", 1, 30)
    assert len({fact["sha256"] for fact in texts.facts().values()}) == 3


def test_the_hubs_column_or_text_is_read_and_nothing_else(make, folder):
    write(folder / "text/first/test.jsonl", numbers(0, 8), numbers(8, 16), column="sentence")
    column = {"first": {"text_column": "sentence", "separator": " ", "max_rows": 1}}
    [text] = make(texts=column).evaluation(reader())
    assert text.windows.tolist() == [list(range(8))]
    with pytest.raises(ConfigError, match=r"'test' of first have no column 'text'; they have sentence"):
        make(texts=["first"])


@pytest.mark.parametrize("content", ["", '{"text": 3}', '{"text": null}'])
def test_rows_without_text_are_refused(make, folder, content):
    (folder / "text/first/test.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"'test' of first (has no rows|holds)"):
        make(texts=["first"])


def test_one_file_of_a_set_on_the_hub_is_enough(make, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    big = TextSet(hub_path="a/big", hub_files={"test": "x.gz"}, hub_revision="converted", max_rows=7)
    task = CausalTask(kind="causal", name="p", texts={"big": big, "ours": TextSet()}, calibrate_on="big")
    texts = TaskTexts(task, open_source("hub"), EvalConfig(), CalibrationConfig())
    assert texts.names == ("big",)
    options = {"split": "test[:7]", "revision": "converted", "data_files": {"test": "x.gz"}}
    assert ("a/big", None, options) in asked
    assert texts.facts()["big:test"]["source"] == "hub: a/big/x.gz@converted"
    assert open_source("hub").splits(text_ref("big", big)) == ("test",)


@pytest.mark.assets
def test_packaged_paragraphs_are_cut_in_two(asset):
    asset("running_text")
    from lowrank_kit.compose import Composer

    [config] = Composer().jobs(["method=none", "task=perplexity"], multirun=False)
    texts = TaskTexts(config.task, open_source("packaged"), config.eval, config.calibration)
    assert texts.names == ("wikipedia", "openwebtext")
    facts = texts.facts()
    assert facts["wikipedia:validation"]["rows"] == 3 * facts["wikipedia:test"]["rows"]
    assert "re-split" in facts["wikipedia:test"]["note"]
