import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = """
import sys, types
from pathlib import Path
pipeline = types.ModuleType("lowrank_kit.pipeline")
def execute(config):
    from lowrank_kit.errors import LowRankKitError
    if config.method.rank == 13:
        raise LowRankKitError("rank 13 is unlucky")
    if config.method.rank == 14:
        raise RuntimeError("a bug")
    Path(f"ran-{config.method.rank}-{config.seed}").touch()
    return Path("runs/here")
pipeline.execute = execute
import lowrank_kit
lowrank_kit.pipeline = sys.modules["lowrank_kit.pipeline"] = pipeline
from lowrank_kit.run import main
main()
"""
METHOD = """
from lowrank_kit.config import Method
class Fake(Method):
    name: str = "fake"
    rank: int = 8
"""


@pytest.fixture
def cli(tmp_path: Path):
    (tmp_path / "fake_method.py").write_text(METHOD)
    group = tmp_path / "more" / "method"
    group.mkdir(parents=True)
    (group / "fake.yaml").write_text("_target_: fake_method.Fake\nname: fake\nrank: 8\n")
    work = tmp_path / "work"
    work.mkdir()
    base = ["--config-dir", str(tmp_path / "more"), "method=fake", "run.method_prefixes=[fake_method]"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        command = [sys.executable, "-c", LAUNCH, *base, *arguments]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    run.work = work
    return run


def left(cli) -> list[str]:
    return sorted(p.name for p in cli.work.iterdir())


def test_the_last_line_names_the_run_and_hydra_leaves_nothing(cli):
    done = cli("method.rank=2", "task=glue/rte")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "run: runs/here"
    assert left(cli) == ["ran-2-0"]


def test_a_wrong_command_is_one_message_and_status_2(cli):
    done = cli("method.rnk=3", "train.learning_rat=1")
    assert done.returncode == 2
    assert "method.rnk is not a key; did you mean 'rank'?" in done.stderr
    assert "train.learning_rat is not a key; did you mean 'learning_rate'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing" not in done.stderr
    assert left(cli) == []


def test_a_failure_of_the_work_is_one_message_and_status_1(cli):
    done = cli("method.rank=13")
    assert (done.returncode, done.stderr.strip()) == (1, "rank 13 is unlucky")
    assert "run:" not in done.stdout


def test_a_bug_keeps_its_traceback(cli):
    done = cli("method.rank=14")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug" in done.stderr


def test_a_sweep_runs_every_combination(cli):
    done = cli("-m", "method.rank=1,2", "seed=0,1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["run: runs/here"] * 4
    assert lines[-1].startswith("sweep: runs/sweeps/4-jobs-")
    assert [name for name in left(cli) if name.startswith("ran")] == [
        "ran-1-0",
        "ran-1-1",
        "ran-2-0",
        "ran-2-1",
    ]


def test_a_sweep_with_one_wrong_combination_runs_none(cli):
    done = cli("-m", "method.rank=1,two")
    assert done.returncode == 2
    assert "method.rank='two' should be a valid integer" in done.stderr
    assert left(cli) == []


def test_a_failed_job_of_a_sweep_fails_the_command_after_the_others(cli):
    done = cli("-m", "method.rank=13,1")
    assert done.returncode == 1
    assert "rank 13 is unlucky" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ran-1-0" in left(cli)


def test_the_configuration_can_be_shown(cli):
    done = cli("--cfg", "job", "--resolve", "method.rank=5")
    assert done.returncode == 0, done.stderr
    assert "_target_: fake_method.Fake\n  name: fake\n  rank: 5\n" in done.stdout
    assert left(cli) == []


def test_help_describes_the_chosen_method(cli):
    done = cli("--help")
    assert done.returncode == 0, done.stderr
    assert "method.rank (integer) = 8" in done.stdout
    assert "lowrank-kit run method=astra task=glue/rte" in done.stdout
