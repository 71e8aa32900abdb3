"""A causal model learns a task's instructions: what the run leaves, what it says of the model, what it refuses."""

import json

import pytest
import torch
import warm
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute

# A language that can be learnt: every word is followed by the next one.
TEXT = " ".join(f"w{i % 60}" for i in range(4000))
PIQA = {"goal": "w1 w2", "sol1": "w3", "sol2": "w4 w5"}


@pytest.fixture(scope="session")
def instructions_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("instructions")

    def write(name, rows):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (root / "mine").mkdir()
    for split in ("validation", "test"):
        (root / "mine" / f"{split}.txt").write_text(TEXT)
    pairs = [(f"w{i} w{i + 1}", f"w{i + 2} w{i + 3}") for i in range(40)]
    write("gsm8k/train.jsonl", [{"question": q, "answer": a} for q, a in pairs])
    write("metamath/train.jsonl", [{"query": q, "response": a} for q, a in pairs])
    write(
        "code_feedback/train.jsonl",
        [{"query": q, "answer": a, "lang": ("python", "rust")[i % 2]} for i, (q, a) in enumerate(pairs)],
    )
    for split, count in (("train", 40), ("validation", 6)):
        goals = [" ".join(f"w{(i * k) % 60}" for k in (1, 7, 11, 13, 17)) for i in range(count)]
        write(f"piqa/{split}.jsonl", [{**PIQA, "goal": goal, "label": i % 2} for i, goal in enumerate(goals)])
    return root


