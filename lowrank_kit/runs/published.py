"""What papers report for the same model, method and ratio, from ``published.yaml``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from lowrank_kit.config import RunConfig

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Published:
    """A paper's figures by task and metric, of the dense model and of the method; ``source`` is None without any."""

    dense: Mapping[tuple[str, str], float] = field(default_factory=dict)
    final: Mapping[tuple[str, str], float] = field(default_factory=dict)
    source: str | None = None


def published_for(config: RunConfig) -> Published:
    """The figures that a run may be held against; none of a run with recovery, which the papers' tables are without."""
    name = PurePosixPath(config.model.path).name.lower()
    method, ratio = getattr(config.method, "name", "none"), getattr(config.method, "ratio", 0)
    for group in yaml.safe_load(FILE.read_text("utf-8")):
        of_others = group.get("average_of", config.task.name) != config.task.name
        if name not in group["models"] or of_others or config.recovery.what != "none":
            continue
        asked: dict[tuple[str, float], dict[tuple[str, str], float]] = {}
        for figure in group["figures"]:
            by_line = asked.setdefault((figure["method"], figure["ratio"]), {})
            by_line[figure["task"], figure["metric"]] = figure["value"]
        dense = asked.get(("none", 0), {})
        return Published(dense, asked.get((method, ratio), {}), group["source"])
    return Published()
