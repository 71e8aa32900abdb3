"""Programs that mean harm: each must be wrong, and leave nothing behind."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.sandbox import Limits, Outcome, run_program

pytestmark = pytest.mark.usefixtures("sandbox")
SHORT = Limits(seconds=2)
# The first line of what would do harm to the machine, were it not the first process of its own.
FIRST = "import os\nassert os.getpid() == 1, 'not in the sandbox'\n"
KILL_EVERYONE = """
import signal
for who in (-1, 0, os.getppid(), -os.getpgid(0)):
    try:
        os.kill(who, signal.SIGKILL)
    except OSError:
        pass
"""
FORK_ALL_IT_CAN = """
import time
n = 0
while True:
    try:
        n += os.fork() != 0
    except OSError:
        break
time.sleep(0.5)
"""
DAEMON = """
import ctypes, time
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(1, 0)
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(0.2)
"""
PRIVILEGED = """
import ctypes, os
libc = ctypes.CDLL(None)
ways = {
    "mount": libc.mount(b"x", b"/", b"tmpfs", 0, None), "chroot": libc.chroot(b"."),
    "user": libc.unshare(0x10000000), "net": libc.unshare(0x40000000),
}
"""


def failed(program, limits=SHORT):
    outcome = run_program(program, limits)
    assert outcome.status == "failed", outcome
    return outcome.message


def test_a_right_program_passes_and_a_wrong_one_says_why():
    program = "def double(x):\n    return {} * x\n\nassert double(2) == 4, 'not doubled'"
    assert run_program(program.format(2)) == Outcome("passed")
    assert failed(program.format(3)) == "AssertionError: not doubled"
    assert "SyntaxError" in failed("def f(:")


def test_what_programs_need_of_python_is_there():
    modules = "math, re, json, random, itertools, collections, heapq, hashlib, datetime, decimal, typing, copy, sys"
    files = "print('ü')\nopen('mine', 'w').write('x')\nassert open('mine').read() == 'x'"
    assert run_program(f"import {modules}\n{files}") == Outcome("passed")


@pytest.mark.parametrize("way", ["import os; os._exit(0)", "raise SystemExit", "import sys; sys.exit(0)"])
def test_ending_before_the_tests_is_wrong(way):
    assert "before its tests" in failed(f"{way}\nassert False")


def test_a_program_that_kills_itself_or_its_whole_group_is_wrong_and_kills_no_other():
    assert failed(f"{FIRST}{KILL_EVERYONE}assert False, 'alive'").endswith("alive")
    assert "status -11" in failed("import ctypes\nctypes.string_at(0)")


@pytest.mark.parametrize(
    "loop", ["while True: pass", "import time; time.sleep(60)", "import signal\nwhile True:\n  signal.pause()"]
)
def test_an_endless_loop_is_stopped(loop):
    started = time.monotonic()
    assert run_program(loop, Limits(seconds=1)) == Outcome("timed_out", "after 1 s")
    assert time.monotonic() - started < 10


def test_cpu_time_is_limited_too():
    limits = Limits(cpu_seconds=1, seconds=20)
    assert run_program("while True: pass", limits) == Outcome("timed_out", "after 1 s of CPU time")


@pytest.mark.parametrize("size", ["bytearray(2 ** 33)", "[0] * 10 ** 9", "b'x' * 2 ** 40"])
def test_a_huge_allocation_fails(size):
    assert failed(f"x = {size}") == "MemoryError"


def processes_of(mark):
    return [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or ())]


def test_a_fork_bomb_is_bounded_and_gone_afterwards():
    assert failed(f"{FIRST}{FORK_ALL_IT_CAN}assert False, f'at most {{n}}'").startswith("AssertionError: at most ")
    before = len(psutil.pids())
    outcome = run_program(f"{FIRST}while True:\n    try: os.fork()\n    except OSError: pass", Limits(seconds=1))
    assert outcome.status == "timed_out"
    assert len(psutil.pids()) < before + 20
    assert processes_of("program.py") == []


def test_a_daemon_does_not_outlive_its_program():
    assert run_program(f"{FIRST}{DAEMON}").status == "passed"
    assert run_program(f"{FIRST}{DAEMON}time.sleep(60)", SHORT).status == "timed_out"
    assert processes_of("program.py") == []


def test_huge_output_is_cut_off_and_wrong():
    started = time.monotonic()
    failed("while True: print('x' * 10 ** 6)")
    assert "File too large" in failed("open('big', 'wb').write(bytes(2 ** 24))")
    full = "n = 0\nwhile True:\n    n += 1\n    open(f'big{n}', 'wb').write(bytes(2 ** 19))"
    assert "No space left" in failed(full)
    assert time.monotonic() - started < 20


def test_files_of_the_machine_are_neither_seen_nor_written_nor_deleted(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    tmp_path.chmod(0o777)
    mine.chmod(0o666)
    named = f"lowrank_kit_{os.getpid()}"
    targets = [str(mine), f"/usr/{named}", f"{Path.home()}/{named}", f"/tmp/{named}", f"../../{named}"]
    for target in targets:
        run_program(f"{FIRST}open({target!r}, 'a').write('x')")
    assert "No such file" in failed(f"{FIRST}os.remove({str(mine)!r})")
    assert "No such file" in failed(f"{FIRST}import shutil\nshutil.rmtree({str(tmp_path)!r})")
    assert "Read-only file system" in failed(f"{FIRST}open('/usr/{named}', 'w')")
    assert "Read-only file system" in failed(f"{FIRST}open({sys.base_prefix!r} + '/{named}', 'w')")
    assert mine.read_text() == "precious"
    assert not any(Path(target).exists() for target in targets[1:4])


def test_secrets_of_the_environment_are_not_there(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert failed("import os\nassert False, sorted(os.environ)") == "AssertionError: ['HOME', 'LC_CTYPE', 'TMPDIR']"
    around = "import os\nfor n in (1, os.getppid()):\n    assert 'hunter2' in open(f'/proc/{n}/environ').read()"
    assert "No such file" in failed(around)


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "unreachable" in failed(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    abstract = f"\0test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract)
        server.listen()
        assert "refused" in failed(f"import socket\nsocket.socket(socket.AF_UNIX).connect({abstract!r})")


def test_standard_input_is_empty():
    assert failed("input()") == "EOFError: EOF when reading a line"


def test_no_privileges_are_left():
    assert run_program(f"{PRIVILEGED}assert os.getuid() and set(ways.values()) == {{-1}}, ways") == Outcome("passed")


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_program("open('x', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a capability to give up")
def test_where_namespaces_are_not_allowed_nothing_is_run():
    ask = (
        "from lowrank_kit.evaluation.sandbox import *\n"
        "try:\n    run_program('')\nexcept LowRankKitError as error:\n    print(error)"
    )
    # Without CAP_SYS_ADMIN (21), as root in a container is.
    give_up = "import ctypes, os, sys\nctypes.CDLL(None).prctl(24, 21)\nos.execv(sys.executable, sys.argv[1:])"
    words = [sys.executable, "-c", give_up, sys.executable, "-c", ask]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "cannot be run safely on this machine ([Errno 1] unshare: Operation not permitted)" in done.stdout


def test_elsewhere_than_on_linux_nothing_is_run(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(LowRankKitError, match=r"needs Linux, this is darwin.*~task\.benchmarks\.NAME"):
        run_program("")
