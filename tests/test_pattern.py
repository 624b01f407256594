"""pattern.py: expressions that are matched in a bounded time, and mean what they mean to `re`."""

import contextlib
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.pattern import Pattern, TooLong, compiled

PIECES = (
    r"a|b|\.|\\w|\\b|\\d|\^|\$|\[ab\]|\[\^a\]|\(a\|b\)|\(a\*b\)\*|a\+|b\?|a\{1,2\}|\(\?i:A\)|\\n|\\s|\\A|\\Z"
    r"|\(\?m:\^\)|\(\?m:\$\)|\(b\|\)\*\?|\|"
)
EXPRESSIONS = st.from_regex(f"({PIECES}){{1,8}}", fullmatch=True)
COSTLY = [
    (r".+@.+\..+", "a" * 32_000),
    (r".+@.+\..+", "a@b." * 8_000),
    (r"(a*)*b", "a" * 32_000),
    (r"(x+x+)+y", "x" * 32_000),
    (r"(a|b)*a(a|b){20}", "ab" * 16_000),
    (r"(.*,){30}x", "1," * 15_000),
    (r"(a|aa)+", "a" * 31_999 + "b"),
]


class TestPattern:
    """Same answer as `re`, in a time that the text's length bounds."""

    @settings(max_examples=500, deadline=None)
    @given(EXPRESSIONS, st.text("abA1 \n.", max_size=6))
    def test_it_matches_what_re_matches(self, expression: str, text: str) -> None:
        try:
            wanted = re.fullmatch(expression, text) is not None
        except re.error:
            return
        assert Pattern(expression).fullmatch(text) == wanted

    @pytest.mark.parametrize(("expression", "text"), COSTLY)
    def test_what_takes_re_for_ever_takes_as_long_as_anything_does(self, expression: str, text: str) -> None:
        """In a ratio, as the machine's speed is anybody's: beside the same length with a plain expression."""

        def seconds(of: Pattern) -> float:
            begin = time.process_time()
            with contextlib.suppress(TooLong):
                of.fullmatch(text)
            return time.process_time() - begin

        plain = min(seconds(Pattern(r"[ab@.,x1]*")) for _ in range(3))
        assert min(seconds(Pattern(expression)) for _ in range(3)) < 20 * plain

    def test_many_ways_to_one_state_cost_as_much_as_one(self) -> None:
        text = "".join(chr(0x4E00 + n) for n in range(5_000))

        def seconds(ways: int) -> float:
            pattern, begin = Pattern(f"(?:{'|' * ways}[^x])*"), time.process_time()
            assert pattern.fullmatch(text)
            return time.process_time() - begin

        assert min(seconds(2_000) for _ in range(2)) < 4 * min(seconds(1) for _ in range(2))

    @pytest.mark.parametrize("times", ["4000000000", "4000000000,"])
    def test_what_reads_nothing_may_be_repeated_for_ever(self, times: str) -> None:
        assert Pattern(f"a(?:){{{times}}}b").fullmatch("ab")

    def test_a_pattern_is_read_once_however_many_there_are(self) -> None:
        first, others = compiled("[a-f]+0"), [compiled(f"[a-f]+{n}") for n in range(1, 1_500)]
        assert compiled("[a-f]+0") is first
        assert len(set(others)) == len(others)

    @pytest.mark.parametrize("expression", [r"(?a)\S\b", r"\S\b", r"(?a)\B.", r"\B.", r"(?a)\b.\b.", r"\B", r"\b"])
    @pytest.mark.parametrize("text", ["", "ß", "aß", "ßa", "-", "a"])
    def test_a_words_edge_is_where_re_has_it(self, expression: str, text: str) -> None:
        assert Pattern(expression).fullmatch(text) == (re.fullmatch(expression, text) is not None)

    def test_more_characters_to_judge_than_re_keeps_compiled_cost_no_more_each(self) -> None:
        def seconds(count: int) -> float:
            pattern = Pattern(f"(?:{'|'.join(f'[{chr(0x4E00 + n)}a]x' for n in range(count))})*")
            with contextlib.suppress(TooLong):
                pattern.fullmatch("ax" * 20)
            begin = time.process_time()
            with contextlib.suppress(TooLong):
                pattern.fullmatch("ax" * 20)
            return time.process_time() - begin

        assert min(seconds(1_000) for _ in range(3)) < 10 * min(seconds(400) for _ in range(3))

    def test_a_text_that_would_take_too_long_is_refused_whatever_came_before(self) -> None:
        pattern = Pattern("(a|b)*a(a|b){20}(c|d)*")
        text = "".join(random.Random(1).choices("ab", k=30_000))
        for _ in range(2):
            with pytest.raises(TooLong):
                pattern.fullmatch(text)

    @pytest.mark.parametrize(
        ("expression", "what"),
        [
            (r"(a)\1", "a back reference"),
            (r"(?=a)a", "look-ahead"),
            (r"a(?<!b)", "look-behind"),
            (r"(?>a*)", "an atomic group"),
            (r"a*+", "a possessive quantifier"),
            (r"(a)?(?(1)b|c)", "a condition on a group"),
            (r"(a{1000}){1000}", "more than"),
        ],
    )
    def test_what_cannot_be_made_safe_is_refused(self, expression: str, what: str) -> None:
        with pytest.raises(ValueError, match=what):
            Pattern(expression)
