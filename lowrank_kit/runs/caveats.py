"""What a reader must know of a figure before it is compared: it stands beside the figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_kit.config import load
from lowrank_kit.config.plugins import allowing
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_json

RECONSTRUCTION = "a reconstruction"
NOT_TEST_BLIND = "not test-blind"
BACKWARD = "needs a backward pass"

# Of papers without code, made from what they say.
_RECONSTRUCTED = ("hisvd",)


def caveats_of(run: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the caveats of a compression, in words; none for what does not compress.

    ``a reconstruction``: of a method whose code is not public. ``not test-blind``: the correction `residual` became
    a default after test windows had been seen. ``N of M dense``: matrices that the allocation left as they were.
    ``needs a backward pass``: of the whole model, in calibration; the others run it forward alone.
    """
    method = config["method"]
    found = [RECONSTRUCTION] if method["name"] in _RECONSTRUCTED else []
    if (method.get("correction") or {}).get("kind") == "residual":
        found.append(NOT_TEST_BLIND)
    if _reads_gradients(config):
        found.append(BACKWARD)
    return [*found, *_dense(run)]


def _reads_gradients(config: Mapping[str, Any]) -> bool:
    try:
        return load(allowing(config)).method.reads_gradients
    except LowRankKitError:
        return False


def _dense(run: Path) -> list[str]:
    plan, checkpoint = (read_json(run / name, dict) or {} for name in ("plan.json", "checkpoint/config.json"))
    lowrank = checkpoint.get("lowrank") or {}
    changed = len({*(lowrank.get("ranks") or ()), *(lowrank.get("shapes") or ())})
    matrices = len(plan.get("ranks") or ())
    return [f"{matrices - changed} of {matrices} dense"] if 0 < changed < matrices else []
