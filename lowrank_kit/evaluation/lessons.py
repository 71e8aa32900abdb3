"""Rows of a benchmark as lessons: lm-eval's own prompt and right choice, so that what is learnt is what is judged."""

from lm_eval.api.task import Task

from lowrank_kit.data.benchmarks import Questions
from lowrank_kit.data.instructions import Lesson
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.harness import Exam


def ask(questions: Questions) -> list[Lesson]:
    """One lesson a row, in the rows' order: the text that the model would be scored on for the right choice.

    Raises `ConfigError` for a task of lm-eval that does not exist or is no multiple choice, `LowRankKitError` where it
    cannot read the rows.
    """
    [task] = Exam(questions).tasks.values()
    if task.OUTPUT_TYPE != "multiple_choice":
        raise ConfigError(
            f"task.instructions.{questions.name}.lm_eval: {questions.benchmark.task} is no multiple choice but "
            f"{task.OUTPUT_TYPE}; leave lm_eval out and name instruction_column and output_columns"
        )
    return [_lesson(task, doc) for doc in task.eval_docs]


def _lesson(task: Task, doc: dict) -> Lesson:
    context = task.fewshot_context(doc, num_fewshot=0)
    # Where the choice goes into the context (WinoGrande), lm-eval's "text" is the number of the right one.
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(right, str):
        right = task.doc_to_choice(doc).index(right)
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(None, None, None))
    prompt, answer = requests[right].args
    return Lesson(prompt, answer, continues=True)
