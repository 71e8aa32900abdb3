"""llama.cpp runs the dense export of a factored checkpoint, by its own converter, and answers what transformers does.

``LOWRANK_KIT_GGUF_CONVERTER`` is llama.cpp's ``convert_hf_to_gguf.py`` (in the source distribution of
`llama-cpp-python` too); what runs the file is `xllamacpp`, which is llama.cpp with a server inside.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.export import main as export
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.models.layout import layout_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.two_factors import Factors

CONVERTER = os.environ.get("LOWRANK_KIT_GGUF_CONVERTER", "")
PROMPT = [504, 3575, 282, 4649, 314, 253, 11254, 282, 1343, 28, 732, 411]
COUNT = 12

llama = pytest.importorskip("xllamacpp")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.assets,
    pytest.mark.skipif(not CONVERTER, reason="LOWRANK_KIT_GGUF_CONVERTER names no convert_hf_to_gguf.py"),
]


def convert(folder, target) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, CONVERTER, "--outtype", "f32", "--outfile", str(target), str(folder)]
    return subprocess.run(words, capture_output=True, text=True)


def test_llama_cpp_answers_what_transformers_does(smollm2_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    drop_blocks(model, layout_of(model), range(4))
    for ref in layout_of(model).linears:
        left, values, right = torch.linalg.svd(model.get_submodule(ref.name).weight.detach(), full_matrices=False)
        rank = int(0.6 * ref.parameters / (ref.out_features + ref.in_features))
        Factors().put(model, [ref.name], LowRankFactors(left[:, :rank] * values[:rank], right[:rank]))
    save_compressed(model, tmp_path / "factored", AutoTokenizer.from_pretrained(smollm2_path))
    assert export([str(tmp_path / "factored"), "--format", "dense", "--output", str(tmp_path / "dense")]) == 0

    done = convert(tmp_path / "dense", tmp_path / "dense.gguf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LowRankLlamaForCausalLM is not supported" in convert(tmp_path / "factored", tmp_path / "no.gguf").stderr

    parameters = llama.CommonParams()
    parameters.model.path = str(tmp_path / "dense.gguf")
    parameters.n_ctx, parameters.warmup = 128, False
    asked = {"prompt": PROMPT, "n_predict": COUNT, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    answer = llama.Server(parameters).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    steps = answer["choices"][0]["logprobs"]["content"]

    ids, wanted = torch.tensor([PROMPT]), []
    with torch.no_grad():
        for _ in range(COUNT):
            scores = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            wanted.append(float(scores.max()))
            ids = torch.cat((ids, scores.argmax().view(1, 1)), 1)
    assert [step["id"] for step in steps] == ids[0, len(PROMPT) :].tolist()
    # Its keys and values are in float16.
    assert [step["logprob"] for step in steps] == pytest.approx(wanted, abs=1e-2)
