"""`lowrank-kit completion bash|zsh|fish`: print the script that completes words of this command in the shell.

The script asks `lowrank-kit completion --words WORD ...` what the last word may become. The answer needs no torch.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from lowrank_kit.console import command
from lowrank_kit.errors import LowRankKitError

BASH = """\
_lowrank_kit() {
    local words=() word found
    read -ra words <<< "${COMP_LINE:0:COMP_POINT}"
    [[ "${COMP_LINE:0:COMP_POINT}" == *" " ]] && words+=("")
    # Readline takes what stands behind = or : for a word of its own ($2).
    word="${words[-1]}"
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("${found#"${word%"$2"}"}")
    done < <(lowrank-kit completion --words "${words[@]:1}" 2> /dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace
}
complete -o default -F _lowrank_kit lowrank-kit
"""
ZSH = """\
#compdef lowrank-kit
_lowrank_kit() {
    local -a found
    found=("${(@f)$(lowrank-kit completion --words "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    if [[ -n "$found" ]]; then
        compadd -S '' -- "${(@M)found:#*[=.]}"
        compadd -- "${(@)found:#*[=.]}"
    else
        _files
    fi
}
compdef _lowrank_kit lowrank-kit
"""
FISH = """\
complete -c lowrank-kit -a '(lowrank-kit completion --words (commandline -opc)[2..] (commandline -ct) 2> /dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HYDRA_FLAGS = ("--multirun", "--cfg", "--resolve", "--config-dir", "--config-name", "--help", "--hydra-help")
WITHOUT_SECTION = ("seed", "device", "dtype")


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit completion", description=__doc__)
    parser.add_argument("shell", choices=SCRIPTS, help="try it: source <(lowrank-kit completion bash)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--words"]:
        with command():
            print("\n".join(sorted(set(candidates(words[1:])))))
    else:
        print(SCRIPTS[command_line().parse_args(words).shell], end="")
    return 0


def candidates(words: Sequence[str]) -> Iterable[str]:
    """What the last of the words behind `lowrank-kit` may become, given those before it; nothing: a file's name."""
    from lowrank_kit.commands import VERBS

    *before, last = words or [""]
    if not before:
        found: Iterable[str] = VERBS
    elif before[0] not in VERBS:
        found = ()
    elif before[0] == "run":
        found = HYDRA_FLAGS if last.startswith("-") else _overrides(before[1:], last)
    else:
        found = _of_verb(before[0], before[1:], last)
    return (word for word in found if word.startswith(last))


def _of_verb(verb: str, before: Sequence[str], last: str) -> Iterable[str]:
    from lowrank_kit.commands import VERBS

    actions = import_module(VERBS[verb]).command_line()._actions
    if last.startswith("-"):
        return [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
    asked = next((a for a in actions if before and before[-1] in a.option_strings), None)
    if asked is not None:
        return map(str, asked.choices or ())
    if verb == "methods":
        return _options()["method"]
    if verb == "assets":
        from lowrank_kit.assets import CATALOGUE

        return CATALOGUE
    if verb == "eora":
        return _overrides(before, last)
    return next((map(str, a.choices) for a in actions if a.choices and not a.option_strings), ())


def _overrides(before: Sequence[str], last: str) -> Iterator[str]:
    """Groups with their options, and keys with their values; of several values, the last."""
    name, is_valued, value = last.partition("=")
    groups = _options()
    group = "method" if name == "recovery.method" else name.removeprefix("method.")
    if is_valued and group in groups:
        yield from _values(name, value, groups[group])
    elif is_valued:
        yield from _values(name, value, _legal(_keys(before).get(name)))
    elif "." in name:
        depth = name.count(".") + 1
        for parts in (key.split(".") for key in _keys(before)):
            yield ".".join(parts[:depth]) + ("=" if len(parts) == depth else ".")
    else:
        from lowrank_kit.config import RunConfig

        yield from (f"{group}=" for group in groups)
        yield from (f"{key}=" if key in WITHOUT_SECTION else f"{key}." for key in RunConfig.model_fields)


def _values(name: str, value: str, legal: Iterable[str]) -> Iterator[str]:
    start = value.rpartition(",")[0]
    start = f"{name}={start}," if start else f"{name}="
    return (f"{start}{word}" for word in legal)


def _options() -> dict[str, list[str]]:
    from lowrank_kit.config.groups import conf_folder, options
    from lowrank_kit.config.plugins import conf_folders

    return options([conf_folder(), *conf_folders()])


def _keys(before: Sequence[str]) -> dict[str, Any]:
    """All keys of the configuration that the words before make, as far as they can be composed, with their types."""
    from omegaconf import OmegaConf

    from lowrank_kit.compose import Composer
    from lowrank_kit.config import schema_for
    from lowrank_kit.help import fields

    composer = Composer()
    chosen = [word for word in before if "=" in word and word.partition("=")[0] in composer.options and "," not in word]
    try:
        composed = composer.compose(chosen)
    except LowRankKitError:
        composed = composer.compose()
    values: Any = OmegaConf.to_container(composed, resolve=True)
    return {key: field.annotation for key, field, _ in fields(schema_for(values), values)}


def _legal(annotation: Any) -> Iterator[str]:
    """The values of a type that has few."""
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is NoneType:
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from _legal(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        found = [list(_legal(member)) for member in get_args(annotation)]
        yield from (word for words in found for word in words)
