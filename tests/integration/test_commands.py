"""`lowrank-kit VERB`: what the verbs say is what files and classes hold."""

import json
import re

import pytest

from lowrank_kit.commands import VERBS, main
from lowrank_kit.commands.inspect import matrices_of, spectra_of
from lowrank_kit.compose import Composer
from lowrank_kit.pipeline import execute


@pytest.fixture
def words(language_arguments):
    return language_arguments


@pytest.fixture
def say(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        try:
            status = main(words)
        except SystemExit as left:
            status = left.code
        found = capsys.readouterr()
        return status, found.out, found.err

    return run


def test_every_verb_is_listed_and_has_a_help_of_its_own(say):
    status, listed, _ = say()
    assert status == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\w", listed, re.MULTILINE), verb
        status, out, _ = say(verb, "--help")
        assert (status or 0) == 0
        assert "usage" in out.lower(), verb


@pytest.mark.parametrize(
    ("words", "message"),
    [(("reprot",), "did you mean 'report'?"), (("method=astra",), "a run is `lowrank-kit run ...`")],
)
def test_a_wrong_verb_is_answered_with_the_nearest(words, message, say):
    status, _, err = say(*words)
    assert status == 2
    assert message in err


def test_all_methods_are_listed_with_what_they_read(say):
    _, out, _ = say("methods")
    rows = {cells[0].strip(): cells for line in out.splitlines() if len(cells := line.strip("│").split("│")) == 5}
    assert rows.keys() >= set(Composer().options["method"])
    assert "backward" in rows["grasp"][3]
    assert "backward" not in rows["grasp_activation"][3]
    assert rows["svd"][3].strip() == rows["lora"][3].strip() == "weights"
    assert rows["svd_llm"][3].strip() == rows["astra"][3].strip() == "weights, a forward pass"
    assert "measured losses" in rows["asvd"][3]
    assert rows["slicegpt"][2].strip() == "arXiv 2401.15024"


def test_a_method_s_settings_are_its_class_s(say):
    _, out, _ = say("methods", "svd_llm")
    assert all(f"method.{key}" in out for key in ("ratio", "storage", "rank_multiple"))
    status, _, err = say("methods", "svdllm")
    assert (status, "did you mean 'svd_llm'?" in err) == (2, True)


@pytest.mark.draws
def test_inspect_shows_a_checkpoint_s_own_ranks(say, job):
    run = execute(
        job("method.ratio=0.4", "method.rank_multiple=1", "structure=channels", "storage=pivot", method="kfac_svd")
    )
    plan = json.loads((run / "plan.json").read_text())
    matrices = matrices_of(run / "checkpoint")
    assert len(matrices) == len(plan["ranks"])
    # What a plan says is left, the checkpoint's own shapes say.
    assert sum(m.parameters for m in matrices) == plan["parameters_after"]
    assert sum(m.dense for m in matrices) == plan["parameters_before"]
    # Pivot storage has a half whose smaller side is not the rank.
    factored = [(m.rank, rank) for m, rank in zip(matrices, plan["ranks"].values(), strict=True) if m.rank is not None]
    assert factored
    assert all(shown == planned for shown, planned in factored)
    status, out, _ = say("inspect", str(run))
    assert status == 0
    assert "complete" in out
    assert f"{plan['parameters_after']:,}" in out
    assert len(re.findall(r"^ *(?:q|k|v|o|gate|up|down) \|[ .:=+*#%@-]{3}\|$", out, re.MULTILINE)) == 7
    status, out, _ = say("inspect", str(run), "--spectra", str(run / "spectra.png"))
    assert (status, "effective rank" in out) == (0, True)
    assert (run / "spectra.png").read_bytes().startswith(b"\x89PNG")
    # Of a product of rank k no more than k singular values are there; of a matrix that is whole, all.
    refs, values = spectra_of(run / "checkpoint")
    found = [sum(value > 1e-6 * values[ref.name][0] for value in values[ref.name]) for ref in refs]
    assert found == [plan["ranks"][f"model.{ref.name}"] for ref in refs]
    status, _, err = say("inspect", str(run), "--spectra", str(run / "spectra.txt"))
    assert (status, ".png, .svg or .pdf" in err) == (2, True)
    status, _, err = say("inspect", str(run / "plots"))
    assert (status, "neither a run directory" in err) == (2, True)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "mixtral"])
def test_inspect_shows_checkpoints_of_any_head(family, say, checkpoint):
    matrices = matrices_of(checkpoint(family))
    assert matrices
    assert all(m.parameters == m.dense and m.rank is None for m in matrices)
    assert say("inspect", str(checkpoint(family)))[0] == 0


def test_diff_shows_what_differs_and_what_came_of_it(say, job):
    runs = [execute(job(f"method.ratio={ratio}", "method.rank_multiple=1")) for ratio in (0.3, 0.5)]
    status, out, _ = say("diff", *map(str, runs))
    assert status == 0
    _, _, shown = out.partition("┃ setting")
    shown, _, _ = shown.partition("┃ task")
    settings = [line.strip("│").split("│")[0].strip() for line in shown.splitlines() if "│" in line]
    assert settings == ["method.ratio"]
    before, after = (
        next(r["value"] for r in json.loads((run / "results.json").read_text()) if r["checkpoint"] == "final")
        for run in runs
    )
    assert f"{after - before:+.4g}" in out


def test_the_doctor_finds_what_is_here(say):
    status, out, _ = say("doctor")
    assert status == 0
    for what in ("torch", "transformers", "memory", "sandbox", "cache"):
        assert what in out
