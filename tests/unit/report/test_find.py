import json

import pytest

from lowrank_kit.errors import ConfigError
from lowrank_kit.report.find import find_runs, without

PERPLEXITY = [("wikitext2", "perplexity", 20.0)]


def test_what_is_not_finished_is_listed_with_its_reason(leave_run, tmp_path):
    leave_run("whole", PERPLEXITY)
    leave_run("failed", None, ["seed=1", "method=svd_llm", "task=perplexity"], "failed", error="ValueError: no\nmore")
    leave_run("unmeasured", None, ["seed=2", "method=svd_llm", "task=perplexity"])
    leave_run("twice", PERPLEXITY)
    runs, left_out = find_runs([tmp_path / "runs", tmp_path / "runs/whole"])
    assert [run.path.name for run in runs] == ["twice"]
    reasons = {entry.path.name: (entry.state, entry.reason) for entry in left_out}
    assert reasons["failed"] == ("failed", "ValueError: no")
    assert reasons["unmeasured"][1].startswith("nothing was evaluated")
    assert reasons["whole"][1] == f"same configuration and seed as {tmp_path / 'runs/twice'}"


def test_members_of_a_group_are_read_and_its_summary_is_not(leave_run, tmp_path):
    words = ["method=lora", "task=glue"]
    group = leave_run("group", [("glue/rte", "accuracy", 0.5)], words)
    member = leave_run("group/rte", [("glue/rte", "accuracy", 0.5)], ["method=lora", "task=glue/rte"])
    (group / "rte/checkpoint").mkdir()
    assert [run.path for run in find_runs([tmp_path / "runs"])[0]] == [member]
    assert [run.path for run in find_runs([member])[0]] == [member]


def test_a_wrong_folder_is_named_with_the_nearest_one(leave_run, tmp_path):
    leave_run("whole", PERPLEXITY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no run: .* config.yaml and status.json"):
        find_runs([tmp_path / "runs", tmp_path / "empty"])
    with pytest.raises(ConfigError, match=f"did you mean '{tmp_path / 'runs'}'"):
        find_runs([tmp_path / "rums"])


def test_runs_older_than_a_setting_have_its_default(leave_run, tmp_path):
    folder = leave_run("old", PERPLEXITY)
    new = find_runs([folder])[0][0].recipe
    text = (folder / "config.yaml").read_text().replace("  weight_decay: 0.0\n", "")
    (folder / "config.yaml").write_text(text)
    assert find_runs([folder])[0][0].recipe == new


def test_ignored_settings_leave_the_recipe(leave_run):
    [run], _ = find_runs([leave_run("whole", PERPLEXITY)])
    [less] = without([run], ["train.learning_rate", "eval"])
    assert set(run.settings) - set(less.settings) == {
        "train.learning_rate", *(key for key in run.settings if key.startswith("eval."))
    }  # fmt: skip
    assert json.dumps(less.config) == json.dumps(run.config)
