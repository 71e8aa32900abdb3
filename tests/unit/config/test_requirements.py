"""What the parts of a configuration ask of each other, by settings alone."""

import pytest

from lowrank_kit.compose import Composer, force_dotted

TEXTS = "task=perplexity"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=astra", "task=glue/rte"], []),
        (["method=astra", TEXTS], ["method=astra is trained, and task=perplexity has nothing to learn from"]),
        (["method=astra", "task=glue/rte", "runtime=spread"], ["runtime=spread is for models that are evaluated"]),
        (["method=none", TEXTS, "runtime=spread"], []),
        (["method=svd_llm", TEXTS], []),
        (["method=svd_llm", "task=glue/rte"], ["method=svd_llm compresses causal language models"]),
        (
            ["method=laco", "task=glue/rte", "model.quantization=nf4"],
            ["method=laco compresses causal language models", "method=laco compresses float weights"],
        ),
        (["method=svd_llm", TEXTS, "recovery=factors"], []),
        (["method=shortgpt", TEXTS, "recovery=lora"], []),
        (["method=shortgpt", TEXTS, "recovery=factors"], ["method=shortgpt leaves none: use recovery=lora"]),
        (["method=none", TEXTS, "recovery=lora"], ["method=none compresses nothing"]),
        (
            ["method=svd_llm", TEXTS, "recovery=adapter", "recovery.method=full_ft"],
            ["recovery.method=full_ft is no adapter", "recovery.data=task: task=perplexity"],
        ),
        (["method=svd_llm", TEXTS, "recovery=lora", "recovery.data=task"], ["recovery.data=task: task=perplexity"]),
        (["method=svd_llm", TEXTS, "recovery=lora", "runtime=fsdp"], ["every process holds whole"]),
    ],
)
def test_every_problem_is_told_and_nothing_else(words, expected):
    [config] = Composer().jobs(force_dotted(words), multirun=False)
    task = config.task.parts[0]
    problems = [
        *config.method.requirements(config.model, config.runtime, task),
        *config.recovery.requirements(config.method, config.runtime, task),
    ]
    assert len(problems) == len(expected), problems
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))
