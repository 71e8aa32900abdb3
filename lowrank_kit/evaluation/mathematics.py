r"""Right or wrong answers to MATH (Hendrycks et al., arXiv 2103.03874): equal as strings, or as mathematics.

Compared are final answers alone: what stands in Minerva's last sentence (Lewkowycz et al., arXiv 2206.14858, appendix
D.1), or else in the last ``\boxed{}``. A text without one is wrong, and so is an answer that can be neither parsed nor
found letter by letter.
"""

import logging
import re

from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed, strip_string
from math_verify import LatexExtractionConfig, parse, verify

_MINERVA = re.compile(r"[Ff]inal [Aa]nswer: The final answer is(.*?)\. I hope it is correct", re.DOTALL)
# math-verify reads 52_8 and 52_9 as 52.
_BASE = re.compile(r"\d_\{?(\w+)")
# It tells of every answer that it cannot read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def final_answer(text: str) -> str | None:
    """The answer in which a solution ends, as LaTeX; None if it gives none."""
    if found := _MINERVA.findall(text):
        return found[-1].strip().strip("$")
    boxed = last_boxed_only_string(text)
    return _inside(boxed) if boxed else None


def is_right(text: str, solution: str) -> bool:
    """Whether a text ends in the answer of the solution given.

    Raises `ValueError` where that solution has no answer: nothing is equal to it.
    """
    gold = final_answer(solution)
    if not gold:
        raise ValueError(f"no answer in the solution '{solution[-80:]}'")
    answer = final_answer(text)
    return answer is not None and (_spelled(answer) == _spelled(gold) or _is_equal(gold, answer))


def _inside(boxed: str) -> str:
    return remove_boxed(boxed.replace("\\fbox", "\\boxed", 1))


def _spelled(answer: str) -> str:
    try:
        return strip_string(answer)
    except (IndexError, ValueError, AssertionError):
        return answer.strip()


def _is_equal(gold: str, answer: str) -> bool:
    bases = [_BASE.findall(side) for side in (gold, answer)]
    if all(bases) and bases[0] != bases[1]:
        return False
    sides = [_parsed(gold), _parsed(answer)]
    return all(sides) and bool(verify(*sides))


def _parsed(answer: str) -> list:
    # LaTeX alone: what reads plain expressions evaluates them as Python.
    return parse(f"${answer}$", [LatexExtractionConfig()], fallback_mode="no_fallback")
