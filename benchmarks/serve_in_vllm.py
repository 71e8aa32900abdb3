"""Run by a server's own Python, which has vLLM, for `serve.py`: processor seconds of prefill and decode, in turn.

On stdin ``{"models": {NAME: [FOLDER, OPTIONS of `vllm.LLM`]}, "shapes": [[BATCH, PROMPT], ...], "turns": N,
"new_tokens": N}``; the last line is JSON, by name and shape the two of every turn.
"""

import json
import os
import sys
import time

# Before vLLM is imported: all work in this process, whose time is taken, and on the thread that asks for it.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams

OPTIONS = {
    "trust_remote_code": True,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    "skip_tokenizer_init": True,
}


def seconds(llm: LLM, batch: int, prompt: int, new_tokens: int) -> float:
    words = [{"prompt_token_ids": [(7 * row + place) % 1000 for place in range(prompt)]} for row in range(batch)]
    settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    started = time.process_time()
    llm.generate(words, settings, use_tqdm=False)
    return time.process_time() - started


def main() -> None:
    job = json.load(sys.stdin)
    llms = {name: LLM(folder, **OPTIONS | options) for name, (folder, options) in job["models"].items()}
    found = {name: [] for name in llms}
    for batch, prompt in job["shapes"]:
        turns = {name: [] for name in llms}
        for turn in range(1 + job["turns"]):
            for name, llm in llms.items():
                prefill = seconds(llm, batch, prompt, 1)
                both = seconds(llm, batch, prompt, 1 + job["new_tokens"])
                if turn:
                    turns[name].append((prefill, both - prefill))
        for name in llms:
            found[name].append(turns[name])
    print(json.dumps(found))


main()
