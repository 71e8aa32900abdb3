"""Programs that mean harm to the machine, or to their own result: none passes, and nothing comes of any."""

# ruff: noqa: E501 (programs, a line each)

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.sandbox import Limits, Outcome, Program, check_sandbox, run_program

LIMITS = Limits(seconds=5, cpu_seconds=4)
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]"
# It says what it was told to, whatever is asked: the answer's side of the socket, by hand.
BY_HAND = """
import json, os, socket
there = socket.socket(fileno=3)
def say(reply, forever=True):
    try:
        while True:
            there.sendall(json.dumps(reply).encode() + b"\\n")
            if not forever:
                return
            there.recv(2**16)
    except OSError:
        os._exit(0)
def names():
    say({"names": ["double"]}, forever=False)
    there.recv(2**16)
"""
REPLIES = {
    "no reply": "None",
    "a bare list": "[]",
    "no value": "{}",
    "a kind that is none": '{"value": ["x", 1]}',
    "four, and then four": '{"value": ["int", "0x4"]}',
    "an object that it has not": '{"value": ["there", 7]}',
    "an object of the evaluator's": '{"value": ["there", 0]}',
    "the evaluator's exit": '{"value": ["builtin", "exit"]}',
    "another check": '{"value": ["builtin", "isinstance"]}',
    "a name that is none": '{"value": ["builtin", "__loader__"]}',
    "a module that exits": '{"value": ["module", "idlelib.idle"]}',
    "a module that runs": '{"value": ["module", "this"]}',
    "an exit as an error": '{"error": {"kind": "SystemExit", "text": "0", "line": "0"}}',
    "an interruption as an error": '{"error": {"kind": "KeyboardInterrupt", "text": "0", "line": "0"}}',
    "an error of no kind": '{"error": {"kind": "print", "text": "0", "line": "0"}}',
    "an error without a text": '{"error": {}}',
    "no number": '{"value": ["int", "4"], "arguments": 3}',
    "a number of a million digits": '{"value": ["int", "0x" + "f" * 10**6]}',
    "nested ten thousand deep": '{"value": None}',
}
CHEATS = {
    **{f"says {what}": f"{BY_HAND}names()\nsay({reply})" for what, reply in REPLIES.items()},
    "deep nesting": f"{BY_HAND}names()\nthere.sendall(b'[' * 10**6 + b'\\n')\nthere.recv(9)",
    "a line without end": f"{BY_HAND}names()\nwhile True: there.sendall(b'x' * 2**20)",
    "names without end": f"{BY_HAND}say({{'names': ['double'] * 10**6}})",
    "says nothing": f"{BY_HAND}import time\ntime.sleep(60)",
    "ends well": "import os\nos._exit(0)",
    "exits in the test": "import os\ndef double(x): os._exit(0)",
    "raises SystemExit": "def double(x): raise SystemExit(0)",
    "replaces assert's error": "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\ndef double(x): return 5",
    "replaces the checker": "import sys\nfor m in list(sys.modules.values()):\n    for n in list(vars(m)):\n        if callable(vars(m)[n]) and n in ('_done', 'answer', 'ask', '_test', 'evaluator'):\n            setattr(m, n, lambda *a, **k: {'value': ['int', '0x4']})\ndef double(x): return 5",
    "replaces json": "import json\njson.dumps = lambda m: '{\"value\": [\"int\", \"0x4\"]}'\ndef double(x): return 5",
    "prints what passes": "print('passed')\nprint('OK')\nimport os\nos.write(1, b'0' * 32)\ndef double(x): return 5",
    "is equal to all": "class Any:\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __bool__ = lambda *_: True\ndef double(x): return Any()",
    "counts its calls": "calls = []\ndef double(x):\n    calls.append(x)\n    return 4",
    "hides the tests' data": "def double(x):\n    if isinstance(x, list):\n        x.clear()\n        x += [1, 1]\n        return [1]\n    return 4",
    "is the builtin that tests": "def len(x): return 4\ndef double(x): return 5",
    "imports the evaluator": "import sys\nsys.argv = ['dialogue.py', 'evaluator']\nexec(open('dialogue.py').read())",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)",
    "closes the socket": "import os\nos.close(3)\ndef double(x): return 4",
    "signals all": "import os, signal\nfor who in (-1, 0, 1, os.getppid()):\n    try: os.kill(who, signal.SIGKILL)\n    except OSError: pass\ndef double(x): return 5",
}  # fmt: skip
# What it would do outside; MARK is a file of ours that everybody may write, PORT a socket that listens.
HARMS = {
    "writes outside": "open('MARK', 'w').write('gone')",
    "writes through /proc": "import os\nfor p in ('/proc/1/root', '/proc/self/cwd/../..', '/proc/1/cwd'):\n    try: open(p + 'MARK', 'w').write('gone')\n    except OSError: pass",
    "climbs out of its root": "import os\nfor i in range(99):\n    os.chdir('..')\nopen('.MARK', 'w').write('gone')",
    "chroots out": "import os\nos.mkdir('x')\nos.chroot('x')\nfor i in range(99): os.chdir('..')\nos.chroot('.')\nopen('MARK', 'w')",
    "removes all": "import shutil\nshutil.rmtree('/', ignore_errors=True)",
    "links and writes": "import os\nos.symlink('MARK', 'here')\nopen('here', 'w').write('gone')",
    "mounts": "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nassert c.mount(b'/', b'/home', None, 4096, None) == 0",
    "makes a device": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**60, 2**60))\nx = bytearray(2**31)",
    "becomes root": "import os\nos.setuid(0)",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "asks a name server": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "listens": "import socket\ns = socket.create_server(('0.0.0.0', 0))\nraise OSError",
    "raw sockets": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "x = []\nwhile True: x.append(bytearray(2**24))",
    "shared memory": "import mmap\nkeep = []\nwhile True:\n    m = mmap.mmap(-1, 2**24)\n    m[::4096] = bytes(len(m[::4096]))\n    keep.append(m)",
    "memory in a file": "import os\nfd = os.memfd_create('x')\nwhile True: os.write(fd, bytes(2**20))",
    "fills its disk": "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb').write(bytes(2**19))",
    "files without number": "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'w')",
    "prints without end": "while True: print('x' * 10**6)",
    "handles without number": "import os\nkeep = []\nwhile True: keep.append(os.dup(0))",
    "signals": "import signal, os\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\nwhile True: time.sleep(1)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: signal.pause()",
    "breaks down": "import ctypes\nctypes.string_at(0)",
    "a recursive parse": "eval('(' * 10**5 + ')' * 10**5)",
    "traces its parent": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0\nraise OSError",
    "reads the environment": "import os\nassert any('SECRET' in open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit())",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        check_sandbox()
    except LowRankKitError as error:
        pytest.skip(str(error))


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Iterator[tuple[Path, int]]:
    """A file that everybody may write and a port; afterwards the one is whole and nobody has come to the other."""
    monkeypatch.setenv("SECRET", "hunter2")
    mark = tmp_path / "mark"
    mark.write_text("whole")
    mark.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    processes, files = set(psutil.pids()), set(Path("/tmp").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield mark, server.getsockname()[1]
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert mark.read_text() == "whole"
    assert [p for p in set(psutil.pids()) - processes if _is_of_a_program(p)] == []
    assert [f for f in set(Path("/tmp").iterdir()) - files if f.name.startswith("tmp")] == []


def _is_of_a_program(pid: int) -> bool:
    try:
        return "dialogue.py" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def test_no_cheat_passes(some):
    for way in some(list(CHEATS), full=len(CHEATS), short=8):
        started = time.monotonic()
        outcome = run_program(Program(CHEATS[way], TESTS, entry="double"), LIMITS)
        assert outcome.status != "passed", way
        assert time.monotonic() - started < 4 * LIMITS.seconds, way


def test_no_harm_comes_of_any(some, watched):
    mark, port = watched
    for way in some(list(HARMS), full=len(HARMS), short=8):
        program = HARMS[way].replace("MARK", str(mark)).replace("PORT", str(port))
        # The tests are right: that it ends, or is ended, before them is all that makes it wrong.
        started = time.monotonic()
        outcome = run_program(Program(f"{program}\nraise OSError\ndef double(x): return 2 * x", TESTS), LIMITS)
        assert outcome.status != "passed", way
        assert time.monotonic() - started < 4 * LIMITS.seconds, way
    assert run_program(Program("def double(x): return 2 * x", TESTS), LIMITS) == Outcome("passed")
