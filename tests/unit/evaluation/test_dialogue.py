# ruff: noqa: E501 - a program is one string on one line
"""Answers that cheat: none passes, whatever it reads, patches or returns; right ones pass, whatever they print."""

# ruff: noqa: E501 (programs, a line each)
import pytest

from lowrank_kit.evaluation.programs import program_of
from lowrank_kit.evaluation.sandbox import Limits, Outcome, Program, run_program

pytestmark = pytest.mark.usefixtures("sandbox")
SHORT = Limits(seconds=3)
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]"
# What a program can see of itself and of what runs it.
EVERYTHING = """
import gc, os, sys
def everything():
    found = [open(f"/home/{name}", errors="replace").read() for name in os.listdir("/home")]
    frame = sys._getframe()
    while frame:
        found += [repr(frame.f_code.co_consts), repr(list(frame.f_locals.items())), repr(list(frame.f_globals.items()))]
        frame = frame.f_back
    found += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) and len(o) < 1000]
    return "".join(found)
def tell(*_):
    for fd in (1, 2, 3):
        try:
            os.write(fd, everything().encode()[:100000])
        except OSError:
            pass
    os._exit(0)
"""
CHEATS = {
    "its own file": "import sys\ntext = open(sys.argv[0]).read()\nprint(text)\nimport os\nos.write(1, text.encode())\nos._exit(0)",
    "excepthook": f"{EVERYTHING}\nsys.excepthook = tell\nraise ValueError",
    "at exit": f"{EVERYTHING}\nimport atexit\natexit.register(tell)\nraise SystemExit(0)",
    "inspect": "import inspect, sys, os\nfor f in inspect.stack():\n    print(f.code_context)\nprint(inspect.getsource(inspect.stack()[-1].frame))\nos._exit(0)",
    "the last line": "import sys, os\nexec(open(sys.argv[0]).read().splitlines()[-1])\nos._exit(0)",
    "its caller's last line": (
        "import sys, os\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        print(frame.f_code.co_consts, frame.f_globals)\n        frame = frame.f_back\n    os._exit(0)"
    ),
    "all it sees": f"{EVERYTHING}\ndouble = tell",
    "equal to everything": "class Any:\n    def __eq__(self, other):\n        return True\n    __ne__ = lambda *_: False\ndef double(x):\n    return Any()",
    "an equal number": "class Any(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\ndef double(x):\n    return Any(7)",
    "an equal list": "class Any(list):\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return [Any()] if x == 2 else Any([5])",
    "other built-ins": "import builtins\nbuiltins.AssertionError = Exception\ndef double(x):\n    return 5\ndouble.__eq__ = lambda *_: True",
    "answers of its own": "import os\nos.write(3, b'{\"names\": []}\\n' * 9)\nos._exit(0)",
    "another evaluator": "import sys\nsys.argv[1] = 'evaluator'\nfrom runpy import run_path\nrun_path('dialogue.py', run_name='__main__')",
}  # fmt: skip


@pytest.mark.parametrize("way", CHEATS)
def test_no_cheat_passes(way):
    assert run_program(Program(CHEATS[way], TESTS), SHORT).status == "failed"


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ("def double(x):\n    return 2 * x", TESTS),
        ("def double(x):\n    print('x' * 3_000_000)\n    return 2 * x", TESTS),
        ("print('x' * 3_000_000)\ndouble = lambda x: 2 * x", TESTS),
        ("from collections import Counter\ncount = Counter", "assert count('aab') == {'a': 2, 'b': 1}"),
        ("def squares(n):\n    return (i * i for i in range(n))", "assert list(squares(3)) == [0, 1, 4]"),
        ("def clear(x):\n    x.clear()", "x = [1, 2]\nclear(x)\nassert x == []"),
        ("def sum(a, b):\n    return a - b", "assert sum(3, 1) == 2"),
        ("import math\ndef half(x):\n    return x / 2", "assert math.isclose(half(1), 0.5)"),
        ("class P:\n    def __init__(self, x):\n        self.x = x\ndef of(p):\n    return p.x", "p = P(1)\np.x = 3\nassert of(p) == 3"),
        ("def odd(x):\n    raise KeyError(x)", "try:\n    odd(1)\n    assert False\nexcept KeyError:\n    pass"),
        ("def same(x):\n    return x", "for x in (None, True, -2**70, 1.5, 2j, 'ü\\ud800', b'\\0', (1, {2}), {(1,): [range(3)]}, frozenset({1}), len):\n    assert same(x) == x and type(same(x)) is type(x)\nassert same(float('nan')) != 0"),
    ],
)  # fmt: skip
def test_a_right_answer_passes(answer, tests):
    assert run_program(Program(answer, tests), SHORT) == Outcome("passed")


def test_a_surrogate_in_the_source_is_a_wrong_answer_and_no_more():
    assert run_program(Program("double = '\ud800'", TESTS), SHORT).status == "failed"
    assert run_program(Program("def double(x):\n    return 2 * x", TESTS), SHORT).status == "passed"


def test_too_much_output_ends_a_program():
    outcome = run_program(Program("while True:\n    print('x' * 10**6)", TESTS))
    assert outcome == Outcome("failed", "printed more than 16 MiB")


def test_humanevals_tests_may_use_what_its_prompt_defines():
    row = {
        "prompt": 'def helper(x):\n    return x + 1\n\ndef next_one(x):\n    """The next."""\n',
        "test": "def check(candidate):\n    assert helper(candidate(1)) == 3\n",
        "entry_point": "next_one",
    }
    assert run_program(program_of(row, "    return helper(x)"), SHORT) == Outcome("passed")
    # The tests' own helper is not the answer's.
    cheat = "    return 7\nclass Any(int):\n    pass\ndef helper(x):\n    return 3"
    assert run_program(program_of(row, cheat), SHORT).status == "failed"
