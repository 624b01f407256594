"""hints.py: a mistake in jobs.yaml is named by its likely meaning, at its own place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobworker.hints import near_name, shell_word
from tests.test_config import any_loader, errors_of, job_of

__all__ = ["any_loader"]

JOB = "- name: a\n  image: b\n"
MEANT = 'did you mean "image: busybox"?'
ALIGN = "align what belongs together"
OPEN = "is not closed, or a comma is missing before line"
QUOTED = "what is in quotes ends before this: is a quote above it not closed, or one within it?"


@pytest.mark.usefixtures("any_loader")
class TestShape:
    """What is no YAML is told in plain words, on the line that is wrong."""

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("- name: a\n  image busybox\n- name: b\n", f"2:3: there is no colon: {MEANT}"),
            ("- name: a\n  image busybox\n  init: true\n", f"2:3: there is no colon: {MEANT}"),
            ("- name: a\n  image busybox\n", f"2:3: there is no colon: {MEANT}"),
            ("- name: a\n  image:busybox\n", f"2:3: there is no space after a colon: {MEANT}"),
            ("- name a\n  image: busybox\n", '1:3: there is no colon: did you mean "name: a"?'),
            ("- name: a\n   image busybox\n", '1:3: "image" is missing; is a colon missing in line 2?'),
            ("-name: a\n image: busybox\n", '1:1: there is no space after "-"'),
            ("- name: a\n   image: b\n", f'2:4: "image" begins in column 4, the one above in column 3: {ALIGN}'),
            ("- name: a\n image: b\n", f'2:2: "image" begins in column 2, the one above in column 3: {ALIGN}'),
            (f"{JOB}   init: true\n", f'3:4: "init" begins in column 4, the one above in column 3: {ALIGN}'),
            (f"{JOB} init: true\n", f'3:2: "init" begins in column 2, the one above in column 3: {ALIGN}'),
            (f"{JOB}  volumes:\n    - /c:/d\n   - /e:/f\n",
             f'5:4: "- /e" begins in column 4, the one above in column 5: {ALIGN}'),
            (f"{JOB}  volumes:\n    - /c:/d\n   init: true\n",
             f'5:4: "init" begins in column 4, the one above in column 3: {ALIGN}'),
            (f"{JOB} - name: c\n", f'3:2: "- name" begins in column 2, the one above in column 1: {ALIGN}'),
            (f"{JOB}  command: echo c: d\n", '3:18: a second ": " in one line: put the value in quotes'),
            (f"{JOB}  # c: d\n   init: true\n", f'4:4: "init" begins in column 4, the one above in column 3: {ALIGN}'),
            ("  - name: a\n    image: b\n- name: c\n",
             f'3:1: "- name" begins in column 1, the one above in column 3: {ALIGN}'),
            (f"{JOB}  volumes:\n  /c:/d\n", '4:3: is a dash missing: did you mean "- /c:/d"?'),
            (f"{JOB}  command: 'echo c\n  init: true\n", "3:12: this quote is not closed"),
            (f"{JOB}  command: 'echo c\n---\n", "3:12: this quote is not closed"),
            (f"{JOB}  command: [echo, c\n  init: true\n", f"3:12: this [ {OPEN} 4"),
            ("- {name: a, image: b\n- {name: c, image: d}\n", f"1:3: this {{ {OPEN} 2"),
            (f"{JOB}  command: 'echo c\n- name: d\n  command: 'echo e'\n", f"5:13: {QUOTED}"),
            (f'{JOB}  command: [sh, -c, "echo "c""]\n', f"3:28: {QUOTED}"),
            (f"{JOB}  command: !c d\n", "3:12: tags (!name) are not supported: write the value alone"),
        ],
    )  # fmt: skip
    def test_it_is_told_in_plain_words(self, text: str, error: str, tmp_path: Path) -> None:
        assert errors_of(text, tmp_path) == [f"jobs.yaml:{error}"]

    @pytest.mark.parametrize("value", ["@daily", "* * * * *", "[echo, &&, echo]", "[cat, >, x]", "%x", "| x"])
    def test_what_yaml_means_something_by_belongs_in_quotes(self, value: str, tmp_path: Path) -> None:
        [error] = errors_of(f"{JOB}  command: {value}\n", tmp_path)
        assert error.startswith("jobs.yaml:3:")
        assert error.endswith("; put the value in quotes")

    @pytest.mark.parametrize("end", ["\r\n", "\r", "\u2028"])
    def test_lines_may_end_in_any_way(self, end: str, tmp_path: Path) -> None:
        [error] = errors_of("- name: a\n image: b\n".replace("\n", end), tmp_path)
        assert error == f'jobs.yaml:2:2: "image" begins in column 2, the one above in column 3: {ALIGN}'


class TestKeys:
    """What people write instead of a key gets the key's name."""

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            ("env", "did you mean environment?"),
            ("memory", "did you mean mem_limit?"),
            ("mounts", "did you mean volumes?"),
            ("cmd", "did you mean command?"),
            ("restart", "a job that has failed is tried again as often as its retries say"),
            ("depends_on", "jobs do not wait for each other: ask for the next one when this one has ended"),
            ("cap_add", "write --cap-add under options, as docker run takes it"),
            ("comand", "did you mean command?"),
        ],
    )
    def test_it_is_hinted_at(self, key: str, hint: str, tmp_path: Path) -> None:
        assert errors_of(f"{JOB}  {key}: x\n", tmp_path) == [f'jobs.yaml:3:3: "{key}" is no key here; {hint}']

    def test_no_key_is_hinted_at_that_is_not_there(self, tmp_path: Path) -> None:
        [error] = errors_of(f"{JOB}  parameters: {{A: {{env: x}}}}\n", tmp_path)
        assert error.endswith('"env" is no key here; known are required, default, pattern')

    def test_a_wrong_name_is_compared_with_a_thousand_at_most(self) -> None:
        """In a ratio, as the machine's speed is anybody's."""

        def seconds(count: int) -> float:
            names, begin = [f"backup-database-number-{number}" for number in range(count)], time.process_time()
            assert near_name("backup-database-numbre-7", names) == "did you mean backup-database-number-7?"
            return time.process_time() - begin

        assert min(seconds(50_000) for _ in range(2)) < 5 * min(seconds(1_000) for _ in range(2))


