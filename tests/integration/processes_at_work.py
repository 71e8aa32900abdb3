"""What each of several processes does for `test_distributed`: `torchrun processes_at_work.py FOLDER NAME,...`."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from lm_eval.api.instance import Instance
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit import distributed, launcher
from lowrank_kit.adapters.astra import Astra
from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.calibration.stream import stream_statistics
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import RuntimeConfig, TrainConfig
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapt

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
METHOD = Astra(name="astra", rank=3, base="untouched")
SCHEDULE = {"max_steps": 6, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 2e-2, "warmup_ratio": 0.0}


def samples(count=9):
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 64, (4 + 3 * i,), generator=draw) for i in range(count)]
    return CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=2)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)


def calibration(folder):
    """Every sum of the calibration, float64 throughout, and the factors that Astra makes of them."""
    model, found = load(folder, torch.float64), {}
    layout = layout_of(model)
    batches = samples().batches(2, 0)
    request = StatisticsRequest(moments="smaller", magnitudes=True)
    for _, layers in stream_statistics(model, layout, batches, request, layout.linears):
        for layer in layers:
            sums = {"gram": layer.moments.gram, "total": layer.moments.total, "magnitudes": layer.magnitudes}
            found |= {f"{layer.ref.name} {name}": tensor for name, tensor in sums.items()}
            found[f"{layer.ref.name} count"] = torch.tensor(layer.moments.count)
    parts = GradientRequest(moments=True, fisher=True, mean=True)
    for _, gradients in stream_gradients(model, layout, batches, layout.linears, parts):
        for name, seen in gradients.items():
            found |= {f"{name} g {part}": getattr(seen, part) for part in ("gram", "fisher", "mean")}
            found[f"{name} g energy"] = torch.tensor(seen.energy)
    reduction = Reduction(
        METHOD.needs(),
        lambda layer: METHOD.reduce(model.get_submodule(layer.ref.name).weight, None, layer),
        type(METHOD),
    )
    kept = calibrate(model, samples(), layout.linears, reduction, cache=folder / "cache")
    return found | {f"{name} kept {part}": tensor for name, parts in kept.items() for part, tensor in parts.items()}


def training(folder, kind="single", **settings):
    """Train an adapter for a few steps and export it."""
    options = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
    runtime = RuntimeConfig(kind=kind, options=options if kind == "fsdp" else {})
    model = load(folder)
    adapted = adapt(model, METHOD, samples(), task_type="CAUSAL_LM")
    rows = [{"input_ids": [3 + (i * k) % 60 for k in range(1, 9)], "attention_mask": [1] * 8} for i in range(24)]
    data = datasets.Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    fit(
        adapted.model,
        Examples(data, _stack),
        TrainConfig(**SCHEDULE | settings),
        Session(folder / f"{kind}-checkpoints", "cpu", 1, runtime=runtime),
        optimizer=adapted.optimizer,
    )
    distributed.on_main(lambda: adapted.export(folder / kind, "base"))
    return adapted


def answers(folder):
    """What a model says to requests of every kind: of many lengths, some with one forward pass for several."""
    words = [f"w{i}" for i in range(60)]
    asked = [(" ".join(words[i : 2 * i + 1]), f" {words[3 * i % 60]}") for i in range(1, 12)]
    asked += [(context, " w7") for context, _ in asked[:4]] + [(asked[0][0], " w7 w8")]
    texts = [(context, {"until": ["w5"], "max_gen_toks": 3, "do_sample": False}) for context, _ in asked[:5]]
    lm = BoundedLM(load(folder, torch.float64), AutoTokenizer.from_pretrained(folder / "model"), batch_size=2)
    asked_as = {
        kind: [Instance(kind, {}, arguments, n, metadata=("it", n, 1)) for n, arguments in enumerate(requests)]
        for kind, requests in {"loglikelihood": asked, "generate_until": texts}.items()
    }
    windows = torch.stack([ids[:10] for ids in (row["input_ids"] for row in samples().sequences) if len(ids) > 9])
    found = {kind: getattr(lm, kind)(requests) for kind, requests in asked_as.items()}
    alone = lm.loglikelihood(asked_as["loglikelihood"][:1])
    return found | {"fewer than processes": alone, "windows": perplexity(lm.model, windows, 2).per_window}


def _stack(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def calibrated(folder):
    torch.save(calibration(folder), folder / f"calibration-{torch.distributed.get_rank()}.pt")


def answered(folder):
    tell(folder / "answered", **answers(folder))


def trained(folder):
    training(folder, "ddp")


def sharded(folder):
    # accelerate shards on accelerators alone, and falls back to plain data parallelism on CPUs; FSDP itself runs there.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
    joined = PartialState.__init__

    def init(self, *args, **options):
        joined(self, *args, **options)
        self.distributed_type = DistributedType.MULTI_NPU

    PartialState.__init__ = init
    model = training(folder, "fsdp", save_every=2).model
    first = model.get_base_model().model.layers[0].self_attn.q_proj
    base = [p for p in model.parameters() if isinstance(p, DTensor) and not p.requires_grad]
    tell(
        folder / "sharded",
        up=type(first.lora_B["default"].weight).__name__,
        base=type(first.base_layer.weight).__name__,
        held=sum(p.to_local().numel() for p in base),
        whole=sum(p.numel() for p in base),
    )


def one_fails(folder):
    if not launcher.is_main():
        raise SystemExit(3)
    distributed.add_up(torch.ones(1))


def told(folder):
    def fail():
        raise LowRankKitError("no room")

    try:
        distributed.on_main(fail)
    except LowRankKitError as error:
        tell(folder / "told", heard=str(error), batches=len(distributed.share(samples().batches(2, 0))))


def tell(file, **facts):
    file.with_name(f"{file.name}-{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.together("cpu"):
        for name in sys.argv[2].split(","):
            globals()[name](Path(sys.argv[1]))
