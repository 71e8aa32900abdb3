"""Quantise a model and write the optimal low-rank corrections of it, for PEFT on the quantised base (EoRA, QERA).

OVERRIDES are those of a run (model=, task=, data=, calibration.*): the text that it would calibrate on is what the
original model reads. OUTPUT/base is the quantised checkpoint, OUTPUT/rank-K a plain LoRA on it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError
from lowrank_kit.files import share

if TYPE_CHECKING:
    from lowrank_kit.models.quantised import Bits


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit eora", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new or empty folder")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the base's weights (default: 4)")
    parser.add_argument("--group", type=int, default=32, help="inputs with one scale, of 4 bits (default: 32)")
    parser.add_argument(
        "--rank", type=int, action="append", metavar="K", help="of a correction; may be repeated (default: 32)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDES", help="for example task=perplexity model=smollm2_135m"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_intermixed_args(arguments)
    try:
        if options.output.exists() and any(options.output.iterdir()):
            raise ConfigError(f"'{options.output}' exists and is not empty: choose another folder")
        ranks = options.rank or [32]
        if min(ranks) < 1:
            raise ConfigError(f"--rank {min(ranks)}: a correction has a rank of 1 at least")
        write(options.output, options.bits, options.group, ranks, options.overrides)
    except Exception as error:
        return explained(error)
    print(f"base: {options.output / 'base'}")
    for rank in ranks:
        print(f"rank {rank}: {options.output / f'rank-{rank}'}")
    return 0


def write(output: Path, bits: "Bits", group: int, ranks: Sequence[int], overrides: Sequence[str]) -> None:
    """Write the base and its corrections. Raises `ConfigError` for what cannot be before a weight is read."""
    import torch

    from lowrank_kit.assets import cache_dir
    from lowrank_kit.calibration.texts import CalibrationSamples
    from lowrank_kit.compose import Composer, force_dotted
    from lowrank_kit.data.sources import open_source
    from lowrank_kit.data.task_texts import TaskTexts
    from lowrank_kit.models.layout import layout_of
    from lowrank_kit.models.load import local_path, skeleton
    from lowrank_kit.models.quantised import check_torchao, load_torchao
    from lowrank_kit.progress import StageProgress
    from lowrank_kit.stages.models import Models
    from lowrank_kit.stages.requirements import device_for
    from lowrank_kit.training.quantisation_error import error_factors, with_correction

    [config] = Composer().jobs(force_dotted(["method=none", *overrides]), multirun=False)
    task = config.task.parts[0]
    if task.kind != "causal":
        raise ConfigError(f"task={task.name} is for classifiers: choose task=perplexity")
    models = Models(config.model, getattr(torch, config.dtype), device_for(config.device), config.seed)
    check_torchao(layout_of(skeleton(models.configuration, "causal")), bits, group)
    texts = TaskTexts(
        task, open_source(config.data.source, config.data.root, config.data.revision), config.eval, config.calibration
    )
    windows, opening = texts.calibration(models.reader), texts.opening("calibration", models.reader)
    samples = CalibrationSamples(
        tuple({"input_ids": window} for window in windows), len(opening), config.calibration.batch_size
    )
    base = output / "base"
    quantised = load_torchao(local_path(models.source), models.source.revision, bits, group, models.dtype)
    quantised.save_pretrained(base)
    share(*base.glob("*.safetensors"))
    models.tokenizer.save_pretrained(base)
    original = models.causal().model
    with StageProgress() as progress:
        factors = error_factors(original, quantised, samples, max(ranks), cache=cache_dir(), progress=progress)
    for rank in ranks:
        adapted = with_correction(quantised, factors, rank)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(output / f"rank-{rank}")
        share(*(output / f"rank-{rank}").glob("*.safetensors"))
        quantised = adapted.unload()


if __name__ == "__main__":
    sys.exit(main())
