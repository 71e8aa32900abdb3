"""Every `lowrank_kit.run` command of the documentation is one that can be started, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from lowrank_kit.compose import Composer, force_dotted

ROOT = Path(__file__).parents[2]
# The commands of the page on own methods need its package, with which tests/integration/test_plugin.py runs them.
PAGES = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")} - {
    ROOT / "docs/add_a_method.md"
}


def commands():
    for page in sorted(PAGES):
        for found in re.findall(
            r"(?:-m lowrank_kit\.run|lowrank-kit run) ([^\n`]+)", page.read_text().replace("\\\n", " ")
        ):
            words = [word for word in shlex.split(found, comments=True) if word != "..."]
            # That folder is the reader's own; a help page is not run.
            if not {"--config-dir", "--help", "method=..."} & {*words}:
                yield " ".join(words), words


COMMANDS = dict(commands())


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_composes(command):
    arguments = get_args_parser().parse_intermixed_args(COMMANDS[command])
    assert Composer().jobs(force_dotted(arguments.overrides), arguments.multirun)


@pytest.mark.nightly
@pytest.mark.assets
def test_the_python_page_runs(asset, tmp_path, monkeypatch):
    asset("running_text")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL):
        exec(block, names)
    assert (tmp_path / "smaller/modeling_lowrank_llama.py").is_file()
