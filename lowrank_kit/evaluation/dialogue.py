"""A program that a model wrote and the evaluator that tests it, each in a jail; plain values pass between them.

Started by `jail` as a script, standard library only: ``dialogue.py answer`` or ``dialogue.py evaluator``. The answer
loads ``program.py`` and then does what the evaluator asks of it over socket 3: call a function, give an attribute. Only
values of Python's own types cross; any other object stays with the answer, and the evaluator gets a `Remote` that
stands for it and is equal to nothing else. So no method of the answer's, ``__eq__`` least of all, runs where its result
is tested, and what the evaluator prints at the end of its tests, the token in ``request.json``, is in no process of the
answer's.
"""

import ast
import builtins
import importlib
import json
import os
import socket
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

CONNECTION = 3
GONE = 3
"""Exit status of an evaluator whose answer is gone."""
_MOST_ITEMS = 10**6


class Gone(Exception):
    """The other side has ended."""


class Channel:
    """JSON lines over the socket, with the objects that stay on this side."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=CONNECTION)
        self._lines = self._socket.makefile("rb")
        self._kept: list[Any] = []

    def send(self, message: Any) -> None:
        """Send plain JSON."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Gone from None

    def receive(self) -> Any:
        """Return the next message; `Gone` where none comes any more."""
        try:
            line = self._lines.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise Gone
        return json.loads(line)

    def pack(self, value: Any) -> list[Any]:
        """Return a value as JSON; of a subclass of a plain type, the plain value."""
        for kind, tag, plain in _PLAIN:
            if isinstance(value, kind):
                return [tag, plain(value)]
        for kind, tag, items in _NESTED:
            if isinstance(value, kind):
                return [tag, [self.pack(item) for item in items(value)]]
        if isinstance(value, dict):
            return ["dict", [[self.pack(key), self.pack(item)] for key, item in dict.items(value)]]
        if isinstance(value, Remote):
            return ["there", object.__getattribute__(value, "_number")]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, self) is value:
            return ["builtin", name]
        self._kept.append(value)
        return ["here", len(self._kept) - 1]

    def unpack(self, packed: Any) -> Any:
        """Undo `pack` of the other side."""
        tag, content = packed
        if tag in _MADE:
            return _MADE[tag](content)
        if tag in ("list", "tuple", "set", "frozenset", "range"):
            items = [self.unpack(item) for item in content]
            return range(*items) if tag == "range" else getattr(builtins, tag)(items)
        if tag == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in content}
        if tag == "module":
            # The answer may name any: only Python's own are taken, and those of this side.
            return importlib.import_module(content) if content.split(".")[0] in sys.stdlib_module_names else None
        if tag == "builtin":
            return getattr(builtins, content)
        return self._kept[content] if tag == "there" else Remote(self, content)


_PLAIN: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (type(None), "none", lambda value: None),
    (bool, "bool", int),
    (int, "int", lambda value: hex(int.__pos__(value))),
    (float, "float", lambda value: float.hex(value)),
    (complex, "complex", lambda value: [value.real.hex(), value.imag.hex()]),
    (str, "str", lambda value: str.__getitem__(value, slice(None))),
    (bytes, "bytes", lambda value: bytes(value).hex()),
    (bytearray, "bytearray", lambda value: bytes(value).hex()),
)
_NESTED: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (list, "list", list.__iter__),
    (tuple, "tuple", tuple.__iter__),
    (set, "set", set.__iter__),
    (frozenset, "frozenset", frozenset.__iter__),
    (range, "range", lambda value: (value.start, value.stop, value.step)),
)
_MADE: Mapping[str, Callable[[Any], Any]] = {
    "none": lambda content: None,
    "bool": bool,
    "int": lambda content: int(content, 16),
    "float": float.fromhex,
    "complex": lambda content: complex(*map(float.fromhex, content)),
    "str": str,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}


