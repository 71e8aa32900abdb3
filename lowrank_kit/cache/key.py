"""`StatisticsKey`: everything that a number kept on disk was read from."""

import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowrank_kit.deferred import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from lowrank_kit.models.fingerprint import Reads, fingerprint
from lowrank_kit.models.layout import ModelLayout

Maker = Callable[..., Any]
"""A class or function that makes a number."""

VERSIONS = {name: version(name) for name in ("torch", "transformers")}

# Settings on which no number depends.
BOOKKEEPING = {"architectures", "dtype", "transformers_version", "use_cache"}
# Settings of heads: the activations of the blocks do not depend on them.
OF_THE_HEAD = {"classifier_dropout", "id2label", "label2id", "problem_type"}

PROCESS = uuid.uuid4().hex
"""Stands for source that cannot be read: only this process knows what it is."""

# Their versions say which source they have.
VERSIONED = {*sys.stdlib_module_names, "peft", "pydantic", "torch", "transformers"}


@dataclass(frozen=True)
class StatisticsKey:
    """What a number kept on disk was read from. Two numbers share a place exactly when all of this is equal.

    Attributes:
        model: `fingerprint` of the weights that ``reads`` names.
        reads: the blocks alone, or the loss, and with it head and pooler.
        architecture: the model's class, that of the base model where only the blocks are read.
        config: the model's settings on which the numbers depend, with defaults.
        dtype, device, attention: how it is computed: the weights' dtype, the kind of device, the attention
            implementation.
        text: content hash of the tokens (or rows) in their order.
        batch_size: sequences a batch.
        request: which quantity, with its settings, JSON-serialisable.
        maker: `maker_of` the classes that make the number.
        linears: names of the linears that are read.
        tokenizer: `tokenizer_fingerprint`, where text is turned into tokens while the number is made.
        versions: of the libraries that run the model.
    """

    model: str
    reads: Reads
    architecture: str
    config: Mapping[str, Any]
    dtype: str
    device: str
    attention: str
    text: str
    batch_size: int
    request: Mapping[str, Any]
    maker: str
    linears: tuple[str, ...] = ()
    tokenizer: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: VERSIONS)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layout: ModelLayout,
        *,
        reads: Reads,
        text: str,
        batch_size: int,
        request: Mapping[str, Any],
        makers: Iterable[Maker] = (),
        linears: Iterable[str] = (),
    ) -> "StatisticsKey":
        """The key of what is read from this model; reads every weight once. See the class for the arguments."""
        read = model.base_model if reads == "blocks" else model
        return cls(
            model=fingerprint(model, layout, reads),
            reads=reads,
            architecture=_qualified(type(read)),
            config=_settings(model.config, BOOKKEEPING | (OF_THE_HEAD if reads == "blocks" else set())),
            dtype=str(model.dtype),
            device=model.device.type,
            attention=str(model.config._attn_implementation),
            text=text,
            batch_size=batch_size,
            request=request,
            maker=maker_of(*makers),
            linears=tuple(sorted(linears)),
        )

    @property
    def description(self) -> str:
        """The key as JSON."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @property
    def digest(self) -> str:
        """32 hex digits that stand for the key."""
        return hashlib.sha256(self.description.encode()).hexdigest()[:32]


def maker_of(*makers: Maker) -> str:
    """Name what makes a number, classes or functions, and hash the source on which it depends (32 hex digits).

    The source is all of this package, and all of every package outside it that defines one of the makers or a base
    class of theirs. What has no source file (typed into a notebook) is known to its own process alone.
    """
    defined = {part for maker in makers for part in (maker.__mro__ if isinstance(maker, type) else (maker,))}
    outside = {_top(part) for part in defined} - VERSIONED - {_top(StatisticsKey)}
    digest = hashlib.sha256(_own_source().encode())
    for name in sorted(outside):
        digest.update(_source_digest(name).encode())
    return " ".join([*(_qualified(maker) for maker in makers), digest.hexdigest()[:32]])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash (32 hex digits) of what turns text into tokens and back: rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {
        "class": _qualified(type(tokenizer)),
        "rules": tokenizer.get_vocab() if backend is None else json.loads(backend.to_str()),
        "added": {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()},
        # What the files of the tokenizer state: special tokens, sides, whether BOS and EOS are added.
        "settings": {k: v for k, v in tokenizer.init_kwargs.items() if k not in ("name_or_path", "vocab_file")},
        "special": tokenizer.special_tokens_map,
        "padding": [tokenizer.padding_side, tokenizer.truncation_side],
        "ends": [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _settings(config: PretrainedConfig, left_out: set[str]) -> dict[str, Any]:
    """What the numbers depend on beside weights and tokens: windows, activation functions, rotary bases."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {name: v for name, v in settings.items() if name not in left_out and not name.startswith("_")}


def _qualified(cls: Maker) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _top(cls: Maker) -> str:
    return cls.__module__.partition(".")[0]


@cache
def _own_source() -> str:
    return _source_digest(_top(StatisticsKey))


def _source_digest(package: str) -> str:
    """Hash every Python file of a loaded package, or the one file of a module, by name."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return PROCESS
    path, digest = Path(file), hashlib.sha256()
    for part in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
        digest.update(f"{part.relative_to(path.parent)} {part.stat().st_size}\n".encode())
        digest.update(part.read_bytes())
    return digest.hexdigest()
