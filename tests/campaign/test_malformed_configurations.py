"""Wrong command lines, generated from the schema: each is answered at once, by name, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from transformers import PreTrainedModel

from lowrank_kit import pipeline, run
from lowrank_kit.compose import Composer, force_dotted

SECONDS = 3.0
LIMITS = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
CAUSAL, CLASSES = "task=perplexity", "task=glue/rte"
# Every class of the schema is in one of them.
BASES = (
    ("method=svd_llm", CAUSAL, "eval.effects.enabled=false", "model.quantization=none"),
    ("method=kfac_svd", CAUSAL, "structure=channels", "correction=residual", "storage=pivot"),
    ("method=loss_svd", CAUSAL, "truncation=fisher", "correction=refine"),
    ("method=asvd", CAUSAL, "allocation=lems", "storage=bytes"),
    ("method=basis_sharing", CAUSAL, "allocation=d_rank"),
    ("method=energy_svd", CAUSAL, "correction=sequential"),
    ("method=hisvd", "task=suite16", "truncation=plain"),
    ("method=swift", CAUSAL, "recovery=lora"),
    ("method=zs_svd", CAUSAL, "recovery=adapter", "recovery.method=lora"),
    ("method=svd_llm_v2", CAUSAL, "runtime=streamed"),
    ("method=grasp", CAUSAL),
    ("method=laco", CAUSAL),
    ("method=shortgpt", CAUSAL),
    ("method=slicegpt", CAUSAL),
    ("method=llm_pruner", CAUSAL),
    ("method=prune_comp", CAUSAL),
    ("method=replace_me", CAUSAL),
    ("method=astra", "task=math"),
    ("method=lora", CLASSES, "tracker=wandb"),
    ("method=lora_plus", "task=code"),
    ("method=lora_ga", CLASSES),
    ("method=corda", CLASSES),
    ("method=eva", "task=glue"),
    ("method=full_ft", CLASSES),
    ("method=none", CLASSES, "runtime=spread"),
)


@dataclass(frozen=True)
class Fault:
    """A word of a command line, the key that it is about, and what must be said besides that key."""

    word: str
    key: str
    says: tuple[str, ...]


def leaves(section: BaseModel, at: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a configuration that hold no section, by dotted key; of equal sections, the first."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{at}{name}"
        if isinstance(value, Mapping) and value and isinstance(next(iter(value.values())), BaseModel):
            first, value = next(iter(value.items()))
            key = f"{key}.{first}"
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{key}.")
        else:
            yield key, field


def types_of(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for part in get_args(annotation) for found in types_of(part)]
    return [annotation]


def misspelt(word: str) -> str:
    return word[:1] + word[2:] if len(word) > 2 else f"{word}{word}"


def faults_of(key: str, field: FieldInfo) -> Iterator[Fault]:
    kinds = [get_origin(t) or t for t in types_of(field.annotation)]
    words = [word for t in types_of(field.annotation) if get_origin(t) is Literal for word in get_args(t)]
    if words and isinstance(words[0], str):
        yield Fault(
            f"{key}={misspelt(words[0])}", key, (f"did you mean '{words[0]}'" if len(words[0]) > 4 else words[0],)
        )
        yield Fault(f"{key}=7", key, (words[0],))
    for kind, word, meant in (
        (int, "many", "integer"),
        (int, "1.5", "integer"),
        (float, "much", "number"),
        (bool, "perhaps", "boolean"),
        (str, "7", "'7'"),
        (str, "[a]", ""),
        (dict, "7", "mapping"),
        (tuple, "7", "list"),
        (tuple, "[[1]]", ""),
    ):
        # What one of several types takes is no fault.
        if kind in kinds and not (word == "1.5" and float in kinds):
            yield Fault(f"{key}={word}", key, (meant,))
    if NoneType not in kinds:
        yield Fault(f"{key}=null", key, ())
    if float in kinds:
        yield from (Fault(f"{key}={word}", key, ("finite",)) for word in ("nan", "inf", "-inf"))
    for limit in field.metadata:
        for name, step in LIMITS.items():
            if (value := getattr(limit, name, None)) is not None:
                yield Fault(f"{key}={value + step}", key, (f"{value:g}" if isinstance(value, float) else str(value),))
        if getattr(limit, "min_length", None):
            yield Fault(f"{key}={'{}' if dict in kinds else '[]'}", key, ("at least",))
    parent, _, name = key.rpartition(".")
    wrong = f"{parent}.{misspelt(name)}".removeprefix(".")
    if parent:
        yield Fault(f"{wrong}=1", wrong, (f"did you mean '{name}'",) if len(name) > 4 else (name,))


def all_faults(bases: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], Fault]]:
    """One of each kind for every field of every class, with the base that the class is in."""
    found: dict[tuple[Any, ...], tuple[tuple[str, ...], Fault]] = {}
    composer = Composer()
    for base in bases:
        [config] = composer.jobs(force_dotted(base), multirun=False)
        for key, field in leaves(config):
            # A group of Hydra's, which says its own options (OTHERS).
            for fault in [] if key.endswith(".preset") else faults_of(key, field):
                found.setdefault((fault.word.replace(key, ""), key, field.description), (base, fault))
    return list(found.values())


# What no schema sees: Hydra's own words, and groups of options.
OTHERS = (
    Fault("method=astar", "method=astar", ("did you mean 'astra'",)),
    Fault("method=[astra,lora]", "method", ("legal: aa_svd",)),
    Fault("method=[]", "method", ("legal: aa_svd",)),
    Fault("method=null", "method", ("legal: aa_svd",)),
    Fault("method=", "method", ("legal: aa_svd",)),
    Fault("~method", "method", ("choose one",)),
    Fault("~task", "task", ("missing",)),
    Fault("~tsk", "tsk", ("did you mean 'task'",)),
    Fault("task=glue/rtee", "task", ("did you mean 'glue/rte'",)),
    Fault("truncation=optimla", "truncation", ("did you mean 'optimal'",)),
    Fault("method.preset=7", "method.preset", ("legal: default, paper",)),
    Fault("method.preset=null", "method.preset", ("legal: default, paper",)),
    Fault("method.preset=pper", "method.preset", ("did you mean 'paper'",)),
    Fault("experiment=astra_gleu", "experiment", ("did you mean 'astra_glue'",)),
    Fault("hydra/launcher=slrum", "hydra/launcher", ("did you mean 'slurm'",)),
    Fault("hydra/launcher=slurm", "hydra/launcher=slurm", ("add -m",)),
    Fault("hydra/sweeper=optuna", "hydra/sweeper=optuna", ("add -m",)),
    Fault(
        "-m hydra/launcher=slurm hydra.launcher.timout_min=3 seed=1,2", "timout_min", ("did you mean 'timeout_min'",)
    ),
    Fault("-m hydra.launcher.n_jobs=3 seed=1,2", "hydra.launcher.n_jobs", ("not a key",)),
    Fault("-m hydra.sweeper.trials=3 seed=1,2", "hydra.sweeper.trials", ("hydra/sweeper=optuna",)),
    Fault("-m hydra/sweeper=optuna eval.held_out=9 seed=1,2", "hydra.sweeper.study", ("name the search",)),
    Fault("-m hydra/sweeper=optuna hydra.sweeper.study=a seed=1,2", "search", ("eval.held_out=N",)),
    Fault("-m seed=interval(1,3)", "seed=interval(1,3)", ("hydra/sweeper=optuna",)),
    Fault("-m seed=glob(*)", "seed=glob(*)", ("lists and ranges",)),
    Fault("-m seed=1,two", "seed", ("integer", "in 1 of 2 jobs")),
    Fault("seed=1,2", "seed=1,2", ("add -m",)),
    Fault("sed=3", "sed", ("did you mean 'seed'",)),
    Fault("seed", "'seed'", ("key=value",)),
    Fault("seed={", "seed", ("key=value",)),
    Fault("train..epochs=1", "train..epochs", ("key=value",)),
    Fault("train.epochs=${nope}", "train.epochs", ("nope",)),
    Fault("train.epochs=${oc.env:NOPE}", "train.epochs", ("NOPE",)),
    Fault("train.epochs=???", "train.epochs", ("issing",)),
    Fault("method._target_=os.system", "method._target_", ("not in an allowed package",)),
    Fault("method._target_=lowrank_kit.adapters.lora.Lra", "Lra", ("did you mean 'Lora'",)),
    Fault("--nope", "--nope", ("usage",)),
    Fault("--cfg everything", "everything", ("job",)),
    Fault("--config-name nope", "nope", ("config",)),
    Fault("--config-dir nope", "nope", ("not a folder",)),
)
# What contradicts the rest of the configuration, the model or the rows: of a causal model, and of a classifier.
AGAINST_EACH_OTHER = (
    ("calibration.samples=100000", "lower one of the two"),
    ("calibration.seq_len=100000", "2048"),
    ("task.window=100000", "2048"),
    ("task.window=700", "600 tokens"),
    ("eval.held_out=1000", "lower eval.held_out"),
    ("eval.speed.enabled=true eval.speed.prompt_tokens=100000", "2048 positions"),
    ("allocation=loss", "method.allocation.probe_windows"),
    ("allocation=asvd", "method.allocation.probe_windows"),
    ("allocation=swift", "method.allocation.probe_windows"),
    ("method.ratio=0.9999", "nearest feasible"),
    ("method.rank_multiple=1000", "lower the multiple"),
    ("method.roles=[]", "choose of q"),
    ("method.roles=[qq]", "did you mean 'q'"),
    ("runtime=ddp", "torchrun"),
    ("runtime=streamed truncation=joint", "weights=resident"),
    ("runtime=streamed recovery=lora recovery.data=text", "runtime.weights=resident"),
    ("runtime.options={a:1}", "leave them out"),
    ("recovery=adapter recovery.method=none recovery.data=text", "recovery.method=lora"),
    ("recovery=lora recovery.data=task", "recovery.data=text"),
    ("recovery=lora recovery.data=alpca", "did you mean 'alpaca'"),
    ("recovery=lora recovery.data=text storage=bytes", "storage=factors"),
    ("recovery=lora recovery.data=text train.mixed_precision=fp16", "train.mixed_precision=none"),
    ("storage=bytes", "allocation=lagrangian"),
    ("truncation=joint correction=residual", "single blocks"),
    ("structure=channels", "truncation=two_sided"),
    ("structure=channels truncation=two_sided", "allocation"),
    ("model.quantization=nf4", "model.quantization=none"),
    ("device=cuda:77", "device=auto"),
    ("model.path=./nowhere", "does not exist"),
    ("model.path=packaged://minilm", "did you mean 'minilm_l6'"),
    ("model.gguf_file=nope.gguf", "it holds config.json"),
    ("data.root=nowhere", "nowhere"),
    ("data.root=null", "data.root=FOLDER"),
    ("task.texts.mine.eval_split=tset", "test, validation"),
    ("task.texts.mine.calibration_split=test", "must not share text"),
    ("task.calibrate_on=min", "did you mean 'mine'"),
    ("task.perplexity=false", "nothing to evaluate on"),
)
AGAINST_THE_ROWS = (
    ("method.rank=33", "lower method.rank"),
    ("method.rank_pattern={qk:3}", "'qk' matches no"),
    ("method.roles=[gate]", "legal: down"),
    ("eval.held_out=48", "48 training rows"),
    ("task=glue/cola", "sets here: glue/mnli"),
    ("task.train_split=tran", "train, validation"),
    ("task.text_columns=[sentence3]", "they have sentence1"),
    ("task.metrics=[pearson]", "legal: ['accuracy'"),
    ("task.label_names=[a]", "give 2 different ones"),
    ("recovery=lora", "recovery=none"),
    ("model.quantization=int8", "model.quantization=none"),
    ("train.mixed_precision=fp16", "train.mixed_precision=none"),
)


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys) -> Callable[[Sequence[str]], str]:
    """What the command says to a wrong line, in this process: its status, its time and what it leaves are looked at."""
    monkeypatch.chdir(tmp_path)

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    # Imported before the clock is started: what a process of its own takes is asked below.
    assert pipeline

    def ask(words: Sequence[str]) -> str:
        there, started = set(tmp_path.iterdir()), time.process_time()
        with pytest.raises(SystemExit) as left:
            run.main(words)
        seconds = time.process_time() - started
        said = capsys.readouterr().err
        assert left.value.code == 2, (words, said)
        assert "Traceback" not in said, words
        assert seconds < SECONDS, words
        assert set(tmp_path.iterdir()) == there, words
        return said

    return ask


def test_each_is_named_with_what_is_legal(answer, some):
    for base, fault in some(all_faults(some(BASES, full=len(BASES), short=5)), full=300, short=15):
        said = answer([*base, fault.word])
        assert all(words in said for words in (fault.key, *fault.says)), (base, fault, said)


def test_all_that_is_wrong_is_listed_at_once(answer, some):
    for base in some(BASES, full=len(BASES), short=4):
        [config] = Composer().jobs(force_dotted(base), multirun=False)
        # A section's own rules are asked once its fields are right, so one fault for each field; a misspelt key of a
        # choice is said too, but of a dictionary not, which takes any.
        faults = [next(iter(found)) for key, field in leaves(config) if (found := list(faults_of(key, field)))]
        faults = [fault for fault in faults if not fault.key.endswith(("kind", "preset"))]
        said = answer([*base, *(fault.word for fault in faults)])
        assert [fault for fault in faults if fault.key not in said] == [], base


def test_what_hydra_reads_itself_is_put_in_our_words(answer, some):
    for fault in some(OTHERS, full=len(OTHERS), short=10):
        said = answer([CLASSES, *fault.word.split()] if not fault.word.startswith("~") else [fault.word])
        assert all(words in said for words in (fault.key, *fault.says)), (fault, said)


def test_what_contradicts_is_refused_before_a_run_exists(answer, some, language_arguments, arguments):
    lines = [(language_arguments("method.rank_multiple=1"), *case) for case in AGAINST_EACH_OTHER]
    lines += [(arguments(), *case) for case in AGAINST_THE_ROWS]
    for words, wrong, says in some(lines, full=len(lines), short=8):
        said = answer([*words, *wrong.split()])
        assert says in said, (wrong, said)


@pytest.mark.parametrize("wrong", ["method.rnk=3", "train.epochs=many"])
def test_a_process_answers_within_seconds(wrong, environment, tmp_path):
    command = [sys.executable, "-m", "lowrank_kit.run", "method=astra", wrong]
    before = os.times()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 2
    assert wrong.partition("=")[0] in done.stderr
    # CPU time: other work on the machine is not the command's.
    assert after.children_user + after.children_system - before.children_user - before.children_system < SECONDS
    assert list(tmp_path.iterdir()) == []
