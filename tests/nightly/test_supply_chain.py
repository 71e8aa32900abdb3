"""What this package brings to a machine: known faults, licences, the lock, lowest and newest versions, wheel and sdist.

Environments are made in temporary folders, by pip, and take some gigabytes and minutes. Of torch they have the release
that the lock names: its other builds for Linux bring CUDA.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import Distribution, distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "constraints.txt"
# Copyleft that reaches software which depends on it; the Lesser GPL and the Mozilla licence do not.
FORBIDDEN = re.compile(r"\b(A?GPL|GNU (Affero )?General Public|SSPL|proprietary|commercial|non-?free)", re.IGNORECASE)
# Of the extra `longbench`, which nobody gets who does not ask for it: lm-eval's scorer of LongBench imports it.
ASKED_FOR = {"fuzzywuzzy": "GNU General Public License v2 (GPLv2)"}
# Those whose metadata says nothing: looked up in the repository of each.
LOOKED_UP = {"torchao": "BSD-3-Clause", "rouge": "Apache-2.0"}


def pinned() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in LOCK.read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed() -> dict[str, Distribution]:
    return {canonicalize_name(found.name): found for found in distributions() if found.name != "lowrank_kit"}


def licence(found: Distribution) -> str:
    """As the metadata has it: an expression, else classifiers, else the first line of a text."""
    facts = found.metadata
    classifiers = [c for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
    text = (facts.get("License") or "").strip().splitlines()
    told = facts.get("License-Expression") or "; ".join(c.rpartition(" :: ")[2] for c in classifiers)
    return LOOKED_UP.get(canonicalize_name(found.name)) or told or (text[0] if text else "")


def closure(*extras: str) -> set[str]:
    """What a plain installation brings, with these extras."""
    there, found, todo = installed(), set(), [("lowrank_kit", frozenset(extras))]
    while todo:
        name, wanted = todo.pop()
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            key = canonicalize_name(needed.name)
            if key in there and key not in found:
                found.add(key)
                todo.append((key, frozenset(needed.extras)))
    return found


def test_everything_that_make_installs_is_pinned():
    lock = pinned()
    loose = {name for name in installed() if name not in lock and name not in ("pip", "setuptools")}
    assert loose == set(), "run `make lock`"
    # "+cpu" is a build of the same release.
    other = {n: d.version for n, d in installed().items() if n in lock and d.version.partition("+")[0] != lock[n]}
    assert other == {}, "run `make lock`, or install again"
    assert not any(name.startswith("nvidia") for name in lock)


def test_no_licence_forbids_what_depends_on_it(record_property):
    there = installed()
    licences = {name: licence(found) for name, found in there.items()}
    assert [name for name, text in licences.items() if not text] == []
    bad = {
        n: text for n, text in licences.items() if FORBIDDEN.search(text.replace("LGPL", "")) and "Lesser" not in text
    }
    assert bad == {name: text for name, text in ASKED_FOR.items() if name in there}
    plain = closure()
    assert len(plain) > 50
    assert not plain & set(ASKED_FOR)
    for text in sorted(set(licences.values())):
        names = sorted(name for name in licences if licences[name] == text)
        print(f"{text}: {len(names)} ({', '.join(names)})")


Environment = Callable[..., Path]


@pytest.fixture
def environment(tmp_path) -> Environment:
    """A fresh environment with what pip is told to install; returns its folder of programs."""

    def build(name: str, *words: str) -> Path:
        folder = tmp_path / name
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if words:
            pip(folder / "bin", "install", *words)
        return folder / "bin"

    return build


def pip(programs: Path, *words: str) -> str:
    done = subprocess.run(
        [programs / "python", "-m", "pip", *words, "--quiet"], capture_output=True, text=True, cwd=programs.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def do(programs: Path, *words: str, where: Path) -> str:
    """Run a program of an environment in a folder without a checkout."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([programs / words[0], *words[1:]], capture_output=True, text=True, cwd=where, env=settings)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def at_work(programs: Path, where: Path) -> None:
    """Compress, train, evaluate, report and export on the packaged models, in an empty folder."""
    where.mkdir()
    small = ("calibration.samples=8", "calibration.seq_len=64", "eval.limit=8", "device=cpu")
    assert "lowrank_kit" in do(programs, "lowrank-kit", "doctor", where=where)
    do(
        programs, "lowrank-kit", "run", "method=svd_llm", "model=smollm2_135m", "task=perplexity", "task.window=64",
        *small, "run.dir=compressed", where=where,
    )  # fmt: skip
    do(
        programs, "lowrank-kit", "run", "method=lora", "model=minilm_l6", "task=glue/sst2", "train.max_steps=4",
        *small, "run.dir=adapted", where=where,
    )  # fmt: skip
    do(programs, "lowrank-kit", "report", ".", where=where)
    assert (where / "report/report.html").is_file()
    do(programs, "lowrank-kit", "export", "compressed", "--format", "dense", "--output", "dense", where=where)
    do(programs, "lowrank-kit", "export", "adapted", "--format", "lora", "--output", "lora", where=where)


