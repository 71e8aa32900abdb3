"""What makes large models trainable changes memory and time, and not what is learnt."""

from importlib.util import find_spec

import datasets
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import TrainConfig, load
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.quantised import as_quantised, loading_options
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.directory import run_name
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapt, adapted
from lowrank_kit.training.processes import rows_per_pass, sharding


def samples():
    draw = torch.Generator().manual_seed(3)
    return CalibrationSamples(tuple({"input_ids": torch.randint(3, 64, (24,), generator=draw)} for _ in range(4)))


def batch():
    ids = torch.stack([sample["input_ids"] for sample in samples().sequences])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stack(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


ROWS = [{"input_ids": [3 + (7 * i + j) % 60 for j in range(12)], "attention_mask": [1] * 12} for i in range(16)]


def learn(model, rows, folder, optimizer=None, **settings):
    schedule = {"max_steps": 4, "batch_size": 4, "warmup_ratio": 0.0, "learning_rate": 2e-2, **settings}
    history = fit(
        model,
        Examples(datasets.Dataset.from_list(rows), stack),
        TrainConfig(**schedule),
        Session(folder, "cpu", 0),
        optimizer=optimizer,
    )
    return next(entry for entry in history if "loss" in entry)


def causal_rows():
    return [row | {"labels": row["input_ids"]} for row in ROWS]


METHODS = [
    Astra(name="astra", rank=3),
    Astra(name="astra", rank=3, base="untouched", train="down"),
    Lora(name="lora", rank=3),
    Dora(name="dora", rank=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'base', '')}")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(method, family, tiny_model):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        ready = adapt(tiny_model(family), method, samples(), task_type="CAUSAL_LM")
        model = ready.model.train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        loss = model(**batch()).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, recomputed) = found
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda m: m.name)
def test_a_training_with_checkpointing_is_that_without(method, tiny_model, tmp_path):
    calls, ended = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        ready = adapt(tiny_model("llama"), method, samples(), task_type="CAUSAL_LM")
        block = ready.model.get_base_model().model.layers[0].mlp
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        block.register_forward_pre_hook(count)
        learn(ready.model, causal_rows(), tmp_path / str(recompute), gradient_checkpointing=recompute)
        ended.append({n: p.detach() for n, p in ready.model.named_parameters() if p.requires_grad})
    # The blocks were run a second time in every backward pass.
    assert calls == [4, 8]
    for name, parameter in ended[0].items():
        torch.testing.assert_close(ended[1][name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed_precision", ["none", "bf16"])
@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: f"{m.name}-{getattr(m, 'base', '')}")
def test_adapters_of_a_bfloat16_base_learn_in_float32(method, mixed_precision, tiny_model, tmp_path):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        ready = adapt(tiny_model("llama").to(dtype), method, samples(), task_type="CAUSAL_LM")
        parameters = dict(ready.model.named_parameters())
        assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
        assert dtype in {p.dtype for p in parameters.values() if not p.requires_grad}
        precision = mixed_precision if dtype == torch.bfloat16 else "none"
        before = {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad}
        losses.append(
            learn(
                ready.model,
                causal_rows(),
                tmp_path / str(dtype),
                ready.optimizer,
                learning_rate=1e-5,
                mixed_precision=precision,
            )
        )
        # Steps this small would be rounded away in bfloat16.
        assert all(
            not torch.equal(before[n], parameters[n].detach())
            for n in before
            if "lora_A" in n or method.name == "astra"
        )
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=0.01)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classification"), ("llama", "classification"), ("llama", "causal")]
)
def test_passes_that_are_accumulated_are_one_pass_of_all_rows(family, head, tiny_model, tmp_path):
    rows = causal_rows() if head == "causal" else [row | {"labels": i % 2} for i, row in enumerate(ROWS)]
    firsts = []
    for settings in ({"batch_size": 8}, {"batch_size": 2, "gradient_accumulation": 4}):
        torch.manual_seed(0)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
        model = tiny_model(family, head, **no_dropout)
        ready = adapted(
            Lora(name="lora", rank=2), model, Lora(name="lora", rank=2).plan(layout_of(model), {}), {}, None,
            new_modules=[], task_type="CAUSAL_LM" if head == "causal" else "SEQ_CLS",
        )  # fmt: skip
        firsts.append(learn(ready.model, rows, tmp_path / str(len(firsts)), max_steps=1, **settings))
    for figure in ("loss", "grad_norm"):
        assert firsts[1][figure] == pytest.approx(firsts[0][figure], rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [
        (16, 1, 1, (16, 1)),
        (1, 128, 8, (1, 16)),
        (16, 1, 4, (4, 1)),
        (8, 3, 2, (6, 2)),
        (6, 2, 4, (3, 1)),
        (7, 1, 7, (1, 1)),
    ],
)
def test_a_step_reads_the_same_rows_for_any_number_of_processes(batch_size, accumulation, processes, expected):
    settings = TrainConfig(batch_size=batch_size, gradient_accumulation=accumulation)
    rows, passes = rows_per_pass(settings, processes)
    assert (rows, passes) == expected
    assert rows * passes * processes == batch_size * accumulation
    assert rows <= batch_size


