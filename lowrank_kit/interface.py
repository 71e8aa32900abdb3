"""Compress and adapt from Python: a model and texts in, a model out, without a run directory.

Methods and their settings are those of the command line: ``compress(..., method="svd_llm", storage="pivot")`` is
``method=svd_llm storage=pivot``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jaxtyping import Int64

from lowrank_kit.deferred import Tensor
from lowrank_kit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowrank_kit.calibration.texts import CalibrationSamples
    from lowrank_kit.config import RunConfig
    from lowrank_kit.training.adapters import AdaptedModel

TEXT = "given"


def compress(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    texts: Sequence[str],
    method: str,
    calibration: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> "PreTrainedModel":
    """Compress a causal language model, and return the compressed one: an ordinary model of transformers.

    ``save_pretrained`` writes a whole checkpoint (docs/compressed_checkpoints.md). The weights that stay are shared
    with ``model``, which is changed: compress a copy to keep it.

    Args:
        model: a causal language model of a supported family, in a float format, whole on one device.
        tokenizer: its tokenizer.
        texts: what to calibrate on, an article each: joined, tokenised as one, cut into windows from the start. A rule
            that measures the model (``swift``, ``asvd``, ``loss``) does so on the windows behind those.
        method: a compressor's name, as in ``method=NAME``.
        calibration: ``samples``, ``seq_len``, ``batch_size``, ``bos``, as in ``calibration.KEY=``.
        cache: folder of the content-keyed cache, which serves other ratios of this model; None: nothing is kept.
        settings: of the method, as in ``method.KEY=``: ``ratio=0.4``, ``storage="pivot"``,
            ``correction={"kind": "refine", "passes": 3}``.

    Raises `ConfigError` for settings that cannot be, before the model is read, and `LowRankKitError` where the work
    fails.
    """
    from lowrank_kit.compressors.compressor import Compression, Compressor, Context, own_folder
    from lowrank_kit.models.checkpoint import as_loaded
    from lowrank_kit.models.experts import list_experts
    from lowrank_kit.models.layout import layout_of

    config = _configured(method, settings, calibration)
    compressor = config.method
    if not isinstance(compressor, Compressor):
        raise ConfigError(f"method={method} does not compress: use lowrank_kit.adapt, or a method such as svd_llm")
    compressor.check(layout_of(model))
    samples, probe_windows = _read(config, texts, model, tokenizer, compressor.probe)
    if compressor.factorises:
        list_experts(model)
    context = Context(model, layout_of(model), samples, cache or own_folder(), probe_windows)
    work = Compression(compressor, context)
    return as_loaded(work.apply(work.plan()))


def adapt(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    texts: Sequence[str] = (),
    method: str,
    calibration: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> "AdaptedModel":
    """Give a causal language model an adapter, ready to train.

    Of what is returned, ``model`` is an ordinary PEFT model for any trainer, ``optimizer(...)`` has the method's
    learning rates, and ``export(folder, base)`` writes a plain LoRA for the original model, also where the adapter
    took its start out of the base weights. ``model`` is changed in place.

    Args:
        model: a causal language model of a supported family.
        tokenizer: its tokenizer.
        texts: what a method that looks at activations or gradients is calibrated on, as for `compress`.
        method: an adapter's name, as in ``method=NAME``.
        calibration: as for `compress`.
        cache: as for `compress`.
        settings: of the method, as in ``method.KEY=``: ``rank=32``, ``roles=["q", "v"]``.

    Raises `ConfigError` for settings that cannot be, before the model is read, and `LowRankKitError` for a method that
    reads texts where there are none.
    """
    from lowrank_kit.adapters.adapter import Adapter
    from lowrank_kit.calibration.texts import CalibrationSamples
    from lowrank_kit.training import initialise

    config = _configured(method, settings, calibration)
    adapter = config.method
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"method={method} is no adapter: use lowrank_kit.compress, or a method such as astra or lora")
    samples = CalibrationSamples(())
    if texts and adapter.calibrates:
        samples, _ = _read(config, texts, model, tokenizer)
    return initialise.adapt(model, adapter, samples, task_type="CAUSAL_LM", cache=cache)


def _configured(method: str, settings: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> "RunConfig":
    """The configuration that the command line would have. Raises `ConfigError` with everything that is wrong."""
    from omegaconf import OmegaConf

    from lowrank_kit.compose import PARTS_OF_METHODS, Composer
    from lowrank_kit.config import load

    chosen, values = [f"method={method}"], dict(settings)
    for part in PARTS_OF_METHODS:
        if isinstance(value := values.get(part), str):
            chosen.append(f"{part}={values.pop(part)}")
        elif isinstance(value, Mapping) and "kind" in value:
            chosen.append(f"{part}={value['kind']}")
    composed = Composer().compose([*chosen, "task=perplexity"])
    OmegaConf.set_struct(composed, False)
    # Nothing is evaluated; held-out windows, the shortest, are of the split calibrated on, the only one there is.
    given = {"method": values, "calibration": dict(calibration or {}), "eval": {"held_out": 1}}
    composed.merge_with(json.loads(json.dumps(given)))
    composed.task = {"kind": "causal", "name": TEXT, "texts": {TEXT: {}}, "calibrate_on": TEXT, "window": 2}
    return load(composed)


def _read(
    config: "RunConfig",
    texts: Sequence[str],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    probe: tuple[int, int] | None = None,
) -> "tuple[CalibrationSamples, Int64[Tensor, 'windows tokens'] | None]":
    """The calibration windows, and the held-out ones (how many, tokens each) that a rule measures on."""
    from lowrank_kit.calibration.texts import CalibrationSamples
    from lowrank_kit.config import CausalTask
    from lowrank_kit.data.reader import Reader
    from lowrank_kit.data.sources import open_source
    from lowrank_kit.data.task_texts import TaskTexts

    assert isinstance(config.task, CausalTask)
    reader = Reader(tokenizer, model.config)
    with TemporaryDirectory(prefix="lowrank_kit-") as folder:
        file = Path(folder, TEXT, "validation.jsonl")
        file.parent.mkdir()
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        given = TaskTexts(config.task, open_source("local", folder), config.eval, config.calibration)
        windows, opening = given.calibration(reader), given.opening("calibration", reader)
        sequences = tuple({"input_ids": window} for window in windows)
        samples = CalibrationSamples(sequences, len(opening), config.calibration.batch_size)
        return samples, None if probe is None else given.held_out(probe[0], reader, probe[1])
