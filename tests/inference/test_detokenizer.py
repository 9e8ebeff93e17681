"""Text from ids: in pieces, up to stop strings, never half a character."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.tiny import bytewise_folder
from inference.detokenizer import decode_answer, decode_tail, stream_text
from inference.sampling import StoppingCriteria
from tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["sentencepiece", "bytewise"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytewise":
        return Tokenizer.open(bytewise_folder(folder, ["<s>", "</s>"]))
    tiny.write_tokenizer(folder)
    return Tokenizer.open(folder)


MIXED = st.text(st.sampled_from("Inka zi\u0301\u00e9 \u2600\U0001f600\n  '\u4e2d"), max_size=30)


@given(MIXED, MIXED)
@settings(max_examples=150, deadline=None)
def test_joined_pieces_are_the_text_and_none_ends_in_half_a_character(tokenizer, prompt, more):
    ids = tokenizer.encode(prompt)
    tokens = tokenizer.encode(prompt + more)[len(ids):]
    pieces = list(stream_text(tokenizer, ids, tokens))
    assert "".join(pieces) == tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)):]
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])
    assert all(pieces[:-1])  # nothing is printed for nothing


@given(st.text("ab\n\u4e2d", max_size=12),
       st.lists(st.text("ab\n\u4e2d", min_size=1, max_size=3), max_size=1))
@settings(max_examples=150, deadline=None)
def test_pieces_end_before_a_stop_string(tokenizer, more, strings):
    ids = tokenizer.encode("Inka")
    tokens = tokenizer.encode("Inka" + more)[len(ids):]
    text = tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)):]
    expected = text[: min((text.index(x) for x in strings if x in text), default=len(text))]
    assert "".join(stream_text(tokenizer, ids, tokens, strings)) == expected
    assert decode_answer(tokenizer, ids, tokens, strings) == expected


def test_a_stop_string_is_found_at_the_beginning_of_an_answer(tokenizer):
    """Also with its first space, which SentencePiece drops at the beginning of a text."""
    ids, prompt = tokenizer.encode("Inka zacu"), tokenizer.encode("Inka")
    stops = StoppingCriteria((), [" zacu"], partial(decode_tail, tokenizer))
    ends = [stops.finish_reason(ids[len(prompt) : n], 99)
            for n in range(len(prompt) + 1, len(ids) + 1)]
    assert ends[-1] == "stop" and not any(ends[:-1])
    without_space = tokenizer.encode("zacu")  # without one, where the tokenizer can say so
    tail = tokenizer.decode(prompt + without_space)[len("Inka"):]
    assert stops.finish_reason(without_space, 99) == ("stop" if tail == " zacu" else "")


def test_a_character_of_four_bytes_is_shown_when_its_last_byte_comes(tokenizer):
    tokens = tokenizer.encode("a\U0001f600b")
    pieces = list(stream_text(tokenizer, tokenizer.encode("Inka"), tokens))
    assert "\U0001f600" in pieces and "".join(pieces).endswith("a\U0001f600b")
    stopped = list(stream_text(tokenizer, tokenizer.encode("Inka"), tokens[:-2]))
    assert "".join(stopped).endswith("\ufffd")  # the answer ended before the character was complete
