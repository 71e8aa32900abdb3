import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from lowrank_kit.console import explained
from lowrank_kit.errors import ConfigError, LowRankKitError, machine_errors, of_the_machine


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


MACHINE = {
    "room": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"),
    "ulimit -n": OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"),
    "another folder": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"),
    "memory": MemoryError(),
    "make room": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "on that disk": RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file"),
    "more memory": ImportError("libx.so: failed to map segment from shared object"),
    "threads": RuntimeError("can't start new thread"),
    "mounted": caused(ValueError("something"), OSError(errno.EROFS, os.strerror(errno.EROFS), "x")),
}


@pytest.mark.parametrize("words", MACHINE)
def test_what_a_machine_refuses_is_one_message(words, capsys):
    assert explained(MACHINE[words]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_torchs_own_refusal_of_memory_is_known():
    with pytest.raises(LowRankKitError, match="memory"), machine_errors():
        torch.empty(2**60)


@pytest.mark.parametrize("code", [errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP])
def test_a_place_that_is_none_is_the_commands_mistake(code, capsys):
    assert explained(OSError(code, os.strerror(code), "x")) == 2


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyError("room")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    assert of_the_machine(error) is None
    with pytest.raises(type(error)):
        explained(error)
    with pytest.raises(type(error)), machine_errors():
        raise error


def test_a_message_of_ours_stays_as_it_is():
    error = ConfigError("mine")
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    assert of_the_machine(error) is error


def while_handling(handled: Exception, raised: Exception) -> Exception:
    raised.__context__ = handled
    return raised


@pytest.mark.parametrize("handled", [ConfigError("mine"), FileExistsError(errno.EEXIST, "there", "x")])
def test_a_fault_in_what_handles_an_error_is_a_fault_of_the_program(handled):
    assert of_the_machine(while_handling(handled, KeyError("absent"))) is None


def test_a_full_disk_that_a_library_stumbles_over_as_it_cleans_up_is_told():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    assert "make room" in str(of_the_machine(while_handling(full, RuntimeError("cannot close"))))
