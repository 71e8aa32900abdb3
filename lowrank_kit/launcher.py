"""What torchrun or `accelerate launch` says of the processes it started; imports no torch."""

import os


def started() -> int:
    """How many processes the launcher started for this run, by the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a launcher started this process, be it alone."""
    return "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Whether this process is the first of those the launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def local_number() -> int:
    """Number of this process on its machine, which is also that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sharding() -> str | None:
    """The option by which `accelerate launch` was told to shard models itself; None: it only starts processes."""
    told = {f"ACCELERATE_USE_{name.upper()}": f"--use_{name}" for name in ("fsdp", "deepspeed", "megatron_lm")}
    return next((option for name, option in told.items() if os.environ.get(name, "").lower() == "true"), None)
