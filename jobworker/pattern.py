"""Regular expressions whose matching takes a bounded time, whatever the expression and the text.

Python's `re` backtracks: `.+@.+\\..+` on 4 KB takes seconds, in which it holds the interpreter's lock. Here an
expression becomes a machine that is in many states at once and reads each character once (Thompson 1968). What can't
be had that way, such as back references, is refused. `re` parses the expression and judges single characters; it
matches nothing.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from re import _constants as codes
from re import _parser as parser
from typing import Any, NamedTuple

MAX_STATES = 20_000
MAX_STEPS = 60_000  # of all matches for one request: some 25 ms where they take longest

# What stands before or after a place in the text, as far as an anchor can tell.
EDGE, LAST_NEWLINE, NEWLINE, WORD, FOREIGN_WORD, OTHER = range(6)
INSIDE_NOTHING = re.fullmatch(r"\B", "") is not None  # since Python 3.14

_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_REFUSED = {
    codes.GROUPREF: "a back reference",
    codes.GROUPREF_EXISTS: "a condition on a group",
    codes.ASSERT: "look-ahead or look-behind",
    codes.ASSERT_NOT: "look-ahead or look-behind",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive quantifier",
}


class TooLong(ValueError):
    """A match takes more steps than are left of MAX_STEPS."""


class Matching:
    """What one request may spend on matches: what has been found out about an expression costs nothing again."""

    def __init__(self) -> None:
        self._steps = 0
        self._known: defaultdict[str, dict[Any, frozenset[int]]] = defaultdict(dict)

    def known(self, expression: str) -> dict[Any, frozenset[int]]:
        return self._known[expression]

    def spend(self, steps: int) -> None:
        """Raises TooLong."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TooLong


class _State(NamedTuple):
    """A place in the expression: `one` reads a character, `anchor` reads none, neither: on to `next` at once."""

    next: tuple[int, ...]
    one: str = ""  # an expression for a single character
    anchor: Any = None
    flags: int = 0


@functools.cache  # a file holds what it holds; each is asked for again and again
def compiled(expression: str) -> "Pattern":
    return Pattern(expression)


