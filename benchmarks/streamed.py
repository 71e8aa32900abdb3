"""How much memory a streamed compression takes, and how long a block takes: a model of any width, of a few blocks.

    python benchmarks/streamed.py --blocks 4 8 --method svd_llm [--hidden 4096 --inner 11008 --heads 32]
        [--vocabulary 32000 --dtype bfloat16 --samples 4 --seq-len 512 --threads 2 --device cpu --folder DIR]

For every number of blocks a random Llama checkpoint of these widths is written to DIR, a shard a block, without ever
being in memory as a whole. Then the ordinary command, in a fresh process, compresses it with
``runtime.weights=streamed``, and plain transformers in another one loads what was left and runs it. Printed are the
compressing process's peak resident memory, seconds, CPU seconds (which other work on the machine does not change), and
what 32 and 80 blocks would take by these.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lowrank_kit.runs.provenance import in_words, parse_study

WORDS = [f"w{i}" for i in range(1000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--method", default="svd_llm")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, required=True)
    if "--child" in sys.argv:
        # The fresh process of a measurement that this script started.
        measure(json.loads(sys.argv[sys.argv.index("--child") + 1]))
        return
    options = parse_study(parser)
    print(in_words(options.provenance))
    found = [compress(options, blocks) for blocks in options.blocks]
    print(json.dumps(found, indent=1))
    if len(found) > 1:
        first, last = found[0], found[-1]
        a_block = (last["cpu_seconds"] - first["cpu_seconds"]) / (last["blocks"] - first["blocks"])
        rest = first["cpu_seconds"] - a_block * first["blocks"]
        print(f"a block: {a_block:.1f} CPU seconds; all else: {rest:.1f}")
        for blocks in (32, 80):
            print(f"{blocks} blocks: about {(rest + a_block * blocks) / 3600:.2f} CPU hours")
        print(f"peak memory, {last['blocks']} against {first['blocks']} blocks: {last['gib'] / first['gib']:.3f}")


def compress(options: argparse.Namespace, blocks: int) -> dict:
    """Write the checkpoint, compress it in a fresh process, look at what it left."""
    folder = options.folder / f"{blocks}-blocks"
    if not (folder / "config.json").is_file():
        write(folder, blocks, options)
    text = options.folder / "data/text/mine/validation.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    count = 2 * options.samples * options.seq_len
    text.write_text(" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=draw)))
    text.with_name("test.txt").write_text(text.read_text())
    run = options.folder / f"run-{options.method}-{blocks}"
    words = [
        *(f"method={options.method}", f"method.ratio={options.ratio}", f"device={options.device}"),
        "runtime.weights=streamed",
        *("task=perplexity", "task.texts.mine={}", "task.calibrate_on=mine", f"task.window={options.seq_len}"),
        *(f"~task.texts.{name}" for name in ("wikitext2", "ptb", "c4", "wikipedia", "openwebtext")),
        *("data=local", f"data.root={options.folder / 'data'}", f"model.path={folder}", f"dtype={options.dtype}"),
        *(f"calibration.samples={options.samples}", f"calibration.seq_len={options.seq_len}"),
        *("calibration.batch_size=1", f"run.dir={run}", "run.stages=[calibrate,plan,apply]", "run.resume=false"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "LOWRANK_KIT_CACHE": f"{run}-cache"}
    command = [sys.executable, __file__, "--folder", str(options.folder), "--child", json.dumps(words)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "method": options.method,
        "blocks": blocks,
        "gib": round(found["kib"] / 2**20, 3),
        "cuda_gib": round(found["cuda_bytes"] / 2**30, 3),
        "seconds": round(found["seconds"], 1),
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "loads": loads(run / "checkpoint"),
    }


def measure(words: list[str]) -> None:
    """Run a command here; print its seconds, CPU seconds, and the most memory that was resident."""
    from lowrank_kit.compose import Composer, force_dotted
    from lowrank_kit.pipeline import execute

    [config] = Composer().jobs(force_dotted(words), multirun=False)
    started, worked = time.perf_counter(), time.process_time()
    execute(config)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "kib": peak, "cuda_bytes": cuda}))


def write(folder: Path, blocks: int, options: argparse.Namespace) -> None:
    """A random checkpoint, a shard a block and one for all else."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=blocks,
        num_attention_heads=options.heads,
        tie_word_embeddings=False,
        dtype=options.dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    where, draw = {}, torch.Generator(options.device).manual_seed(0)
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensor(shapes[name], options.dtype, draw) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    config.save_pretrained(folder)


def tensor(shape: torch.Size, dtype: str, draw: torch.Generator) -> torch.Tensor:
    """Norms of ones, matrices whose outputs are about as large as their inputs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=getattr(torch, dtype))
    return (torch.randn(shape, generator=draw, device=draw.device) / shape[1] ** 0.5).to(getattr(torch, dtype)).cpu()


def loads(folder: Path) -> bool:
    """Whether a fresh process loads the checkpoint without this package, and it computes what is finite."""
    code = (
        "import sys, torch, transformers; "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='auto'); "
        "sys.exit(not (model(torch.arange(8)[None]).logits.isfinite().all() and 'lowrank_kit' not in sys.modules))"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


if __name__ == "__main__":
    main()
