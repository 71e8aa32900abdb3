"""Checkpoints of a real model in the real server: vLLM, in an environment of its own (`make server`).

Its greedy tokens are transformers', and so are their log-probabilities. Only the server's Python is given
(``LOWRANK_KIT_SERVER_PYTHON``): lowrank_kit is not installed there, unless a test says so.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.slicegpt import slice_model
from lowrank_kit.export import main as export
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.narrow import keep_units
from lowrank_kit.models.units import units_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.storage import Storage
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.training.initialise import adapt

SERVER = os.environ.get("LOWRANK_KIT_SERVER_PYTHON", "")
GENERATES = Path(__file__).with_name("vllm_generates.py")
ROOT = Path(__file__).parents[2]
PROMPT = [504, 3575, 282, 4649, 314, 253, 11254, 282, 1343, 28, 732, 411]
COUNT, BLOCKS = 12, 6
# One process, and as little memory for keys and values as it takes.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.assets,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not SERVER, reason="LOWRANK_KIT_SERVER_PYTHON names no Python with vLLM: `make server`"),
]


def factored(model: PreTrainedModel, storage: Storage, *roles: str) -> PreTrainedModel:
    """All linears of these roles (none: of every role), truncated to 0.6 of their parameters, as plain SVD does it."""
    for ref in layout_of(model).of_roles(roles or None):
        weight = model.get_submodule(ref.name).weight.detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        rank = int(0.6 * ref.parameters / (ref.out_features + ref.in_features))
        storage.put(model, [ref.name], LowRankFactors(left[:, :rank] * values[:rank], right[:rank]))
    return model


def shared(model: PreTrainedModel) -> PreTrainedModel:
    """Every two neighbours' ``up`` by one basis."""
    for block in range(0, BLOCKS, 2):
        names = [f"model.layers.{block + more}.mlp.up_proj" for more in (0, 1)]
        stack = torch.cat([model.get_submodule(name).weight.detach() for name in names])
        left, values, right = torch.linalg.svd(stack, full_matrices=False)
        Factors().put(model, names, LowRankFactors(left[:, :300] * values[:300], right[:300]))
    return model


def narrowed(model: PreTrainedModel) -> PreTrainedModel:
    """Heads and channels gone, as llm_pruner takes them, in all blocks but the first and last."""
    for units in units_of(layout_of(model), range(1, BLOCKS - 1)):
        keep_units(model, units, (0, 2) if units.kind == "heads" else range(units.block, units.count, 2))
    return model


def shorter(model: PreTrainedModel, *kept: int) -> PreTrainedModel:
    drop_blocks(model, layout_of(model), kept)
    return model


