from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.training.adapters import attach

EVERYTHING = {"alpha": 3.0, "rslora": True, "rank_pattern": {"o": 3, r".*\.(?:layers|layer|h|block)\.1\..*": 7}}


def tokens(rows=6, length=14):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    ids[:, -1] = 2
    return ids


def adapt(model, method, **options):
    """What the stages calibrate, plan and apply do."""
    layout, factors, kept = layout_of(model), {}, {}

    def reduce(statistics):
        module = model.get_submodule(statistics.ref.name)
        return method.reduce(weight_of(module), module.bias, statistics)

    method.check(layout)
    if isinstance(method, InitialisedAdapter):
        samples = CalibrationSamples(tuple({"input_ids": row} for row in tokens()), batch_size=4)
        kept = calibrate(model, samples, method.targets(layout), Reduction(method.needs(), reduce))
    plan = method.plan(layout, kept)
    for name, quantities in kept.items():
        factors[name] = method.initialise(weight_of(model.get_submodule(name)), quantities, plan.ranks[name])
    options = {"new_modules": (), "task_type": None, **options}
    return attach(model, method, plan, factors, **options)


def logits(model):
    ids = tokens()
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and model_is_seq2seq(model) else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def model_is_seq2seq(model):
    return "Classification" not in type(getattr(model, "get_base_model", lambda: model)()).__name__


def astra(**settings):
    return Astra(**{"name": "astra", "rank": 4, **settings})


MODELS = [
    ("llama", "causal"),
    ("gemma2", "causal"),
    ("gpt2", "classification"),
    ("opt", "causal"),
    ("qwen2", "causal"),
    ("phi3", "causal"),
    ("bert", "classification"),
    ("roberta", "classification"),
    ("t5", "classification"),
    ("t5_gated", "seq2seq"),
]


@pytest.mark.parametrize("settings", [{}, {"subspace": "top", "alpha": 16.0}, EVERYTHING])
@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_the_adapted_model_starts_as_the_original(tiny_model, family, head, base, settings):
    original = tiny_model(family, head)
    method = astra(base=base, **settings)
    adapted = adapt(deepcopy(original), method)
    expected, found = logits(original), logits(adapted.model)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for ref in layout_of(original).linears:
        weight = weight_of(original.get_submodule(ref.name)).detach().double()
        now, rank = adapted.factors(ref.name), adapted.plan.ranks[ref.name]
        product = method.scaling(rank) * now.up @ now.down
        assert now.down.shape == (rank, ref.in_features)
        assert adapted.layer(ref.name).scaling["default"] == pytest.approx(method.scaling(rank))
        stored = weight_of(adapted.layer(ref.name).get_base_layer()).detach().double()
        if base == "residual":
            assert torch.dist(stored + product, weight) <= 1e-7 * (weight.norm() + product.norm())
        else:
            assert torch.equal(stored, weight)


