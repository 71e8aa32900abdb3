"""PiSSA (Meng et al., arXiv 2404.02948): an adapter that starts as the principal singular components of W. By PEFT."""

from typing import Any, ClassVar

from pydantic import Field

from lowrank_kit.adapters.adapter import Adapter


class Pissa(Adapter):
    """``s B A`` is the best approximation of W of its rank, and the base keeps the rest."""

    takes_from_base: ClassVar[bool] = True

    iterations: int | None = Field(default=None, ge=0)
    """Subspace iterations of a randomised SVD (16 come near the exact one); null: the exact SVD."""

    def lora_options(self) -> dict[str, Any]:
        """See `Adapter`."""
        return {"init_lora_weights": "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"}
