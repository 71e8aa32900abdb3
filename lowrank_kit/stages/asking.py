"""Rows of a benchmark in its own words, with lm-eval imported only where there are any: that takes seconds."""

from collections.abc import Sequence

from lowrank_kit.data.benchmarks import Questions
from lowrank_kit.data.instructions import Lesson


def ask(questions: Questions) -> Sequence[Lesson]:
    """See `lowrank_kit.evaluation.lessons.ask`."""
    from lowrank_kit.evaluation import lessons

    return lessons.ask(questions)
