"""How a matrix is cut to a rank: each truncation is a metric, and the best approximation in it."""

from typing import Annotated

from pydantic import Field

from lowrank_kit.truncation.activations import Optimal
from lowrank_kit.truncation.joint import Joint
from lowrank_kit.truncation.two_sided import TwoSided
from lowrank_kit.truncation.weights import Fisher, Plain, Scaled

AnyTruncation = Annotated[Plain | Fisher | Scaled | Optimal | TwoSided | Joint, Field(discriminator="kind")]
"""A truncation chosen by `kind`."""
