"""Regular expressions for names of layers, matched in a short time for any pattern.

Python's own matcher backtracks, so a pattern like ``(.*)*(.*)*x`` can take it years, and an adapter's file may hold
such a pattern. This matcher does not backtrack: for each part of the pattern, in turn, it computes the set of places in
the name where the part may end. References to groups, and flags, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

Ends = Callable[[str, frozenset[int]], frozenset[int]]  # name, where a part may begin -> where it may end


def matches_whole(pattern: str, name: str) -> bool:
    """``re.fullmatch(pattern, name) is not None``.

    Raises:
        ValueError: it is not a regular expression, or it has an element that is not supported here.
    """
    return len(name) in _compiled(pattern)(name, frozenset([0]))


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Ends:
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if tree.state.flags & (re.IGNORECASE | re.MULTILINE | re.DOTALL | re.ASCII | re.LOCALE):
        raise ValueError(f"{pattern!r}: flags are not supported in patterns for layers")
    try:
        return _sequence(list(tree))
    except KeyError as error:
        raise ValueError(f"{pattern!r}: {str(error.args[0]).lower()} is not supported in patterns for layers") from None


def _sequence(items: list) -> Ends:
    parts = [_PARTS[kind](argument) for kind, argument in items]

    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        for part in parts:
            if not starts:
                break
            starts = part(name, starts)
        return starts

    return ends


def _character(test: Callable[[str], bool]) -> Ends:
    return lambda name, starts: frozenset(i + 1 for i in starts if i < len(name) and test(name[i]))


_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_NOT_WORD: r"\W",
}


def _set(items: list) -> Ends:
    def one(kind: object, argument: object) -> Callable[[str], bool]:
        if kind is sre.LITERAL:
            return lambda c: ord(c) == argument
        if kind is sre.RANGE:
            return lambda c: argument[0] <= ord(c) <= argument[1]
        category = re.compile(_CATEGORIES[argument])
        return lambda c: category.match(c) is not None

    negated = items[0][0] is sre.NEGATE
    tests = [one(*item) for item in items[negated:]]
    return _character(lambda c: any(test(c) for test in tests) != negated)


def _branch(argument: tuple) -> Ends:
    branches = [_sequence(list(branch)) for branch in argument[1]]
    return lambda name, starts: frozenset().union(*(ends(name, starts) for ends in branches))


def _group(argument: tuple) -> Ends:
    *_, added, removed, inner = argument
    if added or removed:
        raise KeyError("a flag")
    return _sequence(list(inner))


def _repeat(argument: tuple) -> Ends:
    least, most, inner = argument
    once = _sequence(list(inner))

    def ends(name: str, starts: frozenset[int]) -> frozenset[int]:
        for _ in range(least):
            before, starts = starts, once(name, starts)
            if starts == before:  # and so it stays
                break
        found = now = starts
        for _ in range(most - least):
            now = once(name, now) - found
            if not now:
                break
            found |= now
        return found

    return ends


def _assertion(wanted: bool) -> Callable[[tuple], Ends]:
    def made(argument: tuple) -> Ends:
        direction, inner = argument
        least, most = inner.getwidth()
        if direction < 0 and least != most:
            raise KeyError("lookbehind of no certain width")
        ends = _sequence(list(inner))

        def holds(name: str, at: int) -> bool:
            if direction > 0:
                return bool(ends(name, frozenset([at])))
            return at >= least and at in ends(name, frozenset([at - least]))

        return lambda name, starts: frozenset(i for i in starts if holds(name, i) == wanted)

    return made


def _at(where: object) -> Ends:
    if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return lambda name, starts: starts & {0}
    if where is sre.AT_END_STRING:
        return lambda name, starts: starts & {len(name)}
    if where is sre.AT_END:
        return lambda name, starts: starts & ({len(name)} | ({len(name) - 1} if name.endswith("\n") else set()))
    raise KeyError(where)


_PARTS: dict[object, Callable] = {
    sre.LITERAL: lambda code: _character(lambda c: ord(c) == code),
    sre.NOT_LITERAL: lambda code: _character(lambda c: ord(c) != code),
    sre.ANY: lambda _: _character(lambda c: c != "\n"),
    sre.IN: _set,
    sre.BRANCH: _branch,
    sre.SUBPATTERN: _group,
    sre.MAX_REPEAT: _repeat,
    sre.MIN_REPEAT: _repeat,
    sre.ASSERT: _assertion(True),
    sre.ASSERT_NOT: _assertion(False),
    sre.AT: _at,
}
