"""What reads token sequences: a model's tokenizer, what the model embeds, and how much it reads at once."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowrank_kit.config import Bos
from lowrank_kit.data.special_tokens import Opening, check_embedded, opening_of
from lowrank_kit.errors import ConfigError


@dataclass(frozen=True)
class Reader:
    """A model as its data see it.

    ``model`` is its configuration: the family may have a rule for BOS, and tokens without embedding are found; None:
    neither. ``name`` is for messages. ``limit`` is the user's limit in tokens; None: what the tokenizer says.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PretrainedConfig | None = None
    name: str = "the model"
    limit: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that are read at once; a huge number where nothing limits them."""
        return min(self.limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def check_length(self, key: str, length: int) -> None:
        """Raise `ConfigError` where ``key`` of the configuration asks for more tokens than are read."""
        if length > self.longest:
            raise ConfigError(f"{key}={length} is longer than the {self.longest} tokens that {self.name} reads")

    def check_embedded(self, rows: Iterable[Iterable[int]], where: str) -> None:
        """Raise `ConfigError` for token ids of ``where`` that the model has no embedding for."""
        check_embedded(rows, self.tokenizer, self.model, where)

    def opening(self, choice: Bos, key: str = "bos") -> Opening:
        """What begins every text; errors as for `opening_of`."""
        return opening_of(choice, self.tokenizer, self.model, key)
