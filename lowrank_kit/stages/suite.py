"""The benchmarks of a run: every finished one is on disk before the next begins, with what was answered to each row."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit import distributed, launcher
from lowrank_kit.data.special_tokens import Opening
from lowrank_kit.evaluation.harness import Answers, Exam, answer_all, averages
from lowrank_kit.evaluation.language_model import BoundedLM, Tokens
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.progress import StageProgress
from lowrank_kit.runs.directory import write_atomically

Key = Mapping[str, Any]

DENSE: Checkpoint = "dense"


@dataclass(frozen=True)
class Suite:
    """Benchmarks, and all that is the same for every model that they judge.

    Below ``folder`` lie ``benchmarks/CHECKPOINT/NAME.json``, figures with the key of all that they depend on, and
    ``samples/CHECKPOINT/NAME.jsonl``, one line a row. What lies there with the same key is not measured again.
    ``opening`` begins every prompt; ``tokens`` are those of the questions, which all models share.
    """

    exams: Sequence[Exam]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    versions: Mapping[str, str]
    folder: Path
    opening: Opening
    tokens: Tokens = field(default_factory=dict)

    def judge(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        key: Key,
        progress: StageProgress,
        shared: Path | None = None,
    ) -> list[EvalRecord]:
        """The records of one model, and their average.

        ``key`` says what the answers depend on besides the benchmark. ``shared`` is a folder where other runs, too,
        leave and find answers of the dense model.
        """
        keys = {
            exam.name: {**key, **exam.key, "max_length": self.max_length, "bos": self.opening.ids}
            for exam in self.exams
        }
        shelves: dict[str, list[tuple[Path, Checkpoint]]] = {
            name: [(self.folder, checkpoint), *([(shared / _digest(whole), DENSE)] if shared else [])]
            for name, whole in keys.items()
        }

        def known() -> dict[str, Answers]:
            found: dict[str, Answers] = {}
            for name, whole in keys.items():
                kept = [answers for shelf in shelves[name] if (answers := _read(*shelf, name, whole))]
                if kept:
                    found[name] = kept[0]
                    _write(self.folder, checkpoint, kept[0], whole)
            return found

        found = distributed.on_main(known)
        if todo := [exam for exam in self.exams if exam.name not in found]:
            lm = BoundedLM(model, self.tokenizer, self.batch_size, self.max_length, self.tokens, self.opening)
            for answers in answer_all(lm, todo, progress, f"{checkpoint} model"):
                found[answers.name] = answers
                for shelf in shelves[answers.name] if launcher.is_main() else ():
                    _write(*shelf, answers, keys[answers.name])
        records = [
            r for exam in self.exams for r in exam.records(found[exam.name], self.versions, checkpoint, self.opening)
        ]
        return [*records, *averages(records)]


def _digest(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _files(folder: Path, checkpoint: Checkpoint, name: str) -> tuple[Path, Path]:
    return folder / "benchmarks" / checkpoint / f"{name}.json", folder / "samples" / checkpoint / f"{name}.jsonl"


def _write(folder: Path, checkpoint: Checkpoint, answers: Answers, key: Key) -> None:
    figures, samples = _files(folder, checkpoint, answers.name)
    write_atomically(samples, "".join(json.dumps(sample) + "\n" for sample in answers.samples))
    # Last: where there are figures, the samples are whole.
    write_atomically(
        figures, json.dumps({"figures": answers.figures, "seconds": answers.seconds, "key": key}, indent=2) + "\n"
    )


def _read(folder: Path, checkpoint: Checkpoint, name: str, key: Key) -> Answers | None:
    figures, samples = _files(folder, checkpoint, name)
    try:
        kept = json.loads(figures.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        # A file system that lost its end is no worse than one that never had it.
        return None
    if _digest(kept["key"]) != _digest(key):
        return None
    lines = samples.read_text("utf-8").splitlines()
    found = {metric: (value, error) for metric, (value, error) in kept["figures"].items()}
    return Answers(name, found, [json.loads(line) for line in lines], kept.get("seconds"))