def experts() -> PreTrainedModel:
    """A small mixture with random weights: all is factored in its first two blocks, and nothing in the last."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 49152}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes, **heads)).eval()
    list_experts(model)
    for ref in layout_of(model).linears:
        if ref.block < 2:
            up, down = torch.randn(ref.out_features, 24) / 8, torch.randn(24, ref.in_features) / 8
            Factors().put(model, [ref.name], LowRankFactors(up, down))
    return model


def samples(folder: Path) -> CalibrationSamples:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The history of the city begins with a market by the river, where two old roads cross. " * 60
    windows = torch.tensor(tokenizer(text)["input_ids"][:768]).view(3, 256)
    return CalibrationSamples(tuple({"input_ids": window} for window in windows), batch_size=1)


def sliced(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    slice_model(model, samples(folder), 512)
    return model


@pytest.fixture(scope="module")
def kinds(smollm2_path, tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """A checkpoint and an adapter for every kind; of SmolLM2's first blocks, which a server starts in seconds."""
    root = tmp_path_factory.mktemp("kinds")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)

    def short() -> PreTrainedModel:
        return shorter(AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32), *range(BLOCKS))

    models = {
        "dense": short(),
        "factored": factored(short(), Factors()),
        "mixed": factored(factored(short(), Factors(), "gate", "q", "v"), Pivot(), "o"),
        "pivot": factored(short(), Pivot()),
        "narrowed": narrowed(short()),
        "narrowed and factored": factored(narrowed(short()), Factors(), "down", "k"),
        "shorter": shorter(short(), 0, 1, 3, 5),
        "sliced": sliced(short(), smollm2_path),
        "sliced and factored": factored(sliced(short(), smollm2_path), Factors(), "up"),
    }
    for name, model in models.items():
        save_compressed(model, root / name, tokenizer)
    save_compressed(shared(short()), root / "run/checkpoint", tokenizer)
    words = ["--format", "serve", "--multiple", "64"]
    assert export([str(root / "run"), *words, "--output", str(root / "shared, exported")]) == 0
    # Of weights in bfloat16 too the server computes in float32, here.
    rounded = ["--dtype", "bfloat16", "--output", str(root / "mixed, exported")]
    assert export([str(root / "mixed"), *words, *rounded]) == 0
    save_compressed(experts(), root / "experts with factors", tokenizer)
    more = ("shared, exported", "mixed, exported", "experts with factors")
    found: dict[str, tuple[Path, Path | None]] = {name: (root / name, None) for name in (*models, *more)}
    ready = adapt(short(), Astra(name="astra", rank=16), samples(smollm2_path), task_type="CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in ready.model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter) / 50
    ready.export(root / "adapter", str(root / "dense"))
    return found | {"dense with an adapter of Astra": (root / "dense", root / "adapter")}


@torch.no_grad()
def expected(model: Path, adapter: Path | None) -> dict[str, list]:
    """Greedy tokens of transformers, and what it gives them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    ids, found = torch.tensor([PROMPT]), []
    for _ in range(COUNT):
        scores = loaded(input_ids=ids).logits[0, -1].log_softmax(-1)
        found.append(float(scores.max()))
        ids = torch.cat((ids, scores.argmax().view(1, 1)), 1)
    return {"tokens": ids[0, len(PROMPT) :].tolist(), "logprobs": found}


def environment(**more: str) -> dict[str, str]:
    """That of this process without its packages; tests of the server choose what is there."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS | more


def answers(*jobs: dict, **more: str) -> list[dict]:
    """What the server says to each job, in turn."""
    usual = {"adapter": None, "prompt": PROMPT, "tokens": COUNT, "remote_code": True}
    done = subprocess.run(
        [SERVER, GENERATES],
        input=json.dumps([usual | job for job in jobs]),
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_is_served_as_transformers_runs_it(kinds, tmp_path):
    jobs = [{"model": str(model), "adapter": adapter and str(adapter)} for model, adapter in kinds.values()]
    wrong = {}
    for name, found in zip(kinds, answers(*jobs, HF_HOME=str(tmp_path)), strict=True):
        wanted = expected(*kinds[name])
        if found.get("tokens") != wanted["tokens"] or found["logprobs"] != pytest.approx(wanted["logprobs"], abs=1e-3):
            wrong[name] = (found, wanted)
    assert not wrong, list(wrong)


def test_without_trust_it_is_refused_and_with_the_package_no_trust_is_needed(kinds, tmp_path):
    job = {"model": str(kinds["mixed"][0]), "remote_code": False}
    [refused] = answers(job, HF_HOME=str(tmp_path))
    assert "trust_remote_code" in refused["error"]
    site = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(ROOT)], check=True)
    [found] = answers(job, HF_HOME=str(tmp_path), PYTHONPATH=str(site))
    assert found["tokens"] == expected(*kinds["mixed"])["tokens"]
    assert not list(tmp_path.glob("modules/transformers_modules/*/modeling_*"))


def edited(source: Path, target: Path, edit: Callable[[dict], object]) -> str:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_what_cannot_be_served_says_why(kinds, tmp_path):
    mixed, run = kinds["mixed"][0], kinds["mixed"][0].parent / "run/checkpoint"
    wanted = {
        edited(mixed, tmp_path / "newer", lambda config: config["lowrank"].update(format=3)): "newer lowrank_kit",
        edited(mixed, tmp_path / "no_map", lambda config: config.pop("auto_map")): "does not recognize",
        str(run): "--format serve",
    }
    found = answers(*({"model": model} for model in wanted), HF_HOME=str(tmp_path / "home"))
    for said, words in zip(found, wanted.values(), strict=True):
        assert words in said.get("error", ""), (words, said)
    # SmolLM2 has nine heads.
    [said] = answers({"model": str(mixed), "tensor_parallel_size": 2}, HF_HOME=str(tmp_path / "home"))
    assert "must be divisible by tensor parallel size" in said.get("error", ""), said


@pytest.fixture
def endpoint(kinds, tmp_path) -> Iterator[str]:
    """The address of vLLM's OpenAI-compatible server on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(kinds["mixed"][0]), "--served-model-name", "mixed", "--trust-remote-code"]
    words += ["--enforce-eager", "--max-model-len", "128", "--dtype", "float32", "--max-num-seqs", "2"]
    command = [SERVER, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port), *words]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment(HF_HOME=str(tmp_path)), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(2)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def test_the_openai_compatible_endpoint_answers_the_same(kinds, endpoint):
    asked = {"model": "mixed", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "logprobs": 1}
    body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
    request = Request(f"{endpoint}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        [choice] = json.load(response)["choices"]
    wanted = expected(*kinds["mixed"])
    assert choice["token_ids"] == wanted["tokens"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-3)
