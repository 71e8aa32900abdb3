"""Programs that a model wrote, scored by the tests of their rows: pass@k of HumanEval and MBPP."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import comb
from os import cpu_count
from typing import Any

from lowrank_kit.evaluation.sandbox import LIMITS, Limits, Outcome, Program, run_program


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Probability that one of k programs passes, estimated without bias from n of which so many passed.

    ``1 - C(n - passed, k) / C(n, k)`` (Chen et al., arXiv 2107.03374, eq. 1).
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(f"no pass@{k} of {passed} in {n} programs")
    return 1 - comb(n - passed, k) / comb(n, k)


def program_of(row: Mapping[str, Any], completion: str) -> Program:
    """What is run to test a completion: a row of HumanEval (which starts the program itself) or of MBPP."""
    if "entry_point" in row:
        answer, entry = f"{row['prompt']}{completion}", row["entry_point"]
        # The tests use some of what the prompt defines. It ends in a docstring, or needs a body to be a program.
        given = row["prompt"] if _compiles(row["prompt"]) else f"{row['prompt'].rstrip()}\n    pass\n"
        return Program(answer, f"{row['test']}\ncheck({entry})", given, entry)
    # The set-up may use the answer's names.
    return Program(completion, "\n".join([row.get("test_setup_code") or "", *row["test_list"]]))


def _compiles(text: str) -> bool:
    with suppress(SyntaxError, ValueError):
        compile(text, "prompt", "exec")
        return True
    return False


def run_all(programs: Sequence[Program], limits: Limits = LIMITS) -> list[Outcome]:
    """What came of programs, as many at once as there are processors. Errors: see `run_program`."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))
