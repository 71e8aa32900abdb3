"""Training examples in a benchmark's own words: lm-eval's prompt and right choice, learnt as they are evaluated."""

from typing import Any

from lowrank_kit.data.benchmarks import Questions
from lowrank_kit.data.instructions import Example
from lowrank_kit.errors import ConfigError


def ask(questions: Questions) -> list[Example]:
    """One example a row, in the rows' order: the text that the model would be scored on for the right choice.

    Raises `ConfigError` for a task of lm-eval that does not exist or is no multiple choice, `LowRankKitError` where it
    cannot read the rows.
    """
    # lm-eval takes seconds to import, and most runs learn nothing in its words.
    from lowrank_kit.evaluation.harness import PreparedBenchmark

    [task] = PreparedBenchmark(questions).tasks.values()
    if task.OUTPUT_TYPE != "multiple_choice":
        raise ConfigError(
            f"task.instructions.{questions.name}.lm_eval: {questions.benchmark.task} is no multiple choice but "
            f"{task.OUTPUT_TYPE}; leave lm_eval out and name instruction_column and output_columns"
        )
    return [_example(task, doc) for doc in task.eval_docs]


def _example(task: Any, doc: dict) -> Example:
    context = task.fewshot_context(doc, num_fewshot=0)
    # Where the choice goes into the context (WinoGrande), lm-eval's "text" is the number of the right one.
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(right, str):
        right = task.doc_to_choice(doc).index(right)
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(None, None, None))
    prompt, answer = requests[right].args
    return Example(prompt, answer, continues=True)
