"""Run one Python program that nobody vouches for; started by `sandbox` as a script of its own, standard library only.

Reads one JSON object from standard input, files, the words that run one of them, the socket that it gets, the folder to
mount on and `sandbox.Limits`, and prints one: ``{"unavailable": why}``, or ``{"status", "cpu_seconds", "output"}``, the
last of what was printed, where no status means that time was up.
"""

import ctypes
import json
import os
import random
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MS_NOSUID, _MS_NODEV = 2, 4
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_LIBC = ctypes.CDLL(None, use_errno=True)
INTERPRETER = os.path.realpath(sys.executable)
HOME = "/home"
CONNECTION = 3


def main() -> None:
    """Run what standard input asks for and print what came of it."""
    request = json.load(sys.stdin)
    # Whoever waits for this process may be killed: no program outlives it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        found = _run(request)
    except OSError as error:
        found = {"unavailable": str(error)}
    print(json.dumps(found))


def _run(request: dict[str, Any]) -> dict[str, Any]:
    _enter_namespaces()
    printed, output = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become_the_program(request, output)
        except BaseException as error:
            os.write(say, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.close(say)
    os.close(output)
    os.close(request["connection"])
    listener = _Listener(printed, request["output"])
    try:
        # The pipe is closed when the program starts, or has said why it could not.
        if trouble := os.read(said, 10_000):
            return {"unavailable": trouble.decode()}
        ended = listener.until(os.pidfd_open(child), time.monotonic() + request["seconds"])
    finally:
        # The first process of its namespace: with it the kernel ends all the others, wherever they hid.
        os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    listener.rest()
    return {
        "status": os.waitstatus_to_exitcode(status) if ended else None,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "output": listener.text,
    }


class _Listener:
    """Hears what a program prints and remembers the end of it; too much ends the program."""

    def __init__(self, pipe: int, most: int) -> None:
        os.set_blocking(pipe, False)
        self._pipe, self._most, self._heard, self._tail = pipe, most, 0, b""

    def until(self, ended: int, deadline: float) -> bool:
        """Listen until the program has ended or printed too much; False if the time was up."""
        heard = [self._pipe]
        while self._heard <= self._most:
            ready = select.select([ended, *heard], [], [], max(deadline - time.monotonic(), 0))[0]
            if not ready:
                return False
            if self._pipe in ready:
                # Whatever printed may have closed it.
                heard = heard if self._hear() else []
            elif ended in ready:
                return True
        return True

    def rest(self) -> None:
        """Hear what is left of a program that has ended."""
        while self._heard <= self._most and self._hear():
            pass

    @property
    def text(self) -> str:
        """The last of what was printed."""
        if self._heard > self._most:
            return f"printed more than {self._most >> 20} MiB"
        return self._tail.decode(errors="replace")

    def _hear(self) -> bool:
        try:
            chunk = os.read(self._pipe, 2**16)
        except BlockingIOError:
            return False
        self._heard += len(chunk)
        self._tail = (self._tail + chunk)[-(2**16) :]
        return bool(chunk)


def _enter_namespaces() -> None:
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _unshare(spaces)
    else:
        _unshare(_NEWUSER | spaces)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)


def _become_the_program(request: dict[str, Any], output: int) -> None:
    _move_to_an_empty_root(request)
    for name, text in request["files"].items():
        # A lone surrogate is a fault of the program's, for its own interpreter to find.
        Path(name).write_text(text, encoding="utf-8", errors="surrogatepass")
    if os.geteuid() == 0:
        # A user that nobody else is: the kernel counts processes by user, and root's not at all.
        user = 1_000_000_000 + random.SystemRandom().randrange(1_000_000_000)
        os.chown(".", user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(request["connection"], CONNECTION)
    for limit, most in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, request["file_size"]),
        (resource.RLIMIT_NPROC, request["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    words = [INTERPRETER, "-I", "-S", "-B", "-X", "utf8", *request["words"]]
    os.execve(INTERPRETER, words, {"HOME": HOME, "TMPDIR": HOME})


def _move_to_an_empty_root(request: dict[str, Any]) -> None:
    """A file system in memory that holds the interpreter and its libraries, read-only, and an empty folder."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    root = request["root"]
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={request['disk']},nr_inodes=4096,mode=755")
    shown: list[Path] = []
    for name in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", sys.base_prefix):
        path, place = Path(name), Path(f"{root}{name}")
        if path.is_symlink():
            place.symlink_to(path.readlink())
        elif path.exists() and not any(path.is_relative_to(other) for other in shown):
            _show(path, place, writable=name.startswith("/dev/"))
            shown.append(path)
    Path(f"{root}{HOME}").mkdir()
    os.chroot(root)
    os.chdir(HOME)


def _show(path: Path, place: Path, writable: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        place.mkdir()
    else:
        place.touch()
    _mount(str(path), str(place), None, _MS_BIND | _MS_REC)
    if not writable:
        # struct mount_attr: set read-only, no set-user-ID, no devices; with all mounts below.
        attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        done = _LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, bytes(place), _AT_RECURSIVE, attributes, size)
        _check(done, f"mount_setattr({path})")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [word if word is None else word.encode() for word in (source, target, kind, data)]
    done = _LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(done, f"mount({source or target})")


def _unshare(flags: int) -> None:
    _check(_LIBC.unshare(flags), "unshare")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
