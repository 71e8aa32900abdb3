"""Several processes at work on one run, as torchrun or `accelerate launch` starts them; for one alone, no-ops.

Every process runs the same code. The first one (rank 0) owns what is on disk; `on_main` is for what it alone does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

from lowrank_kit.deferred import Tensor, no_grad, torch
from lowrank_kit.launcher import is_main, started

T = TypeVar("T")
Outcome = TypeVar("Outcome")

# The others wait while the first compresses, which may take days; one that died is noticed by its launcher.
PATIENCE = timedelta(days=30)

# Waiting goes over TCP: NCCL would keep the devices of those who wait busy.
_waiting_room: "ContextVar[torch.distributed.ProcessGroup | None]" = ContextVar("waiting_room", default=None)
_alone = ContextVar("alone", default=False)


def size() -> int:
    """How many processes share the work at this point: one inside `on_main`."""
    return 1 if _alone.get() or _waiting_room.get() is None else torch.distributed.get_world_size()


def number() -> int:
    """Which of the processes that share the work this is, from 0."""
    return torch.distributed.get_rank() if size() > 1 else 0


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the other processes for the block; over NCCL where ``device`` is CUDA, over gloo on CPUs."""
    if started() == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    token = _waiting_room.set(torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield
        wait()
    finally:
        _waiting_room.reset(token)
    # Not after an error: the others may be gone, and leaving in good order would wait for them.
    state.destroy_process_group()


def wait() -> None:
    """Go on when every process has come here."""
    if size() > 1:
        torch.distributed.barrier(group=_waiting_room.get())


def on_main(work: Callable[[], T]) -> T:
    """Let the first process do ``work`` by itself; all return what it returned, or raise what it raised.

    The outcome is pickled. Inside, `size` is 1: what is otherwise shared among the processes, it does alone.
    """
    if size() == 1:
        return work()
    outcome: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if is_main():
        token = _alone.set(True)
        try:
            outcome = [(work(), None)]
        except BaseException as raised:
            outcome = [(None, raised)]
            raise
        finally:
            _alone.reset(token)
            torch.distributed.broadcast_object_list(outcome, src=0, group=_waiting_room.get())
    else:
        torch.distributed.broadcast_object_list(outcome, src=0, group=_waiting_room.get())
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def held_by_main(context: AbstractContextManager[object]) -> Iterator[None]:
    """Let the first process enter a context for all: they begin the block when it has, and end it together."""
    with ExitStack() as held:

        def enter() -> None:
            held.enter_context(context)

        on_main(enter)
        yield
        wait()


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all of them work through: every n-th item."""
    return items[number() :: size()]


def in_shares(
    work: Callable[[Sequence[T]], Sequence[Outcome]], items: Sequence[T], sizes: Sequence[int] | None = None
) -> list[Outcome]:
    """Let every process do ``work`` on its `share`; all get the outcomes of all items, in the items' order.

    With ``sizes`` a share begins with its largest items, and shares are about equal. Outcomes are pickled.
    """
    order = list(range(len(items)))
    if sizes is not None:
        order.sort(key=lambda i: -sizes[i])
    parts = [list(work([items[i] for i in share(order)]))]
    if size() > 1:
        mine, parts = parts[0], [[] for _ in range(size())]
        torch.distributed.all_gather_object(parts, mine, group=_waiting_room.get())
    outcomes: dict[int, Outcome] = {}
    for start, part in enumerate(parts):
        outcomes |= zip(order[start :: len(parts)], part, strict=True)
    return [outcomes[i] for i in range(len(items))]


@no_grad
def add_up(*sums: Tensor) -> None:
    """Replace every tensor by its sum over the processes, in place."""
    if size() > 1:
        for tensor in sums:
            torch.distributed.all_reduce(tensor)


def total(number: int | float) -> int | float:
    """The sum of a number over the processes, in float64."""
    if size() == 1:
        return number
    from accelerate import PartialState

    # NCCL knows only tensors on its device.
    summed = torch.tensor(number, dtype=torch.float64, device=PartialState().device)
    add_up(summed)
    return summed.item()
