import logging

# Before transformers: where torchao is installed it is imported with it, and names on stderr, behind pytest's summary,
# every kernel that it has for another machine.
for library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

from pathlib import Path

from jaxtyping import install_import_hook

# Where shapes are annotated every call is checked. Elsewhere mypy does: the check of a call costs more than the call.
PACKAGE = Path(__file__).parents[1] / "lowrank_kit"
SHAPED = [file for file in PACKAGE.rglob("*.py") if "from jaxtyping import" in file.read_text()]
install_import_hook(
    [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in SHAPED], "beartype.beartype"
)

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
)

from lowrank_kit import assets
from lowrank_kit.runs.offline import offline_runs

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# Fewer key-value heads, and a head_dim that is not hidden_size / heads: shapes cannot agree by luck.
DECODER = {**TOKENS, **SIZES, "num_key_value_heads": 2, "head_dim": 12}
ENCODER = {**TOKENS, **SIZES, "max_position_embeddings": 40}
NARROW_HEADS = {key: value for key, value in DECODER.items() if key != "head_dim"}
T5_SIZES = {**TOKENS, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
# Two layers with keys and values of their own, and two that take theirs.
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 12,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

TINY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "mistral": lambda: MistralConfig(**DECODER),
    "qwen2": lambda: Qwen2Config(**NARROW_HEADS),
    "qwen3": lambda: Qwen3Config(**DECODER),
    "gemma": lambda: GemmaConfig(**DECODER),
    "gemma2": lambda: Gemma2Config(**DECODER),
    "gemma3": lambda: Gemma3Config(text_config=dict(DECODER), vision_config=dict(VISION)),
    "gemma3_text": lambda: Gemma3TextConfig(**DECODER),
    "gemma4_text": lambda: Gemma4TextConfig(**DECODER | GEMMA4),
    "cohere": lambda: CohereConfig(**DECODER),
    "cohere2": lambda: Cohere2Config(**DECODER),
    "glm": lambda: GlmConfig(**DECODER),
    "glm4": lambda: Glm4Config(**DECODER),
    "granite": lambda: GraniteConfig(**NARROW_HEADS, residual_multiplier=0.5, attention_multiplier=0.4),
    "olmo2": lambda: Olmo2Config(**DECODER),
    "olmo3": lambda: Olmo3Config(**DECODER),
    "smollm3": lambda: SmolLM3Config(**NARROW_HEADS),
    "mixtral": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**NARROW_HEADS, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **NARROW_HEADS,
        **MIXTURE,
        shared_expert_intermediate_size=24,
        # Every second block has experts.
        decoder_sparse_step=2,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**DECODER, **MIXTURE, mlp_only_layers=[1]),
    "llama4_text": lambda: Llama4TextConfig(
        **DECODER, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, intermediate_size_mlp=40
    ),
    "phi3": lambda: Phi3Config(**NARROW_HEADS),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=40),
    "opt": lambda: OPTConfig(
        **TOKENS,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=40,
    ),
    "bert": lambda: BertConfig(**ENCODER),
    "roberta": lambda: RobertaConfig(**ENCODER),
    "t5": lambda: T5Config(**T5_SIZES, decoder_start_token_id=0),
    "t5_gated": lambda: T5Config(**T5_SIZES, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
}
HEADS = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "base": AutoModel,
}
TinyModel = Callable[..., PreTrainedModel]


def build_tiny_model(family: str, head: str = "causal", seed: int = 0, **config: object) -> PreTrainedModel:
    """A random model of 2 to 3 blocks, hidden size 32, vocabulary 64, in evaluation mode."""
    torch.manual_seed(seed)
    settings = TINY_CONFIGS[family]()
    settings.update(config)
    return HEADS[head].from_config(settings).eval()


def pytest_collection_finish() -> None:
    """Take what the imports left out of the garbage collections to come: a tenth of the tests' time went into them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    return build_tiny_model


def _asset(name: str) -> Path:
    if not assets.is_present(name):
        pytest.skip(f"asset '{name}' is absent: run `python -m lowrank_kit.assets {name}`")
    return assets.require(name)


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """The folder of a packaged asset; the test is skipped where it was not fetched."""
    return _asset


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _asset("smollm2_135m")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return _asset("minilm_l6")


@pytest.fixture
def wandb_records() -> Callable[[Path], list[dict[str, Any]]]:
    """What offline W&B runs below a folder left on disk; W&B's service writes it out a moment after `finish`."""

    def read(folder: Path) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 20
        while True:
            runs = offline_runs(folder)
            if time.monotonic() > deadline or all(run["exit_code"] is not None for run in runs):
                return runs
            time.sleep(0.1)

    return read
