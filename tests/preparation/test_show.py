"""Documents of a bin as text: nothing is lost where trained and untrained ids meet."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from helpers import tiny
from preparation.show import text_spans
from preparation.text import prepare_text
from tokenization.tokenizer import Tokenizer, learn

TEXTS = ["Amazi ni meza.", " two  spaces ", "🦒 n'umwana 日本", "a\nb", "", "é"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return learn(tiny.SENTENCES * 20, 400, tmp_path_factory.mktemp("tok"))


@settings(max_examples=200, deadline=None)
@given(text=st.sampled_from(TEXTS), data=st.data())
def test_spans_together_are_the_text_and_split_only_where_training_changes(tokenizer, text, data):
    ids = tokenizer.document(text)
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    spans = text_spans(tokenizer, ids, mask)
    assert "".join(span for span, _ in spans) == f"<s>{tokenizer.decode(ids)}</s>"
    assert spans[0] == ("<s>", False) and spans[-1] == ("</s>", mask[-1])
    if not any(mask):
        assert not any(is_trained for _, is_trained in spans)


def test_half_a_character_stands_in_the_span_that_completes_it(tokenizer):
    ids = tokenizer.encode("a🦒b")
    start = next(i for i in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[: i + 1]))
    mask = [i > start for i in range(len(ids))]
    spans = text_spans(tokenizer, ids, mask)
    assert spans[-1] == ("🦒b", True) and "".join(span for span, _ in spans) == "a🦒b"


def test_show_prints_text_and_with_a_flag_the_ids(tokenizer, tmp_path, capsys):
    file = tmp_path / "x.txt"
    file.write_text("Amazi 🦒 meza.\n")
    folder = Path(tokenizer.file).parent
    prepare_text([str(file)], folder, tmp_path / "bin", unit="line")
    prepare.show(prepare.Show(str(tmp_path / "bin"), str(folder)))
    printed = capsys.readouterr().out
    assert "-- document 0\n<s>Amazi 🦒 meza.</s>\n" in printed and "<0x" not in printed
    prepare.show(prepare.Show(str(tmp_path / "bin"), str(folder), ids=True))
    printed = capsys.readouterr().out
    assert "       1          '<s>'\n" in printed and "trained '<0x" in printed
