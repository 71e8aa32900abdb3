"""Hidden states that a decoder is taken to have returned."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class KnownStates(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder returns, the last hidden states alone; what its family returns beside them is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
