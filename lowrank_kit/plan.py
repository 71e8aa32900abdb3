"""What every method decides: the plan."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """A method's global decision, plain JSON: the rank of every matrix and what that costs in parameters.

    ``parameters_before`` counts the model's block linears; ``parameters_after`` those and the adapter's, or what
    compression leaves of them. A compressor's matrix at rank min(out, in) is left dense, one at rank 0 is gone.
    ``kept`` says what is left where it is not the leading part: singular components, heads or channels, by name.
    ``trained_parameters`` counts what training changes of the block linears or adds to them, without a new head.
    ``starved`` are matrices left dense because their expert saw too few calibration tokens: how many. ``bits`` are
    those of the matrices that are rounded, as they are or as factors. Where any may be, bytes are counted too: of the
    block linears' weights, as they lie in a file.
    """

    method: str
    ranks: dict[str, int]
    kept_blocks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    scores: dict[str, float] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    trained_parameters: int = 0
    starved: dict[str, int] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def as_json(self) -> dict[str, Any]:
        """The fields by name; the last ones only where they say something, so that other plans are what they were."""
        seldom = ("starved", "bits", "bytes_before", "bytes_after")
        return {name: value for name, value in asdict(self).items() if value or name not in seldom}
