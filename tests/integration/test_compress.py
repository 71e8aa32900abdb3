import json
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.status import read_status

METHODS = [
    *("svd", "fwsvd", "asvd", "svd_llm", "svd_llm_v2", "d_rank", "swift", "zs_svd"),
    *("kfac_svd", "basis_sharing", "hisvd", "energy_svd", "loss_svd", "structured_svd", "aa_svd"),
]
MEASURED = ("asvd", "swift", "loss_svd")


@pytest.fixture
def words(language_arguments):
    def build(*more, **where):
        usual = ("task.texts.other={}", "method.ratio=0.4", "method.rank_multiple=1")
        measured = ["method.allocation.probe_seq_len=16"] if where.get("method") in MEASURED else []
        return language_arguments(*usual, *measured, *more, **where)

    return build


def read(file):
    return json.loads(file.read_text())


@pytest.mark.draws
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_to_a_checkpoint_of_the_promised_size(method, job):
    run = execute(job(method=method))
    plan, manifest = read(run / "plan.json"), read(run / "manifest.json")
    assert plan["parameters_after"] <= 0.6 * plan["parameters_before"]
    saved = manifest["size"]["dense"]["parameters"] - manifest["size"]["compressed"]["parameters"]
    assert saved == plan["parameters_before"] - plan["parameters_after"]
    records = {(r["task"], r["checkpoint"]): r for r in read(run / "results.json")}
    assert set(records) == {(t, c) for t in ("mine", "other") for c in ("dense", "final")}
    assert all(r["metric"] == "perplexity" and r["n"] == 18 for r in records.values())
    assert {p.name for p in (run / "plots").iterdir()} == {"spectra.png", "rank_map.png", "kept_ranks.png"}