class Pattern:
    """A regular expression, as Python's `re` spells it. Raises ValueError for one that can't be matched safely."""

    def __init__(self, expression: str) -> None:
        re.compile(expression)  # raises re.error with the place
        self.expression = expression
        self._states: list[_State] = []
        parsed = parser.parse(expression)
        self._end = self._add(())
        self._start = self._sequence(parsed, self._end, parsed.state.flags)
        ones = {(state.one, state.flags) for state in self._states if state.one}
        self._readers = {key: re.compile(*key).fullmatch for key in ones}  # `re` itself keeps 512, of all patterns

    def fullmatch(self, text: str, matching: Matching | None = None) -> bool:
        """Whether the whole text matches. Raises TooLong."""
        matching = matching or Matching()
        known = matching.known(self.expression)
        here, before = frozenset({self._start}), EDGE
        for position, character in enumerate(text):
            after = _kind(character, position == len(text) - 1)
            key = (here, before, character, after)
            if key not in known:
                known[key] = self._step(*key, matching)
            here, before = known[key], after
            if not here:
                return False
        key = (here, before, "", EDGE)
        if key not in known:
            known[key] = self._step(*key, matching)
        return self._end in known[key]

    def _step(
        self, here: frozenset[int], before: int, character: str, after: int, matching: Matching
    ) -> frozenset[int]:
        """Give the states after a character, or those at the end of the text. Raises TooLong."""
        reached = self._closure(here, before, after)
        matching.spend(len(reached) + 1)
        if not character:
            return frozenset(reached)
        return frozenset(self._states[each].next[0] for each in reached if self._reads(each, character))

    def _reads(self, state: int, character: str) -> bool:
        _next, one, _anchor, flags = self._states[state]
        return bool(one) and self._readers[one, flags](character) is not None

    def _closure(self, states: Iterable[int], before: int, after: int) -> set[int]:
        """Give all states that are reached without reading a character."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            each = waiting.pop()
            if each not in found:
                found.add(each)
                state = self._states[each]
                if not state.one and (state.anchor is None or _holds(state.anchor, state.flags, before, after)):
                    waiting += state.next
        return found

    # From the parsed expression to states, from its end to its start

    def _add(self, next_: tuple[int, ...], one: str = "", anchor: Any = None, flags: int = 0) -> int:
        if len(self._states) >= MAX_STATES:
            raise ValueError(f"its repeats add up to more than {MAX_STATES:,} steps")
        self._states.append(_State(next_, one, anchor, flags & (re.IGNORECASE | re.DOTALL | re.MULTILINE | re.ASCII)))
        return len(self._states) - 1

    def _sequence(self, items: Iterable[Any], next_: int, flags: int) -> int:
        for code, argument in reversed(list(items)):
            next_ = self._item(code, argument, next_, flags)
        return next_

    def _item(self, code: Any, argument: Any, next_: int, flags: int) -> int:
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY):
            return self._add((next_,), _one(code, argument), flags=flags)
        if code == codes.AT:
            return self._add((next_,), anchor=argument, flags=flags)
        if code == codes.BRANCH:
            branches = (self._sequence(branch, next_, flags) for branch in argument[1])
            return self._add(tuple(dict.fromkeys(branches)))  # a step costs what it has states, not ways to them
        if code == codes.SUBPATTERN:
            _group, added, removed, items = argument
            return self._sequence(items, next_, (flags | added) & ~removed)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, items = argument
            return self._repeat(least, most, items, next_, flags)
        raise ValueError(f"{_REFUSED.get(code, str(code).lower())} can't be matched in a bounded time")

    def _repeat(self, least: int, most: int, items: Any, next_: int, flags: int) -> int:
        if most == codes.MAXREPEAT:
            again = self._add(())
            body = self._sequence(items, again, flags)
            self._states[again] = _State((body, next_))
            start = again
        else:
            start = next_
            for _ in range(most - least):
                start = self._add((self._sequence(items, start, flags), next_))
        for _ in range(least):
            before, start = start, self._sequence(items, start, flags)
            if start == before:  # what reads nothing reads nothing as often as one likes
                break
        return start


def _kind(character: str, last: bool) -> int:
    if character == "\n":
        return LAST_NEWLINE if last else NEWLINE
    if character.isalnum() or character == "_":
        return WORD if character.isascii() else FOREIGN_WORD
    return OTHER


def _holds(anchor: Any, flags: int, before: int, after: int) -> bool:
    at_start, at_end = before == EDGE, after == EDGE
    if anchor in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        lines = flags & re.MULTILINE and anchor == codes.AT_BEGINNING
        return at_start or bool(lines and before in (NEWLINE, LAST_NEWLINE))
    if anchor == codes.AT_END:
        return at_end or after == LAST_NEWLINE or bool(flags & re.MULTILINE and after == NEWLINE)
    if anchor == codes.AT_END_STRING:
        return at_end
    if at_start and at_end and anchor == codes.AT_NON_BOUNDARY:
        return INSIDE_NOTHING
    words = (WORD,) if flags & re.ASCII else (WORD, FOREIGN_WORD)
    at_boundary = (before in words) != (after in words)
    return at_boundary is bool(anchor == codes.AT_BOUNDARY)


def _one(code: Any, argument: Any) -> str:
    """Give the expression for one character that a parsed item stands for."""
    if code == codes.ANY:
        return "."
    if code == codes.LITERAL:
        return _escaped(argument)
    if code == codes.NOT_LITERAL:
        return f"[^{_escaped(argument)}]"
    return f"[{''.join(_member(*item) for item in argument)}]"


def _member(code: Any, argument: Any) -> str:
    if code == codes.NEGATE:
        return "^"
    if code == codes.LITERAL:
        return _escaped(argument)
    if code == codes.RANGE:
        return f"{_escaped(argument[0])}-{_escaped(argument[1])}"
    return _CATEGORIES[argument]


def _escaped(code_point: int) -> str:
    return f"\\U{code_point:08x}"
