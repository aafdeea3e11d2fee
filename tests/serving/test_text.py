"""Tokens as text, piece by piece: nothing is lost or said twice, and no answer is decoded over and over."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models

pytest.importorskip("fastapi")

from peftops.serving.http.text import TextStream

PLAIN = models.tokenizer()
SIGN = "\ufffd"  # what a model may well say, and what bytes look like that are no whole character
words = st.lists(st.sampled_from(["a", "ä", "€", "😀", SIGN, SIGN * 30, " "]), max_size=8).map("".join)
tokens = words.map(lambda text: PLAIN(text)["input_ids"])
bits = st.lists(st.integers(3, 258), max_size=40)  # bytes, as they come


class Counting:
    """How many tokens are decoded at once, at most."""

    most = 0

    def decode(self, ids, **options):
        self.most = max(self.most, len(ids))
        return PLAIN.decode(ids, **options)


@given(ids=st.lists(st.one_of(tokens, bits), max_size=5))
def test_pieces_are_the_text(ids):
    ids = [*itertools.chain.from_iterable(ids)]
    counting = Counting()
    stream = TextStream(counting, [])
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == PLAIN.decode(ids, skip_special_tokens=True)
    assert counting.most <= 2 * 16 + 1


@given(text=words, at=st.integers(0, 20), length=st.integers(1, 5), others=st.lists(words, max_size=2))
def test_a_stop_string_ends_it_wherever_tokens_end(text, at, length, others):
    stop = text[at : at + length]
    stops = [s for s in (stop, *others) if s]
    found = [text.index(s) for s in stops if s in text]
    stream, pieces = TextStream(PLAIN, stops), []
    for token in PLAIN(text)["input_ids"]:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    got = "".join([*pieces, stream.end()])
    assert stream.stopped == bool(found) and (got == text if not found else text.startswith(got))
    assert not any(s in got for s in stops)


def test_long_stop_strings_cost_little():
    """Sixteen of a thousand characters are what a client may send; the thread that spells is everybody's."""
    stream = TextStream(PLAIN, [chr(97 + i) * 1000 for i in range(16)])
    ids = PLAIN("0123456789" * 20)["input_ids"]
    begin = time.process_time()
    for token in ids:
        stream.add(token)
    assert time.process_time() - begin < 0.2


@pytest.mark.parametrize("sign", [SIGN, "é" * 2])
def test_what_looks_unfinished_comes_all_the_same(sign):
    stream, ids = TextStream(PLAIN), PLAIN(sign * 100)["input_ids"]
    assert len("".join(stream.add(token) for token in ids)) > 95
