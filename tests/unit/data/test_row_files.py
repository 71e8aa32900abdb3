import json
import re

import pytest

from lowrank_kit.data.row_files import read_jsonl, read_text
from lowrank_kit.data.sources import DatasetRef, open_source
from lowrank_kit.errors import LowRankKitError

ROW = '{"text": "a", "label": 1}'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (f"{ROW}\n[1, 2]\n".encode(), "line 2: [1, 2] is no JSON object: write one object a line"),
        (f'{ROW}\n{ROW}\n"a"'.encode(), 'line 3: "a" is no JSON object: write one object a line'),
        (b"null", "line 1: null is no JSON object"),
        (f"{ROW}\n\n{ROW}".encode(), "line 2: not a JSON object"),
        (b"[" * 100_000, "line 1: not a JSON object"),
        (f'{ROW}\n{{"text": "caf\xe9"}}'.encode("latin-1"), "line 2: the file is not UTF-8 (byte 0xe9)"),
        (f"{ROW}\n{ROW}".encode("utf-16"), "line 1: the file is not UTF-8 (it begins as UTF-16 does)"),
        (b'{"text": "\\ud800"}', "line 1: column 'text' holds half a surrogate pair"),
        (f'{{"label": {2**70}}}'.encode(), "line 1: column 'label' holds 1180591620717411303424, more than 64 bits"),
        (f'{ROW}\n{{"text": "b", "label": "x"}}'.encode(), "line 2: column 'label' holds \"x\", and before it 1"),
        (f'{ROW}\n{{"text": [1], "label": 2}}'.encode(), "line 2: column 'text' holds [1], and before it \"a\""),
    ],
)
def test_a_bad_file_is_answered_with_file_line_and_remedy(tmp_path, raw, message):
    file = tmp_path / "mine/train.jsonl"
    file.parent.mkdir()
    file.write_bytes(raw)
    with pytest.raises(LowRankKitError, match=re.escape(f"{file}, {message}")):
        open_source("local", tmp_path).load(DatasetRef("mine"), "train")


@pytest.mark.parametrize(("encoding", "remedy"), [("latin-1", "iconv -f LATIN1"), ("utf-16", "iconv -f UTF-16")])
def test_running_text_in_another_encoding_names_its_line_and_the_command_that_mends_it(tmp_path, encoding, remedy):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/test.txt").write_bytes("one\ntwo\ncaf\xe9\n".encode(encoding))
    line = 3 if encoding == "latin-1" else 1
    with pytest.raises(LowRankKitError, match=rf"mine/test\.txt, line {line}: .* {remedy} -t UTF-8"):
        open_source("local", tmp_path).load(DatasetRef("text/mine"), "test")


def test_what_windows_writes_is_read(tmp_path):
    """A byte order mark and carriage returns; line ends of Unicode inside a string are none."""
    file = tmp_path / "x.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "caf\xe9"}]
    file.write_bytes(b"\xef\xbb\xbf" + "".join(f"{json.dumps(row, ensure_ascii=False)}\r\n" for row in rows).encode())
    assert read_jsonl(file) == rows
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(file) == "one\ntwo"


def test_numbers_of_two_kinds_and_absent_values_are_one_column(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text('{"a": null, "b": 1}\n{"a": "x", "b": 2.5}\n')
    rows = open_source("local", tmp_path).load(DatasetRef("mine"), "train")
    assert rows.dataset[:] == {"a": [None, "x"], "b": [1.0, 2.5]}
    assert rows.place(1) == f"{tmp_path}/mine/train.jsonl, line 2"
