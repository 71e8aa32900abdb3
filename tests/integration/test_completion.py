"""The words that the Tab key offers: by the command itself, and in a real shell on a terminal."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.assets import CATALOGUE
from lowrank_kit.commands import VERBS
from lowrank_kit.commands.completion import candidates
from lowrank_kit.compose import Composer

COMMAND = Path(sys.executable).with_name("lowrank-kit")


def test_commands_options_groups_keys_and_values_are_offered():
    assert set(candidates([""])) == set(VERBS)
    assert set(candidates(["rep"])) == {"report"}
    assert set(candidates(["run", "method="])) == {f"method={name}" for name in Composer().options["method"]}
    assert set(candidates(["run", "-m", "method=lora,astra_"])) == {"method=lora,astra_released"}
    assert {"calibration=", "calibration.", "seed=", "task="} <= set(candidates(["run", ""]))
    keys = set(candidates(["run", "method=astra", "method."]))
    assert keys == {f"method.{name}=" for name in Astra.model_fields}
    assert set(candidates(["run", "method=astra", "method.side="])) == {"method.side=output", "method.side=input"}
    assert set(candidates(["run", "eval.allow_code_execution="])) == {
        "eval.allow_code_execution=true",
        "eval.allow_code_execution=false",
    }
    assert set(candidates(["report", "runs", "--l"])) == {"--level"}
    assert set(candidates(["export", "RUN", "--format", ""])) == {"dense", "lowrank", "serve", "lora"}
    assert set(candidates(["assets", ""])) == set(CATALOGUE)
    assert set(candidates(["compare", "ru"])) == set()
    assert set(candidates(["nonsense", ""])) == set()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "run"])
def test_every_option_of_a_command_s_help_is_offered(verb):
    shown = subprocess.run([COMMAND, verb, "--help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", shown.partition("options:")[2])) - {"--words"} <= set(
        candidates([verb, "--"])
    )


@pytest.mark.parametrize("words", [["run", "method=svd_"], ["run", "method=svd_llm", "method."], ["export", "--"]])
def test_an_answer_does_not_wait_for_torch(words):
    code = f"import sys; from lowrank_kit.commands import main; main({['completion', '--words', *words]}); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(words[-1])


@pytest.mark.parametrize(
    ("line", "word", "offered"),
    [
        ("repo", "repo", ["report"]),
        # Readline takes what stands behind = for a word of its own.
        ("run method=svd_llm_", "svd_llm_", ["svd_llm_v2"]),
        ("run method=svd_llm calibration.sa", "calibration.sa", ["calibration.samples="]),
        ("export RUN --format low", "low", ["lowrank"]),
    ],
)
def test_bash_completes_what_was_typed(line, word, offered):
    program = """source <(lowrank-kit completion bash)
        COMP_LINE="lowrank-kit $1" && COMP_POINT=${#COMP_LINE} && _lowrank_kit lowrank-kit "$2" ""
        printf "%s\\n" "${COMPREPLY[@]}"; complete -p lowrank-kit"""
    environment = os.environ | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    words = ["bash", "--norc", "--noprofile", "-c", program, "bash", line, word]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [*offered, "complete -o default -F _lowrank_kit lowrank-kit"]


@pytest.mark.parametrize(
    ("shell", "program"),
    [
        # zsh's `compdef` exists behind `compinit` alone; it completes on a terminal only.
        ("zsh", "autoload -U compinit; compinit -D; source <(lowrank-kit completion zsh); whence _lowrank_kit"),
        ("fish", "source (lowrank-kit completion fish | psub); complete -C 'lowrank-kit run method=svd_llm_'"),
    ],
)
def test_another_shell_takes_the_script(shell, program):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    environment = os.environ | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [{"zsh": "_lowrank_kit", "fish": "method=svd_llm_v2"}[shell]]