def test_rows_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"6 rows an optimiser step .* 4 processes: make them a multiple of 4"):
        rows_per_pass(TrainConfig(batch_size=3, gradient_accumulation=2), 4)


def runtime(name):
    return load(Composer().compose([f"runtime={name}"])).runtime


def test_fsdp_is_what_accelerate_understands(tmp_path):
    chosen = runtime("fsdp")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **sharding(chosen))
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    # transformers writes into what it gets.
    assert chosen == runtime("fsdp")
    assert chosen.shards


@pytest.mark.parametrize(("name", "stage", "shards"), [("zero2", 2, False), ("zero3", 3, True)])
def test_zero_configurations_leave_to_the_run_what_it_says(name, stage, shards):
    chosen = runtime(name)
    options = sharding(chosen)["deepspeed"]
    assert options["zero_optimization"]["stage"] == stage
    # The keys that HfTrainerDeepSpeedConfig fills in from the arguments.
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert options[key] == "auto"
    assert chosen.shards == shards


def test_the_runtime_is_no_part_of_what_a_run_is():
    one, two = (load(Composer().compose([f"runtime={name}"])) for name in ("single", "fsdp"))
    assert run_name(one) == run_name(two)
    assert "runtime" not in one.resolved()
    assert "quantization" not in one.resolved()["model"]


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        ([], 2, "2 processes were started for one run: use runtime=ddp"),
        (["runtime=fsdp"], None, "start them with torchrun"),
        (["runtime=ddp", "train.batch_size=3"], 2, "3 rows an optimiser step"),
        (["runtime=ddp", "device=cuda:0"], 2, "device=cuda:0"),
        (["model.quantization=nf4", "device=cpu"], None, "bitsandbytes|CUDA device"),
        (["method=lora", "train.mixed_precision=fp16"], None, "fp16 needs a CUDA device, not cpu"),
        (["method=svd", "task=perplexity", "model.quantization=int8"], None, "compresses float weights"),
        (["method=svd", "task=perplexity", "recovery=lora", "runtime=fsdp"], 2, "recovery trains a model"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_opened(words, processes, message, monkeypatch):
    if processes:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=message):
        execute(load(Composer().compose(force_dotted(["device=cpu", *words]))))


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is there")
def test_deepspeed_is_missed_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        execute(load(Composer().compose(["device=cpu", "runtime=zero3"])))


def test_options_without_anybody_who_reads_them_are_refused():
    with pytest.raises(ConfigError, match="kind=ddp has no options"):
        load(Composer().compose(["runtime=ddp", "+runtime.options.version=2"]))


@pytest.mark.parametrize(("kind", "bits"), [("nf4", "load_in_4bit"), ("int8", "load_in_8bit")])
def test_a_quantised_base_is_asked_of_transformers(kind, bits):
    options = loading_options(kind, torch.bfloat16, "cuda:1")
    asked = options["quantization_config"]
    assert getattr(asked, bits)
    assert options["device_map"] == {"": torch.device("cuda:1")}
    if kind == "nf4":
        assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_methods_that_change_the_base_refuse_a_quantised_one(tiny_model):
    layout = as_quantised(layout_of(tiny_model("llama")))
    with pytest.raises(ConfigError, match=r"is quantised.*set method.base=untouched"):
        Astra(name="astra", rank=3).check(layout)
    Astra(name="astra", rank=3, base="untouched").check(layout)
    with pytest.raises(ConfigError, match="quantised"):
        FullFineTuning(name="full_ft").check(layout)
