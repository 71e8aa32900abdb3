"""The words that the Tab key offers: by the command itself, and in a real shell on a terminal."""

import os
import pty
import re
import shutil
import subprocess
import sys
import time
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


def test_bash_completes_on_a_terminal(tmp_path):
    environment = {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(tmp_path)}
    bash, terminal = pty.fork()
    if bash == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**environment, "PS1": "$ "})
    try:
        os.write(terminal, b"source <(lowrank-kit completion bash)\n")
        _until(terminal, "bash)\r\n", "$ ")
        for typed, completed in {
            "repo": "report ",
            "run method=svd_llm_": "run method=svd_llm_v2 ",
            "run method=svd_llm calibration.sa": "run method=svd_llm calibration.samples=",
            "export RUN --format low": "export RUN --format lowrank ",
        }.items():
            os.write(terminal, f"lowrank-kit {typed}\t".encode())
            _until(terminal, f"lowrank-kit {completed}")
            os.write(terminal, b"\x03")
            _until(terminal, "$ ")
    finally:
        os.write(terminal, b"\x03exit\n")
        os.close(terminal)
        os.waitpid(bash, 0)


def _until(terminal: int, *expected: str) -> None:
    """Read what the shell writes until these words have come, one behind the other."""
    seen, last = "", time.monotonic() + 120
    while time.monotonic() < last:
        seen += os.read(terminal, 4096).decode()
        at = 0
        for words in expected:
            at = seen.find(words, at) + len(words) if words in seen[at:] else -1
            if at < 0:
                break
        else:
            return
    raise AssertionError(f"not seen: {expected} in {seen!r}")


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
