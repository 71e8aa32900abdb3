"""The benchmarks of a run: every finished one is on disk before the next begins, with what was answered to each row."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit import distributed, launcher
from lowrank_kit.cache.entry import make_room, open_entry, touch
from lowrank_kit.cache.figures import checksum
from lowrank_kit.cache.key import StatisticsKey
from lowrank_kit.data.special_tokens import Opening
from lowrank_kit.evaluation.harness import Answers, PreparedBenchmark, answer_all, averages
from lowrank_kit.evaluation.language_model import BoundedLM, Tokens
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.directory import write_atomically

log = logging.getLogger(__name__)

DENSE: Checkpoint = "dense"


@dataclass(frozen=True)
class Suite:
    """Benchmarks, and all that is the same for every model that they are put to.

    Below ``folder`` lie ``benchmarks/CHECKPOINT/NAME.json``, figures with the key of all that they depend on, and
    ``samples/CHECKPOINT/NAME.jsonl``, one line a row. What lies there with the same key is not measured again.
    ``opening`` begins every prompt; ``tokens`` are those of the questions, which all models share.
    """

    benchmarks: Sequence[PreparedBenchmark]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    versions: Mapping[str, str]
    folder: Path
    opening: Opening
    tokens: Tokens = field(default_factory=dict)

    def evaluate(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        key: StatisticsKey,
        progress: StageProgress,
        shared: Path | None = None,
    ) -> list[EvalRecord]:
        """The records of one model, and their average.

        ``key`` says what the answers depend on besides the benchmark. ``shared`` is a folder where other runs, too,
        leave and find answers of the dense model.
        """
        keys = {b.name: _key_of(b, key) for b in self.benchmarks}
        places: dict[str, list[tuple[Path, Checkpoint]]] = {
            name: [(self.folder, checkpoint), *([(shared / whole.digest, DENSE)] if shared else [])]
            for name, whole in keys.items()
        }

        def known() -> dict[str, Answers]:
            found: dict[str, Answers] = {}
            for name, whole in keys.items():
                kept = [answers for place in places[name] if (answers := _read(*place, name, whole))]
                if kept:
                    found[name] = kept[0]
                    _write(self.folder, checkpoint, kept[0], whole)
            return found

        found = distributed.on_main(known)
        if todo := [b for b in self.benchmarks if b.name not in found]:
            lm = BoundedLM(model, self.tokenizer, self.batch_size, self.max_length, self.tokens, self.opening)
            for answers in answer_all(lm, todo, progress, f"{checkpoint} model"):
                found[answers.name] = answers
                if launcher.is_main():
                    whole = keys[answers.name]
                    if shared:
                        open_entry(shared, whole.digest, whole.description)
                    for place in places[answers.name]:
                        _write(*place, answers, whole)
            if shared and launcher.is_main():
                make_room(shared)
        records = [
            r for b in self.benchmarks for r in b.records(found[b.name], self.versions, checkpoint, self.opening)
        ]
        return [*records, *averages(records)]


def _key_of(benchmark: PreparedBenchmark, key: StatisticsKey) -> StatisticsKey:
    return replace(key, text=" ".join(benchmark.key["rows"]), request={**key.request, **benchmark.key})


def _files(folder: Path, checkpoint: Checkpoint, name: str) -> tuple[Path, Path]:
    return folder / "benchmarks" / checkpoint / f"{name}.json", folder / "samples" / checkpoint / f"{name}.jsonl"


def _write(folder: Path, checkpoint: Checkpoint, answers: Answers, key: StatisticsKey) -> None:
    figures, samples = _files(folder, checkpoint, answers.name)
    write_atomically(samples, "".join(json.dumps(sample) + "\n" for sample in answers.samples))
    # Last: where there are figures, the samples are whole.
    kept = {"key": key.digest, "figures": answers.figures, "seconds": answers.seconds, "samples": answers.samples}
    facts = {name: kept[name] for name in ("key", "figures", "seconds")} | {"checksum": checksum(kept)}
    write_atomically(figures, json.dumps(facts, indent=2) + "\n")


def _read(folder: Path, checkpoint: Checkpoint, name: str, key: StatisticsKey) -> Answers | None:
    """The answers that lie there under this key; None where there are none, or damaged ones."""
    figures, samples = _files(folder, checkpoint, name)
    try:
        kept = json.loads(figures.read_text("utf-8"))
        kept["samples"] = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
        expected = kept.pop("checksum")
        if kept["key"] != key.digest:
            return None
        if checksum(kept) == expected:
            touch(folder)
            found = {metric: (value, error) for metric, (value, error) in kept["figures"].items()}
            return Answers(name, found, kept["samples"], kept["seconds"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    log.warning("the answers in %s are damaged: %s is asked again", figures, name)
    return None
