"""Errors that are meant for the person who typed the command, not for a debugger."""

from collections.abc import Iterable
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
