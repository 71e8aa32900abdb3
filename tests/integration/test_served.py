"""What a server does with a checkpoint: linears of its own, weights by name, one decision a class.

As the Transformers backends of vLLM and of SGLang do it, in processes that have no lowrank_kit, on the code that the
checkpoint brings.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from changed import narrowed, sliced

from lowrank_kit.models.architectures import registered
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import layout_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors

IDS = torch.arange(3, 15).reshape(2, 6)
# Transformers stores a Gemma 3 that sees images under the names of an older version.
FAMILIES = sorted(set(registered()) - {"bert", "roberta", "t5", "gemma3"})

SERVER = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "lowrank_kit":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

expected = torch.load("expected.pt")

class ServerLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.out_features, linear.in_features))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(linear.out_features))
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

def parameters_on_meta(build):
    # As vLLM does it: buffers are real, and what the checkpoint has of them is copied into them.
    stock = nn.Module.register_parameter
    def register(module, name, parameter):
        stock(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    nn.Module.register_parameter = register
    try:
        return build()
    finally:
        nn.Module.register_parameter = stock

def load(model, folder):
    prefix = model.base_model_prefix
    weights = load_file(f"{folder}/model.safetensors")
    # Rotary frequencies and the like are computed, what is stored comes by its name alone.
    known = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    for name, tensor in weights.items():
        inside = name.removeprefix(f"{prefix}.")
        if inside not in known:
            assert name.startswith("lm_head."), name
            continue
        path, _, leaf = inside.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            getattr(owner, leaf).copy_(tensor)
        known.pop(inside)
    assert not known, list(known)
"""

VLLM = """
def swap(module):
    for name, child in module.named_children():
        # Not Llama 4's router, which is another thing; vLLM has a model of its own for that family.
        if type(child) is nn.Linear:
            setattr(module, name, ServerLinear(child))
        else:
            swap(child)

def swapped(model):
    # vLLM looks at one module of a class with such children, and touches the linears' biases in all of them.
    linears = {}
    for module in model.modules():
        children = dict(module.named_children())
        names = [name for name, child in children.items() if isinstance(child, nn.Linear)]
        for name in linears.setdefault((type(module), *children), names):
            children[name].bias
    swap(model)
    return model

for folder, logits in expected["logits"].items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        empty = AutoModel.from_config(config, trust_remote_code=True)
    model = swapped(parameters_on_meta(lambda: AutoModel.from_config(config, trust_remote_code=True))).eval()
    assert type(model).__module__.startswith("transformers_modules"), folder
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in empty.named_parameters()}, folder
    assert type(model).is_backend_compatible(), folder
    load(model, folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        hidden = model(input_ids=expected["ids"], use_cache=False)[0]
        base = reloaded.base_model if reloaded.base_model is not reloaded else reloaded.model
        torch.testing.assert_close(hidden, base(input_ids=expected["ids"])[0], rtol=0, atol=1e-6, msg=folder)
        torch.testing.assert_close(reloaded(expected["ids"]).logits, logits, rtol=0, atol=1e-6, msg=folder)

refusals = {"newer": "written by a newer lowrank_kit", "unmapped": "does not recognize this architecture"}
for folder, words in refusals.items():
    try:
        AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
        raise SystemExit(f"{folder} was taken")
    except ValueError as error:
        assert words in str(error), error
try:
    AutoConfig.from_pretrained("factored-llama", trust_remote_code=False)
    raise SystemExit("code was run without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
"""

