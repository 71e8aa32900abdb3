"""What a compressed model is made of. Copied whole into every checkpoint, as one file.

A file here imports torch, transformers and its neighbours, and no two of them use a name for different things.
"""

import ast
from pathlib import Path

from lowrank_kit.models.portable import codes, entries, form, linears, lowrank_model, packed_experts, parallel, sliced
from lowrank_kit.models.portable.codes import RoundedLinear
from lowrank_kit.models.portable.linears import LowRankLinear, PivotLinear
from lowrank_kit.models.portable.lowrank_model import LowRankModel, derive_classes
from lowrank_kit.models.portable.packed_experts import Expert, ListedExperts, is_transposed
from lowrank_kit.models.portable.sliced import SlicedLayer, add_shortcuts

__all__ = [
    "Expert",
    "ListedExperts",
    "LowRankLinear",
    "LowRankModel",
    "PivotLinear",
    "RoundedLinear",
    "SlicedLayer",
    "add_shortcuts",
    "derive_classes",
    "is_transposed",
    "source",
]

_TITLE = "The model classes of this compressed checkpoint, by lowrank_kit. Imports torch and transformers only."
_PARTS = (linears, codes, packed_experts, sliced, entries, parallel, form, lowrank_model)


def source() -> str:
    """All files here as one: what they import from elsewhere, then the rest of each in turn."""
    imports: set[str] = {"import transformers"}
    bodies = []
    for part in _PARTS:
        text = Path(str(part.__file__)).read_text("utf-8")
        found = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports |= {ast.unparse(node) for node in found if not getattr(node, "module", "").startswith(__name__)}
        bodies.append("".join(text.splitlines(keepends=True)[max(node.end_lineno or 0 for node in found) :]).strip())
    return "\n\n\n".join([f'"""{_TITLE}"""\n\n' + "\n".join(sorted(imports)), *bodies]) + "\n"
