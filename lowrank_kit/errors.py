"""Errors that are meant for the person who typed the command, not for a debugger."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LowRankKitError(Exception):
    """Something asked for cannot be done; the message says what, where and what to do. Exit status 1."""

    exit_status = 1


class ConfigError(LowRankKitError):
    """The configuration cannot be right, found before any work was done. Exit status 2."""

    exit_status = 2


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest option, else the list of legal ones, if there are any."""
    known = sorted(options)
    if not known:
        return ""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; legal: {', '.join(known)}"


# What a machine refuses for want of room or rights, and what helps.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota of that disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "choose another folder, or have this one mounted for writing",
    errno.EACCES: "have the rights changed, or choose another folder",
    errno.EPERM: "have the rights changed, or choose another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.ENOMEM: "use a machine or a limit (ulimit -v) with more memory, or a smaller model or batch",
    errno.EAGAIN: "raise the limit on processes and threads (ulimit -u), or that on memory (ulimit -v)",
    errno.EIO: "look at that disk",
    errno.ENOTDIR: "name a folder that can be there",
    errno.EEXIST: "name a folder that can be there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links in that path",
}
# Wrong in the command, whatever the machine.
NO_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# Libraries that are not written in Python lose the number, and some the words.
_OTHER_WORDS = {
    errno.ENOSPC: ("PytorchStreamWriter failed writing file", "iostream error"),
    errno.ENOMEM: ("can't allocate memory", "not enough memory", "bad_alloc", "failed to map segment"),
    errno.EAGAIN: ("can't start new thread",),
}


def of_the_machine(error: BaseException | None) -> LowRankKitError | None:
    """Return a message for an exception that comes of a full disk, missing rights, too little memory and the like.

    None for every other one: that is a fault of the program, and wants its traceback. A place that can be no folder is
    a `ConfigError`. What an exception was raised from is looked at, too; of what was merely being handled when it was
    raised, only what the machine refuses for the moment, which libraries stumble over as they clean up.
    """
    is_meant = True
    while error is not None:
        if is_meant and isinstance(error, LowRankKitError):
            return error
        code = _code_of(error)
        if code is not None and (is_meant or code not in NO_PLACE):
            place = f"'{error.filename}'" if isinstance(error, OSError) and error.filename else "the machine"
            kind = ConfigError if code in NO_PLACE else LowRankKitError
            return kind(f"{place}: {os.strerror(code)}: {_REMEDIES[code]}")
        is_meant = is_meant and error.__cause__ is not None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def machine_errors() -> Iterator[None]:
    """Raise what `of_the_machine` knows as a `LowRankKitError`."""
    try:
        yield
    except LowRankKitError:
        raise
    except Exception as error:
        if (known := of_the_machine(error)) is None:
            raise
        raise known from error


def _code_of(error: BaseException) -> int | None:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _REMEDIES else None
    text = str(error)
    if (told := re.search(r"\(os error (\d+)\)", text)) and int(told[1]) in _REMEDIES:
        return int(told[1])
    for code in _REMEDIES.keys() - NO_PLACE:
        if os.strerror(code) in text or any(words in text for words in _OTHER_WORDS.get(code, ())):
            return code
    return None
