"""Full fine-tuning: every weight learns."""

from collections.abc import Mapping

from lowrank_kit.adapters.adapter import FineTuning
from lowrank_kit.calibration.statistics import Kept
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.layout import ModelLayout
from lowrank_kit.plan import Plan


class FullFineTuning(FineTuning):
    """Train the model itself; with `roles`, only the linears of these roles.

    There is no rank and no adapter: what a run leaves is a checkpoint of transformers.
    """

    def check(self, layout: ModelLayout) -> None:
        """Raise `ConfigError` for a role that the model does not have, and for quantised weights."""
        if quantised := [ref for ref in self.targets(layout) if ref.quantised]:
            raise ConfigError(
                f"{quantised[0].name} is quantised, so it cannot learn: load the model unquantised or choose an adapter"
            )

    def plan(self, layout: ModelLayout, kept: Mapping[str, Kept]) -> Plan:
        """No matrix has a rank; ``trained_parameters`` counts the linears in the blocks."""
        trained = sum(ref.parameters for ref in self.targets(layout))
        return self._plan_with(layout, {}, trained=trained)
