"""Files that another process makes or takes away between two looks at them: a lock, an entry of the cache."""

from pathlib import Path

from lowrank_kit.files import read_as, read_json


class Changing(type(Path())):
    """A path whose file appears or disappears directly after somebody has asked for it."""

    def is_file(self) -> bool:
        there = super().is_file()
        if there:
            self.unlink()
        else:
            self.write_text("[1]")
        return there


def test_a_file_that_is_taken_away_is_one_that_is_not_there(tmp_path):
    for read in (lambda file: read_as(file, list[int]), read_json):
        file = Changing(tmp_path / "lock.json")
        file.write_text("[1]")
        assert read(file) is None
        assert not file.exists()


def test_a_file_that_appears_too_late_is_one_that_is_not_there(tmp_path):
    file = Changing(tmp_path / "lock.json")
    assert read_as(file, list[int]) is None
    assert file.read_text() == "[1]"