# Cheap ones, of every room that stands on a library.
UNITS = (
    "spectral",
    "config",
    "cache",
    "allocations",
    "truncations",
    "models/test_load.py",
    "training/test_adapters.py",
)
TOOLS = ("pytest", "pytest-timeout", "beartype", "hypothesis")


@pytest.mark.assets
@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_lowest_and_newest_dependencies_work(which, environment, asset, tmp_path):
    for name in ("smollm2_135m", "minilm_l6", "benchmark_rows", "running_text"):
        asset(name)
    programs = environment(which)
    # pip has no such choice. It takes wheels that lie here where pip does.
    resolver = environment("resolver", "uv")
    local = ["--find-links", links] if (links := os.environ.get("PIP_FIND_LINKS")) else []
    choice = "lowest-direct" if which == "lowest" else "highest"
    into = ["--python", str(programs / "python"), "--resolution", choice, *local]
    # Tools of these tests are as the lock has them.
    tools = [f"{name}=={pinned()[name]}" for name in ("torch", *TOOLS)]
    subprocess.run([resolver / "uv", "pip", "install", *into, str(ROOT), *tools], check=True)
    at_work(programs, tmp_path / "work")
    # The checkout's tests, and the installed package.
    (tmp_path / "checkout").mkdir()
    for part in ("tests", "conf", "pyproject.toml"):
        (tmp_path / "checkout" / part).symlink_to(ROOT / part)
    files = [f"tests/unit/{unit}" for unit in UNITS]
    # Warnings of other versions are no errors there.
    do(programs, "python", "-m", "pytest", "-q", "-W", "default", *files, where=tmp_path / "checkout")


@pytest.mark.assets
def test_wheel_and_sdist_work_without_the_checkout(environment, asset, tmp_path):
    for name in ("smollm2_135m", "minilm_l6", "benchmark_rows", "running_text"):
        asset(name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")], cwd=ROOT, check=True)
    [wheel], [sdist] = ((tmp_path / "dist").glob(end) for end in ("*.whl", "*.tar.gz"))
    programs = environment("fresh", "--constraint", str(LOCK), str(wheel))
    at_work(programs, tmp_path / "from the wheel")
    pip(programs, "uninstall", "--yes", "lowrank_kit")
    pip(programs, "install", "--no-deps", str(sdist))
    at_work(programs, tmp_path / "from the sdist")


def test_no_known_vulnerability(environment):
    programs = environment("audit", "pip-audit")
    words = [
        programs / "pip-audit",
        "--requirement",
        str(LOCK),
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    # A mirror of the index may serve packages alone, and pip-audit calls that nothing found.
    silent = done.stdout.count("could not be audited") >= len(pinned())
    if silent or re.search(r"ConnectionError|Max retries|ServiceError|timed out|Forbidden", done.stderr):
        pytest.skip("the index that is reached from here tells nothing of vulnerabilities")
    assert done.returncode == 0, done.stdout + done.stderr
