"""Strict JSON: one object, each key once, numbers that JSON has."""

import pytest

from runtime.console import UserError
from runtime.strict_json import read_json, strict_json


def test_a_proper_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true, "ç"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, True, "ç"]}


@pytest.mark.parametrize("text, message", [
    (b"", "not valid JSON"), (b"[]", "a JSON list, expected an object"),
    (b"\xff", "not valid JSON"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": NaN}', "NaN is not a JSON number"), (b'{"a": 1e999, "b": -Infinity}', "-Infinity"),
    (b'{"a":' * 100_000, "JSON")])
def test_anything_else_is_one_line_with_the_place(text, message):
    with pytest.raises(UserError, match=message) as e:
        strict_json(text, "x.json")
    assert str(e.value).startswith("x.json: ") and "\n" not in str(e.value)