def test_what_is_reported_is_what_another_process_finds_in_the_checkpoint(job, texts_folder):
    run = execute(job("eval.limit=5"))
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint")
    ids = torch.tensor(tokenizer((texts_folder / "text/mine/test.txt").read_text())["input_ids"])
    windows = ids[: 5 * 32].view(5, 32)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    [record] = [r for r in read(run / "results.json") if (r["task"], r["checkpoint"]) == ("mine", "final")]
    assert record["value"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


def test_stages_apart_give_what_one_run_gives(job, tmp_path):
    whole = execute(job(method="loss_svd"))
    parts = tmp_path / "parts"
    for stages in ("[calibrate,plan]", "[apply]", "[train,evaluate]"):
        execute(job(f"run.dir={parts}", f"run.stages={stages}", method="loss_svd"))
    assert read(whole / "plan.json") == read(parts / "plan.json")
    assert [r["value"] for r in read(whole / "results.json")] == [r["value"] for r in read(parts / "results.json")]


def test_speed_is_measured_on_request(job):
    run = execute(
        job("eval.limit=2", "eval.speed={enabled: true, batch_size: 2, prompt_tokens: 8, new_tokens: 4, repeats: 2}")
    )
    found = {(r["metric"], r["checkpoint"]): r["value"] for r in read(run / "results.json") if r["task"] == "speed"}
    assert found["parameter_bytes", "final"] < found["parameter_bytes", "dense"]
    assert found["prefill_ideal_speedup", "final"] > 1


def test_no_method_judges_the_model_as_it_is(job, words):
    [config] = Composer().jobs(
        force_dotted([w for w in words(method="none") if not w.startswith(("method.r", "method.p"))]), False
    )
    run = execute(config)
    assert {r["checkpoint"] for r in read(run / "results.json")} == {"final"}
    assert not (run / "checkpoint").exists()


def test_a_compressed_checkpoint_can_be_judged_again(job, words):
    first = execute(job("eval.limit=3"))
    again = [
        w for w in words("eval.limit=3", method="none") if not w.startswith(("method.r", "method.p", "model.path"))
    ]
    [config] = Composer().jobs(force_dotted([*again, f"model.path={first / 'checkpoint'}"]), False)
    finals = [
        [r["value"] for r in read(run / "results.json") if r["checkpoint"] == "final"]
        for run in (first, execute(config))
    ]
    assert finals[0] == pytest.approx(finals[1], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.ratio=0.995"], "nearest feasible"),
        (["calibration.samples=5000"], r"calibration.samples=5000.* has 18 windows"),
        (["method.roles=[gates]"], "gate"),
        (["task.window=100000"], "task.window"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(settings, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(ConfigError, match=message):
        execute(job(*settings))


def test_an_adapter_has_nothing_to_learn_from_running_text(job):
    with pytest.raises(ConfigError, match="has nothing to learn from"):
        execute(job("~method.ratio", "~method.rank_multiple", method="astra"))


def test_a_compressor_refuses_a_classification_task(checkpoint, rows_folder):
    words = ["method=svd_llm", "task=glue/rte", f"model.path={checkpoint('llama')}", f"data.root={rows_folder}"]
    [config] = Composer().jobs(force_dotted([*words, "data=local"]), False)
    with pytest.raises(ConfigError, match="task=perplexity"):
        execute(config)


def test_a_truncated_checkpoint_is_a_clear_error_and_leaves_no_results(job, words):
    first = execute(job("run.stages=[calibrate,plan,apply]"))
    file = next((first / "checkpoint").glob("*.safetensors"))
    with safe_open(file, "pt") as whole:
        assert whole.keys()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LowRankKitError, match=r"checkpoint/model\.safetensors was altered"):
        execute(job())
    assert not (first / "results.json").exists()


def test_a_compression_killed_while_it_calibrates_ends_as_if_it_had_not_been(words, environment, tmp_path, job):
    whole = execute(job(f"run.dir={tmp_path / 'whole'}", "calibration.cache=false"))
    process = warm.Command(["-m", "lowrank_kit.run", *words()], environment)
    deadline = time.monotonic() + 90
    while not (blocks := list((tmp_path / "cache/calibration").glob("*/block-*.safetensors"))):
        assert process.is_alive(), process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    [run] = (tmp_path / "runs").iterdir()
    assert read_status(run).state == "interrupted"
    written = {block: block.stat().st_mtime_ns for block in blocks}
    assert execute(job()) == run
    assert read(run / "plan.json") == read(whole / "plan.json")
    assert [r["value"] for r in read(run / "results.json")] == [r["value"] for r in read(whole / "results.json")]
    assert {block: block.stat().st_mtime_ns for block in blocks} == written


def test_a_stage_asked_for_alone_makes_what_it_needs(job, tmp_path):
    whole = execute(job("eval.limit=2"))
    alone = execute(job("eval.limit=2", "run.stages=[evaluate]", f"run.dir={tmp_path / 'alone'}"))
    assert read(alone / "plan.json") == read(whole / "plan.json")
    assert [r["value"] for r in read(alone / "results.json")] == [r["value"] for r in read(whole / "results.json")]


def test_too_little_text_to_measure_on_is_said_before_the_model_is_loaded(job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(ConfigError, match=r"method\.allocation\.probe_windows"):
        execute(job("method.allocation.probe_windows=500", method="loss_svd"))


def test_a_preset_is_in_the_run_directory_value_by_value_and_what_is_typed_wins(words, tmp_path):
    """From the command line: a single run is composed by Hydra, not by our composer."""
    typed = words("method=zs_svd", "method.preset=paper", "method.rank_multiple=2", "run.stages=[calibrate,plan]")
    done = warm.run(["-m", "lowrank_kit.run", *typed])
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((Path(done.stdout.splitlines()[-1].removeprefix("run: ")) / "config.yaml").read_text())
    method = config["method"]
    assert (method["preset"], method["rank_multiple"], method["allocation"]["floor"]) == ("paper", 2, 0.0)
    assert config["calibration"]["seq_len"] == 32
    refused = warm.run(["-m", "lowrank_kit.run", "method=zs_svd", "method.preset=nope"])
    assert refused.returncode == 2
    assert "method.preset=nope is not an option; legal: default, paper" in refused.stderr
