"""A file is found by its name: no two stand for different subjects."""

from collections import Counter
from pathlib import Path

import lowrank_kit

# The parts of one method may all bear its name.
CHOICES = {"adapters", "allocations", "compressors", "corrections", "storages", "structures", "truncations"}


def test_no_two_files_of_the_package_have_one_name():
    root = Path(lowrank_kit.__file__).parent
    files = [file.relative_to(root) for file in root.rglob("*.py") if not file.stem.startswith("__")]
    shared = {name for name, count in Counter(file.name for file in files).items() if count > 1}
    assert [str(file) for file in files if file.name in shared and file.parts[0] not in CHOICES] == []