@pytest.mark.parametrize("subspace", ["top", "middle", "tail"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_energy_along_b_over_real_tokens_is_the_sum_of_its_eigenvalues(tiny_model, family, subspace):
    original = tiny_model(family, "classification")
    rows, model = {}, deepcopy(original)
    for ref in layout_of(model).linears:
        model.get_submodule(ref.name).register_forward_hook(
            lambda _module, _inputs, output, name=ref.name: rows.update({name: output.flatten(0, -2).double()})
        )
    logits(model)
    adapted = adapt(deepcopy(original), astra(subspace=subspace))
    for ref in layout_of(original).linears:
        spectrum = torch.linalg.svdvals(rows[ref.name]).square()
        captured = (rows[ref.name] @ adapted.factors(ref.name).up).square().sum()
        # Layer norm confines its outputs to a hyperplane: whether float32 round-off lets the null direction pass
        # for part of the numerical range is chance, so both counts are right.
        most = min(ref.out_features, ref.in_features + ref.has_bias, len(rows[ref.name]))
        least = int((spectrum > 1e-9 * spectrum[0]).sum())
        starts = {
            (0 if subspace == "top" else (rank - 4) // (1 + (subspace == "middle"))) for rank in range(least, most + 1)
        }
        errors = [abs(captured - spectrum[start : start + 4].sum()) for start in starts]
        assert min(errors) <= 1e-5 * captured + 1e-6 * spectrum[0], ref.name


@pytest.mark.parametrize("base", ["residual", "untouched"])
def test_ranks_alphas_and_biases_follow_the_plan(tiny_model, base):
    original = tiny_model("gpt2")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    adapted = adapt(deepcopy(original), astra(base=base, rank_pattern={"qkv": 6, r"transformer\.h\.2\.mlp\.c_fc": 2}))
    ranks = {ref.name: 6 if ref.role == "qkv" else 4 for ref in layout_of(original).linears}
    ranks["transformer.h.2.mlp.c_fc"] = 2
    assert {name: adapted.factors(name).down.shape[0] for name in ranks} == ranks
    expected = logits(original)
    assert (logits(adapted.model) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "head"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "classification")])
def test_without_its_adapter_an_untouched_base_is_the_original_exactly(tiny_model, family, head):
    original = tiny_model(family, head)
    adapted = adapt(deepcopy(original), astra(base="untouched"))
    train(adapted.model, 2)
    assert not torch.allclose(logits(adapted.model), logits(original))
    with adapted.model.disable_adapter():
        assert torch.equal(logits(adapted.model), logits(original))


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
@pytest.mark.parametrize("train_", ["both", "down", "up"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_residual_and_untouched_learn_alike(tiny_model, family, train_, settings):
    residual, untouched = (
        adapt(tiny_model(family), astra(base=base, train=train_, **settings)) for base in ("residual", "untouched")
    )
    for _ in range(2):
        gradients = []
        for adapted in (residual, untouched):
            adapted.model.zero_grad()
            loss_of(adapted.model).backward()
            gradients.append({n: p.grad for n, p in adapted.model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        largest = max(float(g.abs().max()) for g in gradients[0].values())
        for name, gradient in gradients[0].items():
            assert (gradient - gradients[1][name]).abs().max() <= 1e-4 * largest, name
        # The second round compares them away from the start.
        for adapted in (residual, untouched):
            with torch.no_grad():
                generator = torch.Generator().manual_seed(0)
                for parameter in adapted.model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert torch.allclose(logits(residual.model), logits(untouched.model), atol=1e-4)


def loss_of(model):
    ids = tokens()
    if "Classification" in type(model.get_base_model()).__name__:
        return model(input_ids=ids, labels=torch.arange(len(ids)) % 2).loss
    return model(input_ids=ids, labels=ids).loss


def train(model, steps, learning_rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize(("family", "head"), [("llama", "causal"), ("bert", "classification")])
def test_updates_stay_in_the_subspace_of_the_frozen_factor(tiny_model, family, head, side, base):
    original = tiny_model(family, head)
    new = ("classifier",) if head == "classification" else ()
    method = astra(train=side, base=base)
    adapted = adapt(deepcopy(original), method, new_modules=new)
    starts = {name: adapted.factors(name) for name in adapted.plan.ranks}
    train(adapted.model, 10)
    for name, start in starts.items():
        now = adapted.factors(name)
        change = now.up @ now.down - start.up @ start.down
        assert change.norm() > 1e-3
        if side == "down":
            basis = torch.linalg.qr(start.up).Q
            outside = change - basis @ (basis.T @ change)
        else:
            basis = torch.linalg.qr(start.down.T).Q
            outside = change - change @ basis @ basis.T
        assert outside.norm() <= 1e-6 * change.norm()
    if new:
        head_now = adapted.model.get_base_model().classifier.modules_to_save["default"].weight
        assert not torch.equal(head_now, original.classifier.weight)
    # The base itself never learns.
    for name in starts:
        base_weight = weight_of(adapted.layer(name).get_base_layer())
        assert not base_weight.requires_grad


@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize(("side", "learns"), [("both", {"lora_A", "lora_B"}), ("down", {"lora_A"}), ("up", {"lora_B"})])
def test_only_the_right_tensors_learn(tiny_model, side, learns, base):
    adapted = adapt(tiny_model("bert", "classification"), astra(train=side, base=base), new_modules=("classifier",))
    assert_learning(adapted, learns)
    with adapted.model.disable_adapter():
        pass
    adapted.model.set_adapter("default")
    assert_learning(adapted, learns)


def assert_learning(adapted, learns):
    learning = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    factors = {part for name in learning for part in name.split(".") if part.startswith("lora_")}
    others = [name for name in learning if ".lora_" not in name]
    assert factors == learns
    assert len(learning) - len(others) == len(learns) * len(adapted.plan.ranks)
    assert others
    assert all(".classifier.modules_to_save." in name for name in others)
    expected = 0
    for name, rank in adapted.plan.ranks.items():
        base = adapted.layer(name).get_base_layer()
        expected += rank * (base.in_features * ("lora_A" in learns) + base.out_features * ("lora_B" in learns))
    head = adapted.model.get_base_model().classifier.original_module
    assert adapted.trained_parameters == expected + sum(p.numel() for p in head.parameters())


def test_plain_lora_starts_at_zero(tiny_model):
    original = tiny_model("llama")
    adapted = adapt(deepcopy(original), Lora(name="lora", rank=4))
    assert torch.equal(logits(adapted.model), logits(original))
    assert adapted.initial == {}
    train(adapted.model, 2)
    assert not torch.allclose(logits(adapted.model), logits(original))


@pytest.mark.parametrize("base", ["residual", "untouched"])
def test_the_state_of_the_adapter_restores_the_model(tiny_model, base, tmp_path):
    method = astra(base=base)
    trained = adapt(tiny_model("bert", "classification"), method, new_modules=("classifier",))
    train(trained.model, 3)
    fresh = adapt(tiny_model("bert", "classification"), method, new_modules=("classifier",))
    set_peft_model_state_dict(fresh.model, get_peft_model_state_dict(trained.model))
    assert torch.equal(logits(fresh.model), logits(trained.model))


@pytest.mark.parametrize("base", ["residual", "untouched"])
@pytest.mark.parametrize("side", ["both", "down", "up"])
def test_the_trainer_resumes_where_it_stopped(tiny_model, tmp_path, base, side):
    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": i % 2} for i, row in enumerate(tokens())])

    def fine_tuned(folder, steps, resume=None):
        model = adapt(
            tiny_model("bert", "classification"), astra(base=base, train=side), new_modules=("classifier",)
        ).model
        arguments = TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train(resume_from_checkpoint=resume)
        return model

    whole = fine_tuned(tmp_path, 4)
    checkpoint = tmp_path / "checkpoint-2"
    assert [path.name for path in checkpoint.glob("**/adapter_model.safetensors")] == ["adapter_model.safetensors"]
    resumed = fine_tuned(tmp_path / "again", 4, str(checkpoint))
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_untouched_base_merges_and_unmerges(tiny_model, family, safe):
    original = tiny_model(family)
    adapted = adapt(deepcopy(original), astra(base="untouched", alpha=6.0))
    train(adapted.model, 3)
    expected = logits(adapted.model)
    adapted.model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(adapted.model), expected, atol=1e-5)
    adapted.model.unmerge_adapter()
    assert torch.allclose(logits(adapted.model), expected, atol=1e-5)
    merged = adapted.model.merge_and_unload(safe_merge=safe)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_mixed_precision_and_dropout_pass_through(tiny_model):
    adapted = adapt(tiny_model("llama"), astra(base="untouched", dropout=0.5)).model.train()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = logits(adapted), logits(adapted)
    assert first.isfinite().all()
    assert not torch.equal(first, second)
