"""Running text, cut into windows of tokens: to calibrate on, to learn from, to evaluate on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from lowrank_kit.config import CalibrationConfig, CausalTask, EvalConfig, TextSet
from lowrank_kit.data.benchmarks import check_allowed, load_benchmarks
from lowrank_kit.data.encode import check_texts
from lowrank_kit.data.reader import Reader
from lowrank_kit.data.sources import TEXT, DatasetRef, Rows, Source, has
from lowrank_kit.data.special_tokens import Opening, plain_ids
from lowrank_kit.data.task_instructions import TaskInstructions
from lowrank_kit.errors import ConfigError

log = logging.getLogger(__name__)

# What the papers on compression use; longer windows give lower figures.
USUAL_WINDOW = 2048

Purpose = Literal["eval", "calibration"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

Windows = Int64[Tensor, "windows window"]


@dataclass(frozen=True)
class EvaluationText:
    """Windows ``[n, window]`` of one text to evaluate on; ``name`` is the text's, ``opening`` what begins each."""

    name: str
    windows: Windows
    source: str
    opening: Opening


def text_ref(name: str, text: TextSet) -> DatasetRef:
    """The set whose rows a text is made of."""
    return DatasetRef(f"{TEXT}{name}", text.hub_path, text.hub_name, text.hub_files, text.hub_revision, text.max_rows)


