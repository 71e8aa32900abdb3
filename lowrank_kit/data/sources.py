"""Three sources of rows behind one interface: packaged with the toolkit, a local folder of files, the hub.

The user names the source; a set that it lacks is an error that names the others, never a silent fall-back.
Columns are those of the set on the hub, whatever the source.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import datasets

from lowrank_kit.assets import CATALOGUE, is_present, require
from lowrank_kit.data.row_files import Row, read_jsonl, read_text, table
from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean

SourceKind = Literal["packaged", "local", "hub"]

TEXT = "text/"
TEXT_RESPLIT_NOTE = "re-split of the packaged paragraphs, in their order (first 75% validation, last 25% test)"
RESPLIT_NOTE = "re-split of the GLUE dev set (75% train, 25% validation): not comparable with published figures"


@dataclass(frozen=True)
class DatasetRef:
    """One set: ``name`` here and in file paths ("glue/rte", "text/wikipedia"), and where the hub has it.

    ``hub_files`` are the files of its splits, where not all that the hub has are wanted; ``hub_revision`` is where
    they lie, unless the user names another; ``max_rows`` are read of every split.
    """

    name: str
    hub_path: str | None = None
    hub_name: str | None = None
    hub_files: Mapping[str, str] = field(default_factory=dict)
    hub_revision: str | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of one split, with what a manifest must say about them.

    ``sha256`` is over the rows' canonical JSON in order: equal rows have equal hashes whatever their source. ``file``
    holds the rows, one a line in their order; None where no file does.
    """

    dataset: datasets.Dataset
    source: str
    note: str
    sha256: str
    file: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What a manifest says of these rows."""
        return {"source": self.source, "note": self.note, "sha256": self.sha256, "rows": len(self.dataset)}

    def place(self, number: int) -> str:
        """Where the row of this number, counted from 0, is found: for messages."""
        return f"row {number} of {self.source}" if self.file is None else f"{self.file}, line {number + 1}"


@runtime_checkable
class Source(Protocol):
    """Where rows come from; ``kind`` is what `data` calls it."""

    kind: ClassVar[SourceKind]

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """Return the splits of a set, sorted; none where the source lacks the set."""

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """Return one split; raises `ConfigError` saying what was looked for and what there is."""


class PackagedSource:
    """Rows and running text from the assets.

    GLUE has development sets only, re-split by `RESPLIT_NOTE`; running text is one file a set, re-split by
    `TEXT_RESPLIT_NOTE`: in one piece each, so that no article is on both sides but the one at the cut.
    """

    kind: ClassVar[SourceKind] = "packaged"

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`; a set's training rows count only where that asset was fetched."""
        if ref.name.startswith(TEXT):
            return ("test", "validation") if _splits(require("running_text") / ref.name) else ()
        found = set(_splits(require("benchmark_rows") / ref.name))
        if ref.name.startswith("glue/"):
            return ("train", "validation") if found else ()
        if is_present("training_rows"):
            found |= set(_splits(require("training_rows") / ref.name))
        return tuple(sorted(found))

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`; `LowRankKitError` also where the asset was not fetched."""
        is_glue, is_text = ref.name.startswith("glue/"), ref.name.startswith(TEXT)
        if is_text:
            asset, stored = "running_text", "train"
        elif is_glue:
            asset, stored = "benchmark_rows", "validation"
        else:
            asset, stored = "training_rows" if split == "train" else "benchmark_rows", split
        file = require(asset) / ref.name / f"{stored}.jsonl"
        if not file.is_file() or split not in self.splits(ref):
            present = [name for name, entry in CATALOGUE.items() if entry.kind == "rows" and is_present(name)]
            sets = {name for entry in present for name in _sets(require(entry))}
            raise _missing(ref, split, file, self.splits(ref), sets, "data=local or data=hub")
        source = f"packaged: {CATALOGUE[asset].package} {CATALOGUE[asset].version}"
        rows = read_jsonl(file)
        if is_text:
            cut = len(rows) * 3 // 4
            part = rows[:cut] if split == "validation" else rows[cut:]
            return _rows(part[: ref.max_rows], source, file, TEXT_RESPLIT_NOTE, in_order=False)
        if is_glue:
            return _rows(_resplit(rows)[split][: ref.max_rows], source, file, RESPLIT_NOTE, in_order=False)
        return _rows(rows[: ref.max_rows], source, file)


@dataclass(frozen=True)
class LocalSource:
    """Files of the user's own: ``<root>/<name>/<split>.jsonl``; running text may lie in ``<split>.txt``, too.

    The prefix ``text/`` of a running text's name may be left out of its path.
    """

    kind: ClassVar[SourceKind] = "local"

    root: Path

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`."""
        return tuple(sorted({file.stem for file in self._files(ref, "*")}))

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`; a ``.txt`` file is one row."""
        file = next(self._files(ref, split), None)
        if file is None:
            others = "data=packaged or data=hub"
            wanted = self.root / ref.name / f"{split}.jsonl"
            raise _missing(ref, split, wanted, self.splits(ref), _sets(self.root), others)
        rows = read_jsonl(file) if file.suffix == ".jsonl" else [{"text": read_text(file)}]
        return _rows(rows[: ref.max_rows], f"local: {file.relative_to(self.root).as_posix()}", file)

    def _files(self, ref: DatasetRef, stem: str) -> Iterator[Path]:
        is_text = ref.name.startswith(TEXT)
        for folder in (ref.name, ref.name.removeprefix(TEXT)) if is_text else (ref.name,):
            for suffix in (".jsonl", ".txt") if is_text else (".jsonl",):
                # Of a pipe or a device the end may never come.
                yield from filter(Path.is_file, (self.root / folder).glob(f"{stem}{suffix}"))


