"""A block remover that looks at nothing: the last blocks go."""

from lowrank_kit.compressors.compressor import Compressor
from lowrank_kit.models.blocks import block_sizes, fewest_blocks, ranks_with
from lowrank_kit.models.depth import drop_blocks
from lowrank_kit.plan import Plan


class DropLast(Compressor):
    """Drops as few of the last blocks as reach the ratio."""

    def check(self, layout):
        """Raise `ConfigError` where all blocks would have to go."""
        fewest_blocks(layout, self.budget(layout))

    def plan(self, statistics, context):
        """See `Compressor`."""
        layout, sizes = context.layout, block_sizes(context.layout)
        kept = tuple(range(len(sizes) - fewest_blocks(layout, self.budget(layout))))
        return Plan(self.name, ranks_with(layout, kept), kept, sum(sizes), sum(sizes[: len(kept)]))

    def apply(self, plan, statistics, context):
        """See `Compressor`."""
        drop_blocks(context.model, context.layout, plan.kept_blocks)
        return context.model
