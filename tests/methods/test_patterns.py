"""Patterns for layers mean what Python's do, and none takes long."""

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import models
import peftops
from peftops.attaching.config import by_pattern
from peftops.attaching.patterns import matches_whole

atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c0-9]", r"\d", r"\w", "x", "^", "$", r"\A", r"\Z"])


def larger(inner):
    join = lambda parts: "".join(parts)
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?"])).map(lambda p: f"({p[0]}){p[1]}"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda p: f"{p[0]}{p[1]})"),
        st.sampled_from(["(?<=a)", "(?<!b)", "(?<=a.)"]),
    )


patterns = st.recursive(atoms, larger, max_leaves=6)


@settings(max_examples=400, deadline=None)
@given(pattern=patterns, name=st.text("abx.1", max_size=7))
def test_they_mean_what_pythons_do(pattern, name):
    try:
        compiled = re.compile(pattern)
    except re.error:
        assume(False)
    assert matches_whole(pattern, name) == (compiled.fullmatch(name) is not None)


SLOW = [
    "(.*)*(.*)*(.*)*=",
    "(a|a)*=",
    "(a?){60}a{60}",
    ".*" * 40 + "=",
    "((a{1,500}){1,500}){1,500}=",
    "(a|.|[a-z])*=",
    "(.*a){40}=",
    "(?=(.*)*=)",
    "(){4000000000}(a*)*=",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_none_takes_long(pattern):
    start = time.perf_counter()
    assert matches_whole(pattern, "a" * 59) is False
    assert by_pattern({pattern: 1}, "model.layers.0." + "a" * 40, 2) == 2
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("(", "is not a regular expression: missing"),
        (r"(a)\1", "groupref is not supported"),
        ("(?i)a", "flags are not supported"),
        ("(?i:a)", "a flag is not supported"),
        (r"\ba", "at_boundary is not supported"),
    ],
)
def test_what_is_no_pattern_gets_a_sentence(pattern, sentence):
    with pytest.raises(ValueError, match=sentence):
        matches_whole(pattern, "a")
    with pytest.raises(ValueError, match=f"{sentence}|is not a regular expression"):
        by_pattern({pattern: 1}, "a", 2)


def test_a_pattern_means_the_end_of_a_name_from_a_dot_on():
    """As HF PEFT reads them: neither a part in the middle, nor the end of a word."""
    of = lambda key, layer: by_pattern({key: 1}, layer, 0)
    assert of("q_proj", "model.layers.0.q_proj") == of("q_proj", "q_proj") == of("0.q_proj", "layers.0.q_proj") == 1
    assert of("proj", "layers.0.q_proj") == of("layers", "layers.0.q_proj") == of("q_proj", "q_proj.base") == 0
    assert of("q|k", "layers.q") == of("q|k", "layers.k") == 1 and of("q|k", "layers.xk") == 0
    assert by_pattern({"q": 1, ".*": 2}, "layers.q", 0) == 1 and by_pattern({".*": 2, "q": 1}, "layers.q", 0) == 2


def test_targets_are_matched_so_too():
    with pytest.raises(ValueError, match="matches no layer"):
        peftops.attach(models.llama(), peftops.LoRAConfig(target="(.*)*(.*)*(.*)*="))
    with pytest.raises(ValueError, match=r"target '\(' is not a regular expression"):
        peftops.attach(models.llama(), peftops.LoRAConfig(target="("))