class Remote:
    """An object that stayed with the answer. It can be called, looked into and gone through; nothing is equal to it."""

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def _ask(self, what: str, *content: Any) -> Any:
        channel: Channel = object.__getattribute__(self, "_channel")
        number = object.__getattribute__(self, "_number")
        return ask(channel, {"what": what, "of": number, "with": channel.pack(content)}, content)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it where it is."""
        return self._ask("call", *arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("items"))

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __str__(self) -> str:
        return str(self._ask("text"))


def ask(channel: Channel, request: Mapping[str, Any], content: tuple[Any, ...] = ()) -> Any:
    """Let the answer do something; return its value, or raise what it raised.

    Lists, dictionaries and sets among the arguments that the answer has changed are changed here, too.
    """
    channel.send(request)
    reply = channel.receive()
    if "error" in reply:
        raise remote_error(reply["error"])
    for mine, theirs in zip(content, reply.get("arguments", ()), strict=False):
        if type(mine) in (list, dict, set) and mine != (now := channel.unpack(theirs)):
            mine.clear()
            (mine.extend if isinstance(mine, list) else mine.update)(now)
    return channel.unpack(reply["value"])


def remote_error(told: Mapping[str, str]) -> Exception:
    """The answer's exception as one of Python's own kinds."""
    kind = getattr(builtins, told["kind"], None)
    found: Exception = RuntimeError(told["line"])
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            found = kind(told["text"])
        except TypeError:
            # It wants more than a text.
            found = RuntimeError(told["line"])
    found.remote_line = told["line"]  # type: ignore[attr-defined]
    return found


def answer() -> None:
    """Load the program and do what the evaluator asks."""
    channel, me = Channel(), os.getpid()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        text = Path("program.py").read_text("utf-8", errors="surrogatepass")
        exec(compile(text, "program.py", "exec"), vars(module))
    except SystemExit:
        raise
    except BaseException as error:
        channel.send({"error": _told(error)})
        return
    if os.getpid() != me:
        # A process that the program started has its end.
        os._exit(0)
    channel.send({"names": [name for name in vars(module) if not name.startswith("__")]})
    while True:
        try:
            request = channel.receive()
        except Gone:
            return
        try:
            reply = _done(channel, module, request)
        except SystemExit:
            raise
        except BaseException as error:
            reply = {"error": _told(error)}
        channel.send(reply)


def _done(channel: Channel, module: types.ModuleType, request: Mapping[str, Any]) -> dict[str, Any]:
    what, content = request["what"], channel.unpack(request["with"])
    if what == "name":
        return {"value": channel.pack(getattr(module, content[0]))}
    value = channel.unpack(["there", request["of"]])
    if what == "call":
        *arguments, named = content
        found = value(*arguments, **named)
        return {"value": channel.pack(found), "arguments": [channel.pack(a) for a in arguments]}
    ways: dict[str, Callable[[], Any]] = {
        "attribute": lambda: getattr(value, *content),
        "set": lambda: setattr(value, *content),
        "items": lambda: list(islice(value, _MOST_ITEMS)),
        "length": lambda: len(value),
        "item": lambda: value[content[0]],
        "text": lambda: str(value),
    }
    return {"value": channel.pack(ways[what]())}


def _told(error: BaseException) -> dict[str, str]:
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "line": traceback.format_exception_only(error)[-1].strip(),
    }


def evaluator() -> None:
    """Run the tests on the answer; print the token behind them, or what went wrong as the last line."""
    request = json.loads(Path("request.json").read_text("utf-8"))
    try:
        _test(Channel(), request)
    except Gone:
        sys.exit(GONE)
    except BaseException as error:
        print(getattr(error, "remote_line", None) or traceback.format_exception_only(error)[-1].strip())
        sys.exit(1)
    print(request["token"], flush=True)


def _test(channel: Channel, request: Mapping[str, Any]) -> None:
    loaded = channel.receive()
    if "error" in loaded:
        raise remote_error(loaded["error"])
    code = compile(request["tests"], "tests.py", "exec")
    known: dict[str, Any] = {"__name__": "tests"}
    exec(compile(request["given"], "given.py", "exec"), known)
    names = set(loaded["names"])
    tested = {request["entry"]} & names
    used = [node.id for node in ast.walk(ast.parse(request["tests"])) if isinstance(node, ast.Name)]
    tested |= {name for name in used if name in names and name not in known and not hasattr(builtins, name)}
    if not tested:
        # A function that is called like one of Python's own is the one that is tested where no other is.
        tested = set([name for name in used if name in names and name not in known][:1])
    for name in tested:
        known[name] = ask(channel, {"what": "name", "with": channel.pack((name,))})
    exec(code, known)


if __name__ == "__main__":
    {"answer": answer, "evaluator": evaluator}[sys.argv[1]]()