@pytest.fixture
def words(sharp_checkpoint, instructions_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache"))

    def build(*more, method="astra", task="commonsense", rank=True):
        return [
            *(f"method={method}", f"task={task}", "model.name=tiny", f"model.path={sharp_checkpoint}", "data=local"),
            *(f"data.root={instructions_folder}", "device=cpu", "task.window=32", "task.texts.mine={}"),
            *("task.max_windows=4", "task.max_length=64", "calibration.samples=40", "calibration.seq_len=64"),
            *("train.max_steps=20", "train.batch_size=4", "train.learning_rate=2e-2", "train.eval_every=null"),
            *(["method.rank=4"] if rank else []),
            *(f"run.root={tmp_path / 'runs'}", *more),
        ]

    return build


def read(file):
    return json.loads(file.read_text())


def windows_of(tokenizer):
    """What a run is evaluated on, made apart from it."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(TEXT)["input_ids"])
    return ids[: len(ids) // 32 * 32].view(-1, 32)[:4]


def losses(run):
    return [entry["loss"] for entry in read(run / "history.json") if "loss" in entry]


@pytest.mark.parametrize("method", ["astra", "lora"])
def test_a_task_is_learnt_and_judged_before_and_after(method, job, caplog):
    run = execute(job(method=method))
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    found = {(r["task"], r["metric"], r["checkpoint"]) for r in read(run / "results.json")}
    lines = {("mine", "perplexity"), ("piqa", "acc"), ("piqa", "acc_norm")}
    assert found == {(*line, checkpoint) for line in lines for checkpoint in ("dense", "final")}
    manifest = read(run / "manifest.json")
    assert manifest["data"]["piqa:train"]["rows"] == 40
    assert manifest["trained_parameters"] > 0
    assert ("calibrate" in manifest["initialisation"]) == (method == "astra")
    assert read(run / "plan.json")["ranks"]
    assert not (run / "checkpoints").exists()


def test_the_final_figures_are_those_of_the_exported_adapter(job, sharp_checkpoint):
    run = execute(job())
    [after] = [r["value"] for r in read(run / "results.json") if (r["task"], r["checkpoint"]) == ("mine", "final")]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharp_checkpoint), run / "adapter").eval()
    with torch.no_grad():
        windows = windows_of(sharp_checkpoint)
        mean = torch.stack([model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]).mean()
    assert float(mean.exp()) == pytest.approx(after, rel=1e-4)


@pytest.mark.draws
def test_effects_tell_where_the_update_lies_and_what_moved(job):
    figures = {}
    for subspace in ("tail", "top"):
        settings = (
            f"method.subspace={subspace}",
            "method.train=down",
            "eval.effects.blocks=2",
            "eval.effects.samples=40",
        )
        run = execute(job(*settings))
        effects = read(run / "effects.json")
        looks = effects["energy"]
        assert {look["block"] for look in looks} == {0, 2}
        assert sorted({look["step"] for look in looks}) == [4, 8, 12, 16, 20]
        # B = Q is frozen, so the update never leaves its span, which the calibration samples decide.
        figures[subspace] = [look[subspace] for look in looks]
        assert len(effects["drift"]["by_block"]) == 3
        assert all(0 < moved < 10 for moved in effects["drift"]["by_block"])
        [text] = effects["forgetting"]
        records = {(r["task"], r["checkpoint"]): r["value"] for r in read(run / "results.json")}
        assert (text["before"], text["after"]) == (records["mine", "dense"], records["mine", "final"])
        assert effects["initialisation"]["start"]["seconds"] > 0
        assert {path.name for path in (run / "plots").iterdir()} == {"drift.png", "energy.png"}
    assert min(figures["tail"]) > 1 - 1e-6
    assert min(figures["top"]) > 1 - 1e-6


def test_an_adapter_may_be_calibrated_on_general_text(job, words, sharp_checkpoint, composed):
    """The inputs' directions that the text does not use are those of the text's own windows, made apart from it."""
    asked = ("calibration.on=text", "calibration.samples=2", "calibration.seq_len=8", "method.null_space=true")
    run = execute(job(*asked, "train.max_steps=1", "train.learning_rate=1e-9", method="lora_null"))
    assert read(run / "manifest.json")["calibration"] == {"samples": 2, "tokens": 16}
    base = AutoModelForCausalLM.from_pretrained(sharp_checkpoint)
    ids = torch.tensor(AutoTokenizer.from_pretrained(sharp_checkpoint)(TEXT)["input_ids"])[:16].view(2, 8)
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    base.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().flatten(0, 1)))
    with torch.no_grad():
        base(input_ids=ids)
    kept = load_file(run / "adapter/adapter_model.safetensors")[f"base_model.model.{name}.lora_A.weight"]
    assert (seen[0] @ kept.double().T).norm() <= 1e-4 * seen[0].norm() * kept.norm()


def test_held_out_rows_are_judged_and_not_learnt(job):
    run = execute(job("eval.held_out=10", "train.eval_every=10", task="commonsense"))
    records = {(r["task"], r["metric"], r["checkpoint"]): r for r in read(run / "results.json")}
    assert records["answers", "perplexity", "final"]["value"] < records["answers", "perplexity", "dense"]["value"]
    assert records["answers", "perplexity", "final"]["n"] == records["piqa", "acc", "final"]["n"] == 10
    assert [e["step"] for e in read(run / "history.json") if "eval_loss" in e] == [10, 20]


@pytest.mark.parametrize(("task", "sets"), [("math", ["metamath:train"]), ("code", ["code_feedback:train"])])
def test_mathematics_and_code_are_learnt_from_their_sets(task, sets, job):
    config = job("~task.benchmarks", "eval.effects.enabled=false", "train.max_steps=4", method="lora", task=task)
    run = execute(config)
    data = read(run / "manifest.json")["data"]
    assert [name for name in data if name.endswith("train")] == sets
    # Of the code, what is Python.
    assert data[sets[0]]["rows"] == {"math": 40, "code": 20}[task]
    assert not (run / "effects.json").exists()


def test_a_killed_training_goes_on_and_ends_bit_for_bit_the_same(job, words, kill_in_training, tmp_path, caplog):
    steps = ("train.max_steps=60", "train.save_every=5", "method.dropout=0.1", "~task.benchmarks")
    whole = execute(job(*steps, f"run.dir={tmp_path / 'whole'}"))
    run = tmp_path / "killed"
    again = (*steps, f"run.dir={run}")
    kill_in_training(words(*again), run)
    with caplog.at_level("INFO", "lowrank_kit"):
        execute(job(*again))
    assert "training goes on from step " in caplog.text
    ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (run, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert read(run / "results.json") == read(whole / "results.json")
    assert read(run / "effects.json")["energy"] == read(whole / "effects.json")["energy"]


def test_stages_apart_judge_the_adapter_that_was_left(job, tmp_path, caplog):
    whole, parts = execute(job("~task.benchmarks")), tmp_path / "parts"
    execute(job("~task.benchmarks", f"run.dir={parts}", "run.stages=[apply,evaluate]"))
    assert "it was not trained" in caplog.text
    dense, final = (r["value"] for r in read(parts / "results.json"))
    assert final == pytest.approx(dense, rel=1e-4)
    execute(job("~task.benchmarks", f"run.dir={parts}", "run.stages=[train]"))
    assert not (parts / "results.json").exists()
    execute(job("~task.benchmarks", f"run.dir={parts}"))
    assert read(parts / "results.json") == read(whole / "results.json")


@pytest.mark.parametrize(
    ("settings", "where", "error", "message"),
    [
        ([], {"task": "perplexity"}, ConfigError, "task=perplexity has nothing to learn from"),
        (["data.root=."], {"task": "math"}, ConfigError, r"none of the sets .*metamath, gsm8k.*metamath/train\.jsonl"),
        (["task.instructions.piqa.lm_eval=pika"], {}, ConfigError, "lm-eval .* has no task 'pika'"),
        (["task.instructions.piqa.lm_eval=winogrande"], {}, LowRankKitError, "columns goal, sol1"),
        (["task.instructions.metamath.instruction_column=qury"], {"task": "math"}, ConfigError,
         r"did you mean 'query'\?.*set task\.instructions\.metamath\.instruction_column"),
        (["task.instructions.code_feedback.only={lang: c}"], {"task": "code"}, ConfigError, "no rows to learn from"),
        (["task.max_length=3"], {}, ConfigError, r"the prompts of all 40 rows of piqa fill task\.max_length=3"),
        (["eval.held_out=40"], {}, ConfigError, "eval.held_out=40 leaves nothing"),
        (["calibration.on=text", "calibration.samples=9999"], {}, ConfigError, "'validation' of mine has"),
        (["method.rank=1000"], {}, ConfigError, "method.rank=1000 does not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_said_before_the_model_is_loaded(settings, where, error, message, job, monkeypatch):
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    more = ["~task.benchmarks"] if where.get("task") in ("math", "code") else []
    with pytest.raises(error, match=message):
        execute(job(*more, *settings, **where))


@pytest.mark.draws
@pytest.mark.parametrize("adapter", ["astra", "lora"])
def test_a_model_is_compressed_adapted_and_judged_in_one_run(adapter, job, environment, sharp_checkpoint):
    recovery = ("recovery=adapter", f"recovery.method={adapter}", "recovery.method.rank=2", "method.ratio=0.4")
    run = execute(job(*recovery, "~task.benchmarks", method="svd_llm", rank=False))
    values = {r["checkpoint"]: r["value"] for r in read(run / "results.json")}
    assert set(values) == {"dense", "compressed", "final"}
    assert losses(run)[-1] < losses(run)[0]
    before, after = (load_file(run / name / "model.safetensors") for name in ("checkpoint", "recovered"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
run, ids = sys.argv[1], torch.arange(4, 24)[None]
load = lambda name: AutoModelForCausalLM.from_pretrained(f"{run}/{name}", trust_remote_code=True).eval()
with torch.no_grad():
    merged, apart, without = (m(input_ids=ids).logits for m in (
        load("recovered"), PeftModel.from_pretrained(load("checkpoint"), f"{run}/adapter").eval(), load("checkpoint")))
assert not any(name == "lowrank_kit" for name in sys.modules)
print(float((merged - apart).abs().max() / apart.abs().max()), float((without - apart).abs().max() / apart.abs().max()))
"""
    elsewhere = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    done = warm.run(["-c", script, str(run)], elsewhere, run, check=True)
    difference, change = map(float, done.stdout.split()[-2:])
    assert difference < 1e-5
    assert change > 1e-2
    check_effects_of_a_recovery(run, windows_of(sharp_checkpoint))


def check_effects_of_a_recovery(run, windows):
    """Against the models that were saved, before and after it."""
    effects, values = read(run / "effects.json"), {r["checkpoint"]: r["value"] for r in read(run / "results.json")}
    [text] = effects["forgetting"]
    assert (text["before"], text["after"]) == (values["compressed"], values["final"])
    assert effects["initialisation"]["start"]["seconds"] > 0
    looks = [look for look in effects["energy"] if look["linear"] == "model.layers.0.mlp.down_proj.up"]
    factors = [load_file(run / name / "model.safetensors") for name in ("checkpoint", "recovered")]
    old, new = (weights["model.layers.0.mlp.down_proj.up.weight"].double() for weights in factors)
    assert looks[-1]["norm"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("checkpoint", "recovered")]
    with torch.no_grad():
        before, after = (model(input_ids=windows, output_hidden_states=True).hidden_states for model in models)
    # Behind the last block transformers hands out what the final norm has made of it.
    moved = [float((new - old).norm() / old.norm()) for old, new in zip(before[1:-1], after[1:-1], strict=True)]
    assert effects["drift"]["by_block"][:-1] == pytest.approx(moved, rel=1e-4)
    # That of the plan stays.
    assert {"drift.png", "energy.png", "rank_map.png"} <= {path.name for path in (run / "plots").iterdir()}


def test_an_adapter_learns_on_a_compressed_checkpoint(job):
    compressed = execute(job("~task.benchmarks", "method.ratio=0.4", method="svd_llm", rank=False))
    run = execute(job("~task.benchmarks", f"model.path={compressed / 'checkpoint'}", "method.rank=2"))
    assert losses(run)[-1] < losses(run)[0]
    assert any(name.endswith(".up") for name in read(run / "plan.json")["ranks"])
    dense = {r["task"]: r["value"] for r in read(run / "results.json") if r["checkpoint"] == "dense"}
    before = {r["task"]: r["value"] for r in read(compressed / "results.json") if r["checkpoint"] == "final"}
    assert dense == pytest.approx(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["recovery.method=none"], "is no adapter"),
        (["recovery.what=adapter"], "go together"),
        (["recovery=adapter", "task=perplexity"], r"recovery\.data=task: task=perplexity has nothing to learn from"),
    ],
)
def test_recoveries_that_cannot_be_are_refused(settings, message, job):
    more = ["recovery=adapter"] if "is no adapter" in message else []
    with pytest.raises(ConfigError, match=message):
        execute(job(*more, *settings, method="svd_llm", rank=False))
