"""Strict JSON: one object, each key once, numbers that JSON has, text that is Unicode."""

import json

import pytest

from runtime.console import UserError
from runtime.strict_json import MAX_DEPTH, read_json, shorten, strict_json


def nested(depth, begin=b'{"a":', end=b"}"):
    return begin * depth + b"1" + end * depth


def test_a_proper_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true, "ç"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, True, "ç"]}


ANYTHING_ELSE = [
    (b"", "not valid JSON"), (b"[]", "a JSON list, expected an object"), (b"1", "a JSON int"),
    (b"\xff", "not valid JSON"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"b": {"a": 1, "a": 1}}', "duplicate key 'a'"), (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b'{"a": NaN}', "NaN is not a JSON number"), (b'{"b": -Infinity}', "-Infinity"),
    (b'{"a": 1e999}', "'1e999' is too large"), (b'{"a": -1e999}', "'-1e999' is too large"),
    (b'{"a": 0.' + b"1" * 500 + b"}", "too long for a number"),
    (b'{"a": ' + b"1" * 65 + b"}", "65 digits, expected at most 64"),
    (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits, expected at most 64"),
    (b'{"a": "\\ud800"}', "not valid JSON"), (b'{"\\udfff": 1}', "not valid JSON"),
    (nested(MAX_DEPTH + 1), "nested deeper than 64"), (nested(100_000), "nested deeper than 64"),
    (b'{"a":' + nested(MAX_DEPTH, b"[", b"]") + b"}", "nested deeper than 64"),
    (b'{"a": [' + b"[]," * (1 << 22) + b"[]]}", "more than 4,194,304 objects"),
    (b'{"a":' * 100_000, "JSON"), (b'{"a":' + b"[" * 1_000_000, "JSON")]


@pytest.mark.parametrize("text, message", ANYTHING_ELSE, ids=[x[1] for x in ANYTHING_ELSE])
def test_anything_else_is_one_line_with_the_place(text, message):
    with pytest.raises(UserError, match=message) as e:
        strict_json(text, "x.json")
    assert str(e.value).startswith("x.json: ") and "\n" not in str(e.value)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("text", [
    b'{"model_max_length": 1000000000000000019884624838656}', b'{"a": 1e308, "b": -0.0}',
    b'{"a": 1e-999}', b'{"a": "\\ud83e\\udd92"}', nested(MAX_DEPTH),
    b'{"a": 0.1000000000000000055511151231257827021181583404541015625}'])
def test_what_published_files_hold_is_read_as_pythons_reader_reads_it(text):
    assert strict_json(text, "x.json") == json.loads(text)


def test_a_long_value_is_shortened_in_a_message():
    assert shorten("a") == "'a'"
    assert len(shorten("a" * 1000)) == 80