@dataclass(frozen=True)
class HubSource:
    """The Hugging Face hub, through `datasets` and its cache."""

    kind: ClassVar[SourceKind] = "hub"

    revision: str | None = None

    def splits(self, ref: DatasetRef) -> tuple[str, ...]:
        """As in `Source`; asks the hub."""
        path = self._path(ref)
        if ref.hub_files:
            return tuple(sorted(ref.hub_files))
        try:
            return tuple(sorted(datasets.get_dataset_split_names(path, ref.hub_name, revision=self.revision)))
        except (OSError, ValueError) as error:
            raise self._failure(ref, error) from error

    def load(self, ref: DatasetRef, split: str) -> Rows:
        """As in `Source`; `ConfigError` for a set that has no place on the hub."""
        path, revision = self._path(ref), self.revision or ref.hub_revision
        file = ref.hub_files.get(split)
        only = {} if file is None else {"data_files": {split: file}}
        part = split if ref.max_rows is None else f"{split}[:{ref.max_rows}]"
        try:
            dataset = datasets.load_dataset(path, ref.hub_name, split=part, revision=revision, **only)
        except (OSError, ValueError) as error:
            raise self._failure(ref, error, split) from error
        where = f"/{file or ref.hub_name}" if file or ref.hub_name else ""
        return Rows(dataset, f"hub: {path}{where}@{revision or 'main'}", "", content_hash(dataset))

    def _path(self, ref: DatasetRef) -> str:
        if ref.hub_path is None:
            raise ConfigError(f"'{ref.name}' has no place on the hub: use data=packaged or data=local")
        return ref.hub_path

    def _failure(self, ref: DatasetRef, error: Exception, split: str | None = None) -> LowRankKitError:
        what = f"split '{split}' of '{ref.name}'" if split else f"'{ref.name}'"
        where = " ".join(filter(None, (ref.hub_path, ref.hub_name, self.revision)))
        asset = "running_text" if ref.name.startswith(TEXT) else "benchmark_rows"
        not_packaged = is_present(asset) and not PackagedSource().splits(ref)
        packaged = "" if not_packaged else "data=packaged, or "
        return LowRankKitError(
            f"the hub did not deliver {what} ({where}): {error}\n"
            f"Without a network: {packaged}data=local with data.root=DIR holding {ref.name}/{split or 'SPLIT'}.jsonl"
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
    """Whether a source has all these splits of a set; the hub, which is not asked, has what has a place there."""
    if source.kind == "hub":
        return ref.hub_path is not None
    return set(splits) <= set(source.splits(ref))


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 of the rows' canonical JSON, one a line."""
    digest = hashlib.sha256()
    for row in _rows_of(rows) if isinstance(rows, datasets.Dataset) else rows:
        digest.update(_canonical(row) + b"\n")
    return digest.hexdigest()


def _rows_of(dataset: datasets.Dataset) -> Iterator[Row]:
    # A thousand at a time: row by row takes ten times as long.
    for batch in dataset.iter(1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _canonical(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _resplit(rows: list[Row]) -> dict[str, list[Row]]:
    # The order by hash is random with respect to content and the same on every machine.
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(_canonical(row)).digest())
    cut = len(shuffled) * 3 // 4
    return {"train": shuffled[:cut], "validation": shuffled[cut:]}


def _rows(rows: list[Row], source: str, file: Path, note: str = "", in_order: bool = True) -> Rows:
    dataset = table(rows, file, 1 if in_order else None)
    return Rows(dataset, source, note, content_hash(dataset), file if in_order else None)


def _splits(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in folder.glob("*.jsonl")))


def _sets(root: Path) -> set[str]:
    files = (file for suffix in ("jsonl", "txt") for file in root.rglob(f"*.{suffix}"))
    return {file.parent.relative_to(root).as_posix() for file in files} - {"."}


def _missing(
    ref: DatasetRef, split: str, file: Path, splits: Iterable[str], sets: Iterable[str], others: str
) -> ConfigError:
    here = ", ".join(splits)
    there_is = f"it has the splits {here}" if here else f"sets here: {', '.join(sorted(sets)) or 'none'}"
    return ConfigError(f"no split '{split}' of '{ref.name}': looked for {file}; {there_is}. Other sources: {others}")