SGLANG = """
import re
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def attention(module, query, key, value, attention_mask, scaling=None, heads=None, batch=None, **_):
    # Its cache has as many heads in every layer as the configuration says; tokens of all requests are one row.
    assert attention_mask is None and batch == "requests"
    query, key, value = (x.transpose(1, 2).reshape(x.shape[-2], -1) for x in (query, key, value))
    many, few, width = heads[module.layer_idx]
    query, key, value = (x.view(1, len(x), n, width).transpose(1, 2)
                         for x, n in ((query, many), (key, few), (value, few)))
    found, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    return found.reshape(found.shape[1], -1), None

ALL_ATTENTION_FUNCTIONS["sglang"] = attention

class ServerNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.weight = nn.Parameter(torch.empty(norm.weight.shape))
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

def replace(module, plan, prefix, styles):
    for name, child in module.named_children():
        place = f"{prefix}.{name}"
        if isinstance(child, nn.Linear):
            styles[place] = next((style for pattern, style in plan.items() if re.match(pattern, place)), "replicate")
            setattr(module, name, ServerLinear(child))
        elif type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, ServerNorm(child))
        else:
            replace(child, plan, place, styles)

for folder in expected["sglang"]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    kind = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
    assert kind.is_backend_compatible() and kind._supports_attention_backend, folder
    config._attn_implementation = "sglang"
    model = parameters_on_meta(lambda: AutoModel.from_config(config, trust_remote_code=True)).eval()
    assert type(model) is kind or type(model).__name__ == kind.__name__, folder
    styles = {}
    replace(model, {f"model.{pattern}": style for pattern, style in (model.tp_plan or {}).items()}, "model", styles)
    if folder == "factored-llama":
        assert {place.rpartition("layers.0.")[2]: style for place, style in styles.items() if ".0." in place} == {
            f"{linear}.{half}": style
            for linears, halves in (
                (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
                 {"down": "replicate", "up": "colwise"}),
                (("self_attn.o_proj", "mlp.down_proj"), {"down": "rowwise", "up": "replicate"}))
            for linear in linears for half, style in halves.items()}
    size = model.get_input_embeddings().weight.shape
    model.set_input_embeddings(nn.Embedding(*size))
    load(model, folder)
    heads = [(config.num_attention_heads, config.num_key_value_heads, model.layers[0].self_attn.head_dim)]
    row, count = expected["ids"][:1], expected["ids"].shape[1]
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=row, inputs_embeds=None, use_cache=False, position_ids=torch.arange(count)[None],
                      return_dict=False, batch="requests", heads=heads * config.num_hidden_layers)[0][0]
        torch.testing.assert_close(found, reloaded.model(input_ids=row)[0][0], rtol=0, atol=1e-6, msg=folder)

config = AutoConfig.from_pretrained("shared", trust_remote_code=True)
config._attn_implementation = "sglang"
try:
    AutoModel.from_config(config, trust_remote_code=True)
    raise SystemExit("factors that are stored once would be left without values")
except ValueError as error:
    assert "sglang would leave" in str(error) and "--format serve" in str(error), error
"""
# SGLang's norms, attention and cache, of one number of heads, are its own: these need no more of them than scores.
BY_SGLANG = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "mixtral")


def factored(model, *storages, of=lambda ref: True):
    """Random factors for the linears ``of`` the model, in these storages by turns."""
    list_experts(model)
    draw = torch.Generator().manual_seed(0)
    for number, ref in enumerate(filter(of, layout_of(model).linears)):
        up, down = (torch.randn(*s, generator=draw) / 5 for s in ((ref.out_features, 6), (6, ref.in_features)))
        storages[number % len(storages)].put(model, [ref.name], LowRankFactors(up, down))
    return model


def shared(model):
    stack = LowRankFactors(torch.randn(96, 6), torch.randn(6, 32))
    Factors().put(model, [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)], stack)
    return model


def without_block(model):
    drop_blocks(model, layout_of(model), (0, 2))
    return model


def edited(source, target, edit):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("served")
    mixed = {"of": lambda ref: ref.block == 0 or ref.role in ("up", "o", "expert_down")}
    models = {f"mixed-{family}": factored(tiny_model(family), Factors(), Pivot(), **mixed) for family in FAMILIES}
    models |= {
        "factored-llama": factored(tiny_model("llama"), Factors()),
        "factored-gpt_oss": factored(tiny_model("gpt_oss"), Factors()),
        "pivot-qwen2": factored(tiny_model("qwen2"), Pivot()),
        "narrow-qwen3": narrowed(tiny_model("qwen3")),
        "sliced-llama": sliced(tiny_model("llama")),
        "sliced-factored": factored(sliced(tiny_model("llama")), Factors(), **mixed),
        "short-factored": without_block(factored(tiny_model("mistral"), Factors(), **mixed)),
    }
    for name, model in models.items():
        save_compressed(model, root / name)
    save_compressed(shared(tiny_model("llama")), root / "shared")
    edited(root / "factored-llama", root / "newer", lambda config: config["lowrank"].update(format=3))
    edited(root / "factored-llama", root / "unmapped", lambda config: config.pop("auto_map"))
    with torch.no_grad():
        logits = {name: model(IDS).logits for name, model in models.items()}
    sglang = [name for name in models if name.rpartition("-")[2] in (*BY_SGLANG, "factored") and "narrow" not in name]
    torch.save({"ids": IDS, "logits": logits, "sglang": sglang}, root / "expected.pt")
    return root


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_a_server_loads_every_kind_of_checkpoint_on_its_own_linears(server, saved, environment, tmp_path):
    variables = environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = SERVER + {"vllm": VLLM, "sglang": SGLANG}[server]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=saved, env=variables, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
