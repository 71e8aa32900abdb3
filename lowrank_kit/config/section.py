"""What every part of the configuration is made of."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Bos = Literal["auto", "always", "never"]
"""Whether BOS begins a text: as the model's own tokenizer does it, or in any case, or not at all."""


class Section(BaseModel):
    """One part of the configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
