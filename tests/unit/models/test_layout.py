from collections import defaultdict

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.architectures import registered
from lowrank_kit.models.blocks import joining_of
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import ModelLayout, layout_of

BY_NAME = registered()
ENCODERS = ("bert", "roberta")
DECODERS = sorted(set(registered()) - {*ENCODERS, "t5"})


HEADS = {family: ("causal", *["classification"] * (family in CLASSIFIERS), "base") for family in DECODERS}
CASES = [
    *[(family, head) for family in DECODERS for head in HEADS[family]],
    *[(family, head) for family in ENCODERS for head in ("classification", "base")],
    *[(family, head) for family in ("t5", "t5_gated") for head in ("seq2seq", "classification", "base")],
]


def forward(model: PreTrainedModel) -> None:
    tokens = torch.randint(3, 60, (2, 24))
    tokens[:, -1] = model.config.get_text_config().eos_token_id
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.model_type == "t5" and "Classification" not in type(model).__name__:
        inputs["decoder_input_ids"] = tokens[:, :5]
    with torch.no_grad():
        model(**inputs)


def opened(tiny_model, family: str, head: str) -> PreTrainedModel:
    """With every expert's matrices as linears."""
    model = tiny_model(family, head)
    list_experts(model)
    return model


def inputs_seen(model: PreTrainedModel, layout: ModelLayout) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    for ref in layout.linears:
        module = model.get_submodule(ref.name)
        module.register_forward_pre_hook(lambda _, args, name=ref.name: seen.__setitem__(name, args[0]))
    forward(model)
    return seen


@pytest.mark.parametrize(("family", "head"), CASES)
def test_refs_agree_with_the_real_modules(tiny_model, family, head):
    model = opened(tiny_model, family, head)
    for ref in layout_of(model).linears:
        module = model.get_submodule(ref.name)
        kept_as = (ref.in_features, ref.out_features) if isinstance(module, Conv1D) else None
        assert module.weight.shape == (kept_as or (ref.out_features, ref.in_features))
        assert ref.has_bias == (module.bias is not None)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_layout_has_every_linear_inside_the_blocks(tiny_model, family, head):
    model = opened(tiny_model, family, head)
    layout = layout_of(model)
    inside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(name.startswith(f"{block}.") for block in layout.blocks)
    }
    routers = tuple(f".{path}" for stack in BY_NAME[family.removesuffix("_gated")].stacks for path in stack.routers)
    inside = {name for name in inside if not (routers and name.endswith(routers))}
    assert {ref.name for ref in layout.linears} == inside
    assert all(ref.name.startswith(f"{layout.blocks[ref.block]}.") for ref in layout.linears)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_blocks_and_linears_are_in_execution_order(tiny_model, family, head):
    model = opened(tiny_model, family, head)
    layout = layout_of(model)
    executed: list[str] = []
    for block in layout.blocks:
        hook = lambda *_, name=block: executed.append(name)  # noqa: E731
        model.get_submodule(block).register_forward_pre_hook(hook)
    groups = [ref.input_group for ref in layout.linears]
    seen = list(inputs_seen(model, layout))
    group_of = {ref.name: ref.input_group for ref in layout.linears}
    assert tuple(executed) == layout.blocks
    assert list(dict.fromkeys(group_of[name] for name in seen)) == list(dict.fromkeys(groups))
    assert len(layout.blocks) == sum(len(stack) for stack in layout.stacks)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_linears_of_one_group_read_one_tensor_and_others_do_not(tiny_model, family, head):
    model = opened(tiny_model, family, head)
    layout = layout_of(model)
    seen = inputs_seen(model, layout)
    tensors = defaultdict(set)
    for ref in layout.linears:
        tensors[(ref.block, ref.input_group)].add(seen[ref.name].data_ptr())
    assert all(len(pointers) == 1 for pointers in tensors.values())
    for block in range(len(layout.blocks)):
        pointers = [next(iter(found)) for (where, _), found in tensors.items() if where == block]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_embedding_and_final_norm_and_head_resolve(tiny_model, family, head):
    model = opened(tiny_model, family, head)
    layout = layout_of(model)
    assert model.get_submodule(layout.embedding) is model.get_input_embeddings()
    if family not in ENCODERS:
        last = layout.blocks[-1]
        calls: list[str] = []
        for name in (last, layout.final_norm):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        forward(model)
        assert calls == [last, layout.final_norm]
    assert (layout.head is None) == (head == "base")
    if layout.head:
        assert sum(p.numel() for p in model.get_submodule(layout.head).parameters()) > 0


def test_meta_model_has_the_same_layout_as_the_real_one(tiny_model):
    real = layout_of(tiny_model("llama"))
    with torch.device("meta"):
        assert layout_of(tiny_model("llama")) == real


def test_opt_with_post_normalised_blocks_has_no_final_norm(tiny_model):
    assert layout_of(tiny_model("opt", do_layer_norm_before=False)).final_norm is None


def test_unknown_type_names_the_supported_ones_and_the_entry_to_add(tiny_model):
    model = tiny_model("llama")
    model.config.model_type = "lama"
    with pytest.raises(LowRankKitError, match=r"did you mean 'llama'\?\nTo add it.* 'lama'\)"):
        layout_of(model)


def test_missing_module_is_named(tiny_model):
    model = tiny_model("llama")
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(LowRankKitError, match=r"no module 'model\.layers\.0\.mlp\.up_proj'"):
        layout_of(model)


def test_linear_of_another_class_is_named(tiny_model):
    class Linear4bit(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Linear4bit(32, 48)
    with pytest.raises(LowRankKitError, match=r"layers\.1\.mlp\.up_proj.*Linear4bit"):
        layout_of(model)


def test_select_keeps_execution_order_and_rejects_unknown_roles(tiny_model):
    layout = layout_of(tiny_model("llama"))
    assert [ref.role for ref in layout.select(["v", "q"])] == ["q", "v"] * 3
    assert layout.select() == layout.linears
    with pytest.raises(ConfigError, match=r"'qkv'.*q, k, v, o, gate, up, down"):
        layout.select(["q", "qkv"])


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "gemma4_text"])
def test_what_a_block_writes_joins_the_stream_as_its_architecture_says(family, tiny_model):
    """In the first block; of experts, what their module gives."""
    model = tiny_model(family)
    layout = layout_of(model)
    joining = joining_of(layout)
    writers = {ref.name for ref in layout.linears if ref.block == 0 and ref.writes_residual and ref.expert is None}
    writers |= {ref.name.rsplit(".", 2)[0] for ref in layout.linears if ref.block == 0 and ref.expert is not None}
    written: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []
    for name in writers:
        model.get_submodule(name).register_forward_hook(lambda _m, _x, output: written.append(output))
    model.get_submodule(layout.blocks[0]).register_forward_hook(
        lambda _m, x, output: streams.extend([x[0], output[0] if isinstance(output, tuple) else output])
    )
    forward(model)
    before, after = streams
    total, added = sum(output.reshape(before.shape) for output in written), after - before
    factor = float((added * total).sum() / (total * total).sum())
    is_multiple = bool((added - factor * total).norm() < 1e-3 * added.norm())
    assert joining == ("normed" if not is_multiple else "added" if factor == pytest.approx(1, abs=1e-3) else "scaled")