class TaskTexts:
    """The texts and benchmarks of a task that the data source has, loaded once each, and what is learnt beside them.

    A text takes part if the source has the split it is evaluated on; those left out are named in a warning. Raises
    `ConfigError` where none is left, where the text to calibrate on is not there, for rows without text, and for
    benchmarks that run programs without `eval.allow_code_execution`.
    ``instructions`` are what a method learns of the task; where there are some, they are calibrated on, too.
    """

    def __init__(
        self,
        task: CausalTask,
        source: Source,
        settings: EvalConfig,
        calibration: CalibrationConfig,
        instructions: TaskInstructions | None = None,
    ) -> None:
        self._task, self._settings, self._calibration, self._kind = task, settings, calibration, source.kind
        self.instructions = instructions
        """What is learnt of the task."""
        if instructions and settings.held_out:
            self.benchmarks = instructions.held_out_questions()
        else:
            self.benchmarks = load_benchmarks(task.benchmarks, source, settings.limit)
            if task.benchmarks and settings.held_out:
                raise ConfigError(
                    "eval.held_out: benchmarks are evaluated on splits of their own; choose hyper-parameters with "
                    "task=perplexity, or drop eval.held_out"
                )
        """Rows of the benchmarks that the data source has, by their names."""
        for name, questions in self.benchmarks.items():
            check_allowed(name, questions.benchmark, settings.allow_code_execution)
        is_evaluated_on_texts = bool(task.texts) and task.perplexity
        names = self._present(source) if is_evaluated_on_texts else ()
        splits = {(name, self._evaluated_on(name)) for name in names}
        self.calibrated_on = self._choose(names if is_evaluated_on_texts else task.texts, source)
        """Name of the text to calibrate on; None where the source has no calibration split of any."""
        if self.calibrated_on is not None:
            splits.add((self.calibrated_on, task.texts[self.calibrated_on].calibration_split))
        self.names = names
        """Names of the texts to evaluate on."""
        self._rows: dict[tuple[str, str], Rows] = {}
        self._tokens: dict[tuple[str, str], Int64[Tensor, " tokens"]] = {}
        for name, split in sorted(splits):
            text = task.texts[name]
            rows = source.load(text_ref(name, text), split)
            _check(rows, text, f"'{split}' of {name}")
            self._rows[name, split] = rows

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every split by ``text:split``, for the manifest.

        Tokens are added once a split has been tokenised.
        """
        texts = {
            f"{name}:{split}": {
                **rows.facts(),
                **({"tokens": len(self._tokens[name, split])} if (name, split) in self._tokens else {}),
            }
            for (name, split), rows in self._rows.items()
        }
        for questions in self.benchmarks.values():
            texts |= questions.facts()
        return texts | (self.instructions.facts() if self.instructions else {})

    def opening(self, of: Purpose, reader: Reader) -> Opening:
        """What begins the windows, prompts and instructions that are evaluated on or learnt, or calibrated on."""
        choice = self._settings.bos if of == "eval" else self._calibration.bos
        return reader.opening(choice, f"{of}.bos")

    def openings(self, reader: Reader) -> dict[str, Any]:
        """What a manifest says of both."""
        return {of: self.opening(of, reader).facts() for of in PURPOSES}

    @property
    def adapters_read_text(self) -> bool:
        """Whether a method that adapts is calibrated on the text, too."""
        return self._calibration.on == "text"

    def calibration(self, reader: Reader) -> Int64[Tensor, "samples seq_len"]:
        """The first ``calibration.samples`` windows of ``calibration.seq_len`` tokens of the calibration split.

        ``calibration.bos`` says whether BOS is the first of them. Raises `ConfigError` where the text is too short.
        """
        settings, name = self._calibration, self._calibration_text()
        reader.check_length("calibration.seq_len", settings.seq_len)
        split = self._task.texts[name].calibration_split
        windows = self._windows(self._encode(name, split, reader), "calibration", settings.seq_len, reader)
        if len(windows) < settings.samples:
            raise ConfigError(
                f"calibration.samples={settings.samples}: '{split}' of {name} has {len(windows)} windows of "
                f"calibration.seq_len={settings.seq_len} tokens; lower one of the two"
            )
        return windows[: settings.samples]

    def held_out(self, count: int, reader: Reader, window: int | None = None) -> Windows:
        """``count`` windows of the text calibrated on, behind those of `calibration`, for a method to measure on.

        ``window``: tokens of each, by default the task's. Raises `ConfigError` where the text is too short.
        """
        name, window = self._calibration_text(), window or self.window(reader)
        # The last windows are those that `eval.held_out` judges by: a method may not choose by them.
        tokens, judged = self._behind_calibration(name, reader), self._judged * (name in self.names)
        last = judged * self._read(self.window(reader), "eval", reader) if judged else 0
        windows = self._windows(tokens[: max(0, len(tokens) - last)], "calibration", window, reader)
        if len(windows) < count:
            raise self._too_short(name, count, len(windows), window)
        return windows[:count]

    def _last(self, name: str, reader: Reader) -> Windows:
        """The last windows of the split calibrated on, the same for every method and calibration."""
        window, count = self.window(reader), self._judged
        tokens = self._behind_calibration(name, reader)[-count * self._read(window, "eval", reader) :]
        windows = self._windows(tokens, "eval", window, reader)
        if len(windows) < count:
            raise self._too_short(name, count, len(windows), window)
        return windows

    @property
    def _judged(self) -> int:
        """Windows of a calibration split that are evaluated on."""
        held_out = self._settings.held_out or 0
        return min(held_out, self._task.max_windows or held_out)

    def _behind_calibration(self, name: str, reader: Reader) -> Int64[Tensor, " tokens"]:
        settings, split = self._calibration, self._task.texts[name].calibration_split
        # What learns instructions is calibrated on those.
        calibrated = 0 if self.instructions else settings.samples * self._read(settings.seq_len, "calibration", reader)
        return self._encode(name, split, reader)[calibrated:]

    def _read(self, window: int, of: Purpose, reader: Reader) -> int:
        """How many tokens of a text a window takes."""
        return window - len(self.opening(of, reader))

    def _too_short(self, name: str, count: int, found: int, window: int) -> ConfigError:
        settings = self._calibration
        return ConfigError(
            f"{count} held-out windows were asked for: behind the {settings.samples} x {settings.seq_len} tokens "
            f"of calibration, '{self._task.texts[name].calibration_split}' of {name} has {found} of {window} tokens; "
            "lower eval.held_out, method.allocation.probe_windows, calibration.samples or the windows' lengths"
        )

    def evaluation(self, reader: Reader) -> list[EvaluationText]:
        """Whole windows of every text, at most ``eval.limit``; with ``eval.held_out``, see `EvalConfig`.

        Raises `ConfigError` for a text shorter than one window.
        """
        found = []
        for name in self.names:
            split, held_out = self._evaluated_on(name), self._judged
            if held_out:
                windows = self._last(name, reader)
            else:
                tokens, window = self._encode(name, split, reader), self.window(reader)
                windows = self._windows(tokens, "eval", window, reader)
                windows = windows[: self._task.max_windows or self._settings.limit]
                if not len(windows):
                    raise ConfigError(
                        f"'{split}' of {name} has {len(tokens)} tokens, less than one window: "
                        f"lower task.window={window}"
                    )
            rows = self._rows[name, split]
            note = f", {rows.note}" if rows.note else ""
            remark = "held out of calibration; " if held_out else ""
            opening = self.opening("eval", reader)
            size = f"{len(windows)} windows of {windows.shape[1]} tokens, {opening}"
            found.append(EvaluationText(name, windows, f"{remark}{rows.source}, {split}{note}, {size}", opening))
        return found

    def window(self, reader: Reader) -> int:
        """Tokens per window; raises `ConfigError` for more than the model has positions."""
        window = self._task.window or min(USUAL_WINDOW, reader.longest)
        reader.check_length("task.window", window)
        return window

    def _windows(
        self,
        tokens: Int64[Tensor, " tokens"],
        of: Purpose,
        window: int,
        reader: Reader,
    ) -> Windows:
        opening = self.opening(of, reader)
        if window <= len(opening):
            raise ConfigError(f"{of}.bos={opening.choice}: windows of {window} tokens have room for BOS alone")
        return opening.windows(tokens, window)

    def _calibration_text(self) -> str:
        if self.calibrated_on is None:
            wanted = ", ".join(f"'{text.calibration_split}' of {name}" for name, text in self._task.texts.items())
            raise ConfigError(
                f"there is no text to calibrate on: data={self._kind} lacks {wanted or 'texts'}; "
                "name one that it has, for example 'task.texts.wikipedia={}'"
            )
        return self.calibrated_on

    def _evaluated_on(self, name: str) -> str:
        text = self._task.texts[name]
        return text.calibration_split if self._settings.held_out else text.eval_split

    def _present(self, source: Source) -> tuple[str, ...]:
        texts = self._task.texts
        there = [name for name, text in texts.items() if has(source, text_ref(name, text), [self._evaluated_on(name)])]
        absent = [name for name in texts if name not in there]
        if not there and not self.benchmarks and len(texts) == 1:
            # The source's own message says where it looked.
            source.load(text_ref(absent[0], texts[absent[0]]), self._evaluated_on(absent[0]))
        if not there and not self.benchmarks:
            raise ConfigError(
                f"data={self._kind} has none of the texts {', '.join(absent)}; add your own: "
                f"data=local data.root=DIR 'task.texts.NAME={{}}' with DIR/NAME/{{validation,test}}.jsonl or .txt"
            )
        if absent:
            log.warning(
                "data=%s has %s and not %s; name a text alone to insist on it",
                self._kind, ", ".join(there) or "no text", ", ".join(absent),
            )  # fmt: skip
        return tuple(there)

    def _choose(self, names: Iterable[str], source: Source) -> str | None:
        texts, wanted = self._task.texts, self._task.calibrate_on
        if wanted is not None:
            return wanted
        return next((n for n in names if has(source, text_ref(n, texts[n]), [texts[n].calibration_split])), None)

    def _encode(self, name: str, split: str, reader: Reader) -> Int64[Tensor, " tokens"]:
        """Tokenise a split as one text, once; BOS, if it is wanted, begins the windows that are cut from it."""
        if (name, split) not in self._tokens:
            text, rows = self._task.texts[name], self._rows[name, split].dataset
            lines = rows[_column(rows.column_names, text)]
            [ids] = plain_ids([text.separator.join(lines)], reader.tokenizer)
            reader.check_embedded([ids], f"'{split}' of {name}")
            self._tokens[name, split] = torch.tensor(ids, dtype=torch.int64)
        return self._tokens[name, split]


def _column(columns: list[str], text: TextSet) -> str:
    return text.text_column if text.text_column in columns else "text"


def _check(rows: Rows, text: TextSet, where: str) -> None:
    columns = rows.dataset.column_names
    if not len(rows.dataset):
        raise ConfigError(f"{where} has no rows")
    if (column := _column(columns, text)) not in columns:
        raise ConfigError(f"the rows of {where} have no column '{text.text_column}'; they have {', '.join(columns)}")
    check_texts(rows, column, f"column '{column}' of {where}")
