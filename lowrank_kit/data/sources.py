"""Three sources of rows behind one interface: packaged with the toolkit, a local folder of JSONL, the hub.

The user names the source; a set that it lacks is an error that names the others, never a silent fall-back.
Columns are those of the set on the hub, whatever the source.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import datasets

from lowrank_kit.assets import CATALOGUE, is_present, require
from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean

SourceKind = Literal["packaged", "local", "hub"]
Row = dict[str, Any]

RESPLIT_NOTE = "re-split of the GLUE dev set (75% train, 25% validation): not comparable with published figures"


@dataclass(frozen=True)
class DatasetRef:
    """One set: ``name`` here and in file paths ("glue/rte", "text/wikipedia"), and where the hub has it."""

    name: str
    hub_path: str | None = None
    hub_name: str | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of one split, with what a manifest must say about them.

    ``sha256`` is over the rows' canonical JSON in order: equal rows have equal hashes whatever their source.
    """

    dataset: datasets.Dataset
    source: str
    note: str
    sha256: str


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """Return the splits of a set, sorted; none where the source lacks the set."""

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """Return one split; raises `ConfigError` saying what was looked for and what there is."""


class PackagedSource:
    """Rows and running text from the assets. GLUE has development sets only, re-split by `RESPLIT_NOTE`."""

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`; a set's training rows count only where that asset was fetched."""
        if ref.name.startswith("text/"):
            return _splits(require("running_text") / ref.name)
        found = set(_splits(require("benchmark_rows") / ref.name))
        if ref.name.startswith("glue/"):
            return ("train", "validation") if found else ()
        if is_present("training_rows"):
            found |= set(_splits(require("training_rows") / ref.name))
        return tuple(sorted(found))

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`; `LowRankKitError` also where the asset was not fetched."""
        is_glue = ref.name.startswith("glue/")
        if ref.name.startswith("text/"):
            asset = "running_text"
        else:
            asset = "training_rows" if split == "train" and not is_glue else "benchmark_rows"
        file = require(asset) / ref.name / f"{'validation' if is_glue else split}.jsonl"
        if not file.is_file() or split not in self.splits(ref):
            present = [name for name, entry in CATALOGUE.items() if entry.kind == "rows" and is_present(name)]
            sets = {name for entry in present for name in _sets(require(entry))}
            raise _missing(ref, split, file, self.splits(ref), sets, "data=local or data=hub")
        source = f"packaged: {CATALOGUE[asset].package} {CATALOGUE[asset].version}"
        rows = read_jsonl(file)
        return _rows(_resplit(rows)[split], source, RESPLIT_NOTE) if is_glue else _rows(rows, source)


@dataclass(frozen=True)
class LocalSource:
    """JSONL files of the user's own: ``<root>/<name>/<split>.jsonl``."""

    root: Path

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`."""
        return _splits(self.root / ref.name)

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`."""
        file = self.root / ref.name / f"{split}.jsonl"
        if not file.is_file():
            others = "data=packaged or data=hub"
            raise _missing(ref, split, file, self.splits(ref), _sets(self.root), others)
        return _rows(read_jsonl(file), f"local: {ref.name}/{split}.jsonl")


@dataclass(frozen=True)
class HubSource:
    """The Hugging Face hub, through `datasets` and its cache."""

    revision: str | None = None

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`; asks the hub."""
        path = self._path(ref)
        try:
            return tuple(sorted(datasets.get_dataset_split_names(path, ref.hub_name, revision=self.revision)))
        except (OSError, ValueError) as error:
            raise self._failure(ref, error) from error

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`; `ConfigError` for a set that has no place on the hub."""
        path = self._path(ref)
        try:
            dataset = datasets.load_dataset(path, ref.hub_name, split=split, revision=self.revision)
        except (OSError, ValueError) as error:
            raise self._failure(ref, error, split) from error
        name = f"/{ref.hub_name}" if ref.hub_name else ""
        return Rows(dataset, f"hub: {path}{name}@{self.revision or 'main'}", "", content_hash(dataset))

    def _path(self, ref: DatasetRef) -> str:
        if ref.hub_path is None:
            raise ConfigError(f"'{ref.name}' has no place on the hub: use data=packaged or data=local")
        return ref.hub_path

    def _failure(self, ref: DatasetRef, error: Exception, split: str | None = None) -> LowRankKitError:
        what = f"split '{split}' of '{ref.name}'" if split else f"'{ref.name}'"
        where = " ".join(filter(None, (ref.hub_path, ref.hub_name, self.revision)))
        return LowRankKitError(
            f"the hub did not deliver {what} ({where}): {error}\n"
            "Without a network: data=packaged, or data=local with data.root=DIR holding "
            f"{ref.name}/{split or 'SPLIT'}.jsonl"
        )


def open_source(kind: SourceKind, root: str | Path | None = None, revision: str | None = None) -> Source:
    """Return the source of this kind; ``root`` is for ``local``, ``revision`` for ``hub``.

    Raises `ConfigError` for an unknown kind and for a root that is absent or no folder.
    """
    if kind == "packaged":
        return PackagedSource()
    if kind == "hub":
        return HubSource(revision)
    if kind != "local":
        raise ConfigError(f"there is no data source '{kind}'{did_you_mean(kind, ('packaged', 'local', 'hub'))}")
    if root is None:
        raise ConfigError("data=local needs data.root=DIR, a folder holding <task>/<split>.jsonl")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.root: there is no folder '{root}'")
    return LocalSource(folder)


def has(source: Source, ref: DatasetRef, splits: Iterable[str]) -> bool:
    """Whether a source has all these splits of a set; the hub, which is not asked, is taken to have them."""
    return isinstance(source, HubSource) or set(splits) <= set(source.splits(ref))


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 of the rows' canonical JSON, one a line."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row) + b"\n")
    return digest.hexdigest()


def read_jsonl(file: Path) -> list[Row]:
    """Read one JSON object a line; raises `LowRankKitError` with file and line number where one is broken."""
    rows: list[Row] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise LowRankKitError(f"{file}, line {number}: not a JSON object: {error}") from error
    return rows


def _canonical(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _resplit(rows: list[Row]) -> dict[str, list[Row]]:
    # The order by hash is random with respect to content and the same on every machine.
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(_canonical(row)).digest())
    cut = len(shuffled) * 3 // 4
    return {"train": shuffled[:cut], "validation": shuffled[cut:]}


def _rows(rows: list[Row], source: str, note: str = "") -> Rows:
    dataset = datasets.Dataset.from_list(rows)
    return Rows(dataset, source, note, content_hash(dataset))


def _splits(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in folder.glob("*.jsonl")))


def _sets(root: Path) -> set[str]:
    return {file.parent.relative_to(root).as_posix() for file in root.rglob("*.jsonl")} - {"."}


def _missing(
    ref: DatasetRef, split: str, file: Path, splits: Iterable[str], sets: Iterable[str], others: str
) -> ConfigError:
    here = ", ".join(splits)
    there_is = f"it has the splits {here}" if here else f"sets here: {', '.join(sorted(sets)) or 'none'}"
    return ConfigError(f"no split '{split}' of '{ref.name}': looked for {file}; {there_is}. Other sources: {others}")