class TestShellWords:
    """What only a shell understands is refused where there is none."""

    @pytest.mark.parametrize(
        ("command", "word"),
        [("echo a && echo b", "&&"), ("cat a | wc", "|"), ("date > /b/c", ">"), ("date >/b/c", ">/b/c"),
         ("a || b", "||"), ("mysql < dump", "<"), ("make 2>&1", "2>&1"), ("a; b", "a;"),
         ("serve &", "&"),
         ("echo `date` now", "`date`"), ("tar cf a-$(date).tar b", "a-$(date).tar"), ("sh -c a && b", "&&"),
         (["echo", "a", "&&", "echo"], "&&"), (["cat", "|", "wc"], "|"), (["date", ">", "x"], ">")],
    )  # fmt: skip
    def test_it_is_named(self, command: str | list[str], word: str) -> None:
        assert shell_word(command).startswith(f"no shell reads this, so {word} is only a word: write [sh, -c, '...']")

    @pytest.mark.parametrize(
        "command",
        ["echo a", "sh -c 'a && b > c'", 'sh -c "a | b"', "sh -c 'echo $HOME; x'", "echo $HOME", "find / -exec ls {} ;",
         "awk {print$1} a", "echo 5$ a;b", "expr 5 '>' 3", r"find / -exec ls {} \;", r"echo \&\&", "env X='a && b' run",
         "pip install a>=2", "echo a&b", "", [], ["sh", "-c", "a && b"], ["echo", "a && b"], ["expr", "<", "b"],
         ["/bin/bash", "-c", 'expr "$@"', "x", "5", ">", "3"]],
    )  # fmt: skip
    def test_what_is_meant_is_left_alone(self, command: str | list[str]) -> None:
        assert shell_word(command) == ""

    @pytest.mark.parametrize("key", ["command", "entrypoint"])
    def test_it_has_its_place(self, key: str, tmp_path: Path) -> None:
        [error] = errors_of(f"{JOB}  {key}: echo a && echo b\n", tmp_path)
        words = "no shell reads this, so && is only a word: write [sh, -c, '...']"
        otherwise = ", or put it in quotes if the program shall have it"
        assert error == f"jobs.yaml:3:{len(key) + 5}: {key}: {words}{otherwise}"

    def test_in_quotes_it_is_a_word(self, tmp_path: Path) -> None:
        assert job_of("command: expr 5 '>' 3", tmp_path).command == "expr 5 '>' 3"
