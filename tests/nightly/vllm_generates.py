"""Run by a server's own Python, which has vLLM: greedy tokens and their log-probabilities, for every job on stdin.

A job is ``{"model": FOLDER, "adapter": FOLDER or null, "prompt": TOKENS, "tokens": N, "remote_code": BOOL, ...}``;
what else it has are options of `vllm.LLM`. The last line is JSON with an answer a job: ``{"tokens": [...], "logprobs":
[...]}``, or ``{"error": MESSAGE}``.
"""

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def answer(job: dict) -> dict:
    adapter, prompt, count = job.pop("adapter"), job.pop("prompt"), job.pop("tokens")
    options = {"enforce_eager": True, "max_model_len": 128, "dtype": "float32", "max_num_seqs": 2}
    if adapter:
        options |= {"enable_lora": True, "max_lora_rank": 64}
    llm = LLM(job.pop("model"), trust_remote_code=job.pop("remote_code"), **options | job)
    greedy = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True)
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    [output] = llm.generate([{"prompt_token_ids": prompt}], greedy, lora_request=request)[0].outputs
    return {
        "tokens": list(output.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)],
    }


def attempt(job: dict) -> dict:
    try:
        return answer(job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    answers = []
    for job in json.load(sys.stdin):
        answers.append(attempt(job))
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps(answers))


# Where there are several devices, their processes read this file too.
if __name__ == "__main__":
    main()
