"""What jobs.yaml means, what it refuses, and what docker is told of it."""

import contextlib
import json
import random
import re
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobworker import config
from jobworker.config import ConfigError, Configs, JobConfig, Parameter, check_parameters, load_jobs, parse_duration

LOADERS = sorted({config.YAML_LOADER, yaml.SafeLoader}, key=str)
EXAMPLE = Path(config.__file__).parent.parent / "jobs.yaml"

# What errors say, as far as several say it.
VARIABLE = "expected a variable's name (those of JOBWORKER_ are taken)"
LABEL = "expected a label's name, not jobworker..."
VOLUME = "expected SOURCE:/TARGET[:MODE], SOURCE a volume or an absolute path"
DURATION = "expected a duration such as 1m30s, from 0.001s to 366d"
NO_DURATION = "is not a duration such as 90, 1m30s, 2h or 500ms"
NUMBER = "which YAML reads as a number; quote it"
BOOLEAN = "which YAML reads as true or false; quote it"
RETRIES = "expected a whole number from 0 to 1000"
REQUIRED = "is required, so its default would never be used: leave out one of the two"
PRIORITY = "expected a whole number from -2147483648 to 2147483647"
PATTERN = "expected a regular expression"


def jobs_of(text: str | bytes, tmp_path: Path) -> tuple[JobConfig, ...]:
    file = tmp_path / "jobs.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_jobs(file)


def errors_of(text: str | bytes, tmp_path: Path) -> list[str]:
    """The lines of the ConfigError, without the folder."""
    with pytest.raises(ConfigError) as error:
        jobs_of(text, tmp_path)
    return [line.removeprefix(f"{tmp_path}/") for line in str(error.value).split("\n")]


def job_of(keys: str, tmp_path: Path) -> JobConfig:
    """One job whose further keys are the given lines."""
    lines = "".join(f"  {line}\n" for line in keys.split("\n"))
    return jobs_of("- name: job\n  image: busybox\n" + lines, tmp_path)[0]


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def any_loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "YAML_LOADER", request.param)


@pytest.mark.usefixtures("any_loader")
class TestJobsYaml:
    def test_a_job_needs_a_name_and_an_image_only(self, tmp_path: Path) -> None:
        assert jobs_of("- name: hello\n  image: hello-world\n", tmp_path) == (JobConfig("hello", "hello-world"),)

    def test_jobs_keep_the_order_of_the_file(self, tmp_path: Path) -> None:
        jobs = jobs_of("- {name: b, image: x}\n- {name: a, image: x}\n- {name: c, image: x}\n", tmp_path)
        assert [job.name for job in jobs] == ["b", "a", "c"]

    def test_an_empty_list_is_no_job(self, tmp_path: Path) -> None:
        assert jobs_of("[]", tmp_path) == ()

    def test_a_byte_order_mark_and_windows_line_ends_change_nothing(self, tmp_path: Path) -> None:
        assert jobs_of(b"\xef\xbb\xbf- name: a\r\n  image: b\r\n", tmp_path) == (JobConfig("a", "b"),)

    def test_json_is_yaml(self, tmp_path: Path) -> None:
        text = json.dumps([{"name": "a", "image": "b", "retries": 2, "environment": {"A": "1"}}])
        assert jobs_of(text, tmp_path) == (JobConfig("a", "b", retries=2, environment={"A": "1"}),)

    @pytest.mark.parametrize(
        ("keys", "meaning"),
        [
            ("command: echo 'a b' c", {"command": "echo 'a b' c"}),
            ("command: [echo, 'a b', '']", {"command": ("echo", "a b", "")}),
            ("command:", {}),
            ("command: ''", {"command": ""}),
            ("command: []", {}),
            ("command: |\n  sh -c '\n  date'", {"command": "sh -c '\ndate'\n"}),
            ("entrypoint: sh -c", {"entrypoint": "sh -c"}),
            ("entrypoint: [sh, -c]", {"entrypoint": ("sh", "-c")}),
            ("entrypoint: ''", {"entrypoint": ""}),
            ("environment: {A: text, B: 5, C: -1.50, D: '', E: , F: 'no'}",
             {"environment": {"A": "text", "B": "5", "C": "-1.50", "D": "", "E": None, "F": "no"}}),
            ("environment: [A=b=c, B=, C, 'D=x y']", {"environment": {"A": "b=c", "B": "", "C": None, "D": "x y"}}),
            ("environment: [A=12e4567, 'B=1e5', C=0o7]", {"environment": {"A": "12e4567", "B": "1e5", "C": "0o7"}}),
            ('environment: {A: "two\\nlines"}', {"environment": {"A": "two\nlines"}}),
            ("volumes: [/a:/b, 'data:/c:ro,z', /d]", {"volumes": ("/a:/b", "data:/c:ro,z", "/d")}),
            ("working_dir: /srv", {"working_dir": "/srv"}),
            ("user: '1000:1000'", {"user": "1000:1000"}),
            ("user: 1000:1000", {"user": "1000:1000"}),
            ("network_mode: none", {"network_mode": "none"}),
            ("mem_limit: 512m", {"mem_limit": "512m"}),
            ("mem_limit: 1.5GB", {"mem_limit": "1.5GB"}),
            ("mem_limit: 1073741824", {"mem_limit": "1073741824"}),
            ("cpus: 2", {"cpus": 2.0}),
            ("cpus: '0.5'", {"cpus": 0.5}),
            ("cpus: .25", {"cpus": 0.25}),
            ("pids_limit: 100", {"pids_limit": 100}),
            ("pids_limit: -1", {"pids_limit": -1}),
            ("pull_policy: always", {"pull_policy": "always"}),
            ("pull_policy: if_not_present", {}),
            ("platform: linux/arm64/v8", {"platform": "linux/arm64/v8"}),
            ("init: true", {"init": True}),
            ("init: false", {}),
            ("labels: {com.example.team: blue, count: 3, empty: }",
             {"labels": {"com.example.team": "blue", "count": "3", "empty": ""}}),
            ("labels: [a=b, c]", {"labels": {"a": "b", "c": ""}}),
            ("stop_grace_period: 1m30s", {"stop_grace_period": 90}),
            ("stop_grace_period: 1.2s", {"stop_grace_period": 2}),
            ("stop_grace_period: 0", {"stop_grace_period": 0}),
            ("options: --cap-drop ALL --read-only", {"options": ("--cap-drop=ALL", "--read-only")}),
            ("options: [-v, /a:/b, --shm-size=1g, -w/x]", {"options": ("-v=/a:/b", "--shm-size=1g", "-w/x")}),
            ("timeout: 90", {"timeout": 90.0}),
            ("timeout: 1.5", {"timeout": 1.5}),
            ("timeout: 1d", {"timeout": 86400.0}),
            ("pull_timeout: 10m", {"pull_timeout": 600.0}),
            ("retries: 3", {"retries": 3}),
            ("retry_delay: 500ms", {"retry_delay": 0.5}),
            ("concurrency: 1", {"concurrency": 1}),
            ("tags: [gpu, zone=eu]", {"tags": ("gpu", "zone=eu")}),
            ("priority: -2147483648", {"priority": -(2**31)}),
            ("parameters: {A: }", {"parameters": {"A": Parameter()}}),
            ("parameters: {A: {required: true, pattern: '[a-z]+'}, B: {default: 5}}",
             {"parameters": {"A": Parameter(required=True, pattern="[a-z]+"), "B": Parameter(default="5")}}),
        ],
    )  # fmt: skip
    def test_each_key_means_what_compose_means_by_it(self, keys: str, meaning: dict[str, Any], tmp_path: Path) -> None:
        assert job_of(keys, tmp_path) == JobConfig("job", "busybox", **meaning)

    @pytest.mark.parametrize(
        "image",
        ["busybox", "busybox:1.36", "library/busybox", "host.example/a/b_c/d__e/f-g.h:tag_1", "localhost:5000/a",
         "A.b/c", "[::1]:5000/a", f"a@sha256:{'0f' * 32}", f"host:1/a:b@sha256:{'0f' * 32}", f"sha256:{'0f' * 32}"],
    )  # fmt: skip
    def test_an_image_is_any_reference_that_docker_takes(self, image: str, tmp_path: Path) -> None:
        assert jobs_of(f"- name: a\n  image: '{image}'\n", tmp_path)[0].image == image

    @pytest.mark.parametrize("name", ["a", "a" * 128, "é 日本 🎉", "..a", "7", "-x", "a b", "100%?#&"])
    def test_a_name_is_nearly_any_text(self, name: str, tmp_path: Path) -> None:
        assert jobs_of(f"- name: '{name}'\n  image: b\n", tmp_path)[0].name == name

    @pytest.mark.parametrize("name", ["a:b", "1e3x", "0o8", "1.2.3", "22:2222", "yes!", "=", "<<"])
    def test_text_that_yaml_reads_as_text_needs_no_quotes(self, name: str, tmp_path: Path) -> None:
        assert jobs_of(f"- name: {name}\n  image: b\n", tmp_path)[0].name == name

    def test_the_example_is_valid_and_begins_with_hello_world(self) -> None:
        jobs = load_jobs(EXAMPLE)
        assert asdict(jobs[0]) == asdict(JobConfig("hello-world", "hello-world"))
        assert {job.image for job in jobs} == {"hello-world", "busybox"}


@pytest.mark.usefixtures("any_loader")
class TestJobsYamlErrors:
    @pytest.mark.parametrize(
        ("keys", "error"),
        [
            ("imge: x", '3:3: "imge" is no key here; did you mean image?'),
            ("<<: {a: b}", '3:3: "<<" is no key here; merge keys are not supported: write the keys out'),
            ("image: y", '3:3: "image" is here a second time, after line 2'),
            ("no: 1", f'3:3: expected text, not no, {BOOLEAN}: "no"'),
            ("? [a]\n: b", "3:5: expected text, not a list"),
            ("command: {a: b}", "3:12: command: expected text, or a list of text, not a map"),
            ("command: echo 'a", "3:12: command: expected text, or a list of text: No closing quotation"),
            ("command: [a, [b]]", "3:16: command: expected text, not a list"),
            ("command: 5", f'3:12: command: expected text, or a list of text, not 5, {NUMBER}: "5"'),
            ("environment: text", '3:16: environment: expected a map, not "text"'),
            ("environment:", "3:15: environment: expected a map, not nothing"),
            ("environment: [A: b]", "3:17: environment: expected text, not a map"),
            ("environment: {A: {b: c}}", "3:20: environment: A: expected text, not a map"),
            ("environment: {A: yes}", f'3:20: environment: A: expected text, not yes, {BOOLEAN}: "yes"'),
            ("environment: {A-B=C: d}", f'3:17: environment: {VARIABLE}, not "A-B=C"'),
            ("environment: [=a]", f'3:17: environment: {VARIABLE}, not ""'),
            ("environment: [JOBWORKER_JOB_ID=1]", f'3:17: environment: {VARIABLE}, not "JOBWORKER_JOB_ID"'),
            ("environment: [A=1, A=2]", '3:22: environment: "A" is here a second time, after line 3'),
            ('environment: {A: "a\\0b"}',
             "3:20: environment: A: holds a NUL character, which no argument and no variable can"),
            ("volumes: /a:/b", '3:12: volumes: expected a list of volumes, not "/a:/b"'),
            ("volumes: [./a:/b]", f'3:13: volumes: {VOLUME}, not "./a:/b"'),
            ("volumes: [/a:b]", f'3:13: volumes: {VOLUME}, not "/a:b"'),
            ("working_dir: srv", '3:16: working_dir: expected an absolute path, not "srv"'),
            ("user: 1000", f'3:9: user: expected USER or USER:GROUP, not 1000, {NUMBER}: "1000"'),
            ("network_mode: service:db",
             '3:17: network_mode: expected a network such as none, host or bridge, not "service:db"'),
            ("mem_limit: 512", "3:14: mem_limit: expected a size such as 512m or 1g, not 512"),
            ("mem_limit: much", '3:14: mem_limit: expected a size such as 512m or 1g, not "much"'),
            ("cpus: 0", '3:9: cpus: expected a number from 0.01: "0" is out of range'),
            ("cpus: two", '3:9: cpus: expected a number from 0.01, not "two"'),
            ("cpus: 1e1", "3:9: cpus: expected a number from 0.01, not 1e1"),
            ("pids_limit: '5'", '3:15: pids_limit: expected a whole number from -1 to 4194304, not "5"'),
            ("pull_policy: build", '3:16: pull_policy: expected always, missing or never, not "build"'),
            ("platform: Linux", '3:13: platform: expected a platform such as linux/arm64, not "Linux"'),
            ("init: yes", "3:9: init: expected true or false, not yes"),
            ("init: 'true'", '3:9: init: expected true or false, not "true"'),
            ("labels: {jobworker.job: 1}", f'3:12: labels: {LABEL}, not "jobworker.job"'),
            ("stop_grace_period: ~",
             "3:22: stop_grace_period: expected a duration such as 1m30s, from 0s to 366d, not ~"),
            ("timeout: 1:30", f'3:12: timeout: {DURATION}: "1:30" {NO_DURATION}'),
            ("timeout: 010", f'3:12: timeout: {DURATION}: "010" {NO_DURATION}'),
            ("timeout: 0", f'3:12: timeout: {DURATION}: "0" is out of range'),
            (f"timeout: {'9' * 400}", f'3:12: timeout: {DURATION}: "{"9" * 60}..." is out of range'),
            ("retries: 010", f"3:12: retries: {RETRIES}, not 010"),
            ("retries: 1_0", f"3:12: retries: {RETRIES}, not 1_0"),
            ("retries: -1", f'3:12: retries: {RETRIES}: "-1" is out of range'),
            ("retries: 1.0", f"3:12: retries: {RETRIES}, not 1.0"),
            ("retries: three", f'3:12: retries: {RETRIES}, not "three"'),
            ("concurrency: 0", '3:16: concurrency: expected a whole number from 1 to 2147483647: "0" is out of range'),
            ("priority: 2147483648", f'3:13: priority: {PRIORITY}: "2147483648" is out of range'),
            ("tags: gpu", '3:9: tags: expected a list of tags, not "gpu"'),
            ("tags: ['a,b']", '3:10: tags: expected a tag without spaces and commas, not "a,b"'),
            ("parameters: [A]", "3:15: parameters: expected a map, not a list"),
            ("parameters: {A: {requred: true}}",
             '3:20: parameters: A: "requred" is no key here; did you mean required?'),
            ("parameters: {A: {pattern: '('}}",
             f"3:29: parameters: A: pattern: {PATTERN}: missing ), unterminated subpattern at position 0"),
            ("parameters: {A: {pattern: 'x', default: y}}",
             '3:19: parameters: A: default: must match the pattern x, which "y" does not'),
            ("parameters: {A: {required: true, default: y}}", f"3:19: parameters: A: {REQUIRED}"),
            ("parameters: {JOBWORKER_X: }", f'3:16: parameters: {VARIABLE}, not "JOBWORKER_X"'),
            ("options: --init busybox", '3:12: options: "busybox" is no option: docker would take it for the image'),
            ("options: [--hostname]", "3:13: options: --hostname needs a value"),
            ("options: [-m]", "3:13: options: -m needs a value"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_told_with_its_place_and_what_was_expected(
        self, keys: str, error: str, tmp_path: Path
    ) -> None:
        lines = "".join(f"  {line}\n" for line in keys.split("\n"))
        assert errors_of("- name: job\n  image: busybox\n" + lines, tmp_path) == [f"jobs.yaml:{error}"]

    @pytest.mark.parametrize(
        "option",
        ["--name=x", "--name x", "--rm", "-d", "--detach=true", "-dP", "-Pit", "-i", "--interactive", "-t", "--tty",
         "--cidfile /x", "--pull always", "--restart=no", "--log-driver none", "-a stdin", "--attach=stdout", "--help",
         "--label jobworker.job=1", "-ljobworker.x=1", "-l jobworker.x=1", "-e JOBWORKER_ATTEMPT=2",
         "-Pl=jobworker.job=9", "-Pqe=JOBWORKER_JOB_ID=9", "-PeJOBWORKER_JOB_ID=9",
         "--env=JOBWORKER_X"],
    )  # fmt: skip
    def test_an_option_that_would_undo_ours_is_refused(self, option: str, tmp_path: Path) -> None:
        (error,) = errors_of(f"- name: job\n  image: busybox\n  options: {option}\n", tmp_path)
        one_word = option.replace(" ", "=", 1)
        assert error == f'jobs.yaml:3:12: options: "{one_word}" is not allowed: jobworker relies on its own setting'

    @pytest.mark.parametrize(
        "option", ["--namespaces=x", "-v/d:/rm", "-e RM=--rm", "--hostname -it", "--label a=jobworker.x", "--initial 5"]
    )
    def test_an_option_that_only_looks_like_ours_is_kept(self, option: str, tmp_path: Path) -> None:
        assert job_of(f"options: {option}", tmp_path).options == (option.replace(" ", "=", 1),)

    @pytest.mark.parametrize(
        ("value", "reading"),
        [("no", "true or false"), ("On", "true or false"), ("22:22", "a number"), ("010", "a number"),
         ("1e3", "a number"),
         ("0x10", "a number"), ("0o10", "a number"), ("1_000", "a number"), ("0b_", "a number"), (".inf", "a number"),
         ("2024-01-01", "a date"), ("~", "nothing"), ("null", "nothing"), ("5", "a number"), ("1.10", "a number")],
    )  # fmt: skip
    def test_text_that_yaml_turns_into_something_else_must_be_quoted(
        self, value: str, reading: str, tmp_path: Path
    ) -> None:
        (error,) = errors_of(f"- name: {value}\n  image: busybox\n", tmp_path)
        assert error.startswith("jobs.yaml:1:9: name: expected 1 to 128 characters")
        assert error.endswith(f', not {value}, which YAML reads as {reading}; quote it: "{value}"')
        assert jobs_of(f'- name: "{value}"\n  image: busybox\n', tmp_path)[0].name == value

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a" * 129, "a\\nb", "a\\x7f", "\\0", "\\e[1m"])
    def test_a_name_that_no_url_or_log_can_hold_is_refused(self, name: str, tmp_path: Path) -> None:
        (error,) = errors_of(f'- name: "{name}"\n  image: busybox\n', tmp_path)
        assert error.startswith("jobs.yaml:1:9: name: ")

    @pytest.mark.parametrize(
        "image",
        [
            "",
            "-v",
            "--privileged",
            "Busybox",
            "a b",
            "a:",
            "a//b",
            "/a",
            "a@sha256:12",
            "a:b:c",
            "http://a/b",
            "a\\n",
            "ä",
        ],
    )
    def test_an_image_that_docker_would_refuse_or_take_for_an_option_is_refused(
        self, image: str, tmp_path: Path
    ) -> None:
        (error,) = errors_of(f'- name: a\n  image: "{image}"\n', tmp_path)
        assert error.startswith("jobs.yaml:2:10: image: expected an image such as ")

    def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(self, tmp_path: Path) -> None:
        text = (
            "- image: Busybox\n  comand: x\n  environment: {A: no, A: b, C: 010}\n"
            "- name: x\n  image: &i busybox\n  retries: many\n"
            "- name: x\n  image: *i\n  image: !!str z\n  timeout: 22:22\n"
        )
        places = [error.split(":")[1:3] for error in errors_of(text, tmp_path)]
        assert places == [
            ["1", "3"],  # no name
            ["1", "10"],
            ["2", "3"],
            ["3", "20"],
            ["3", "24"],
            ["3", "33"],
            ["5", "10"],
            ["6", "12"],
            ["7", "9"],
            ["8", "10"],
            ["9", "3"],
            ["9", "10"],
            ["10", "12"],
        ]

    def test_a_name_that_another_job_has_is_told_with_its_line(self, tmp_path: Path) -> None:
        text = "# two\n- name: x\n  image: y\n- image: y\n  name: x\n"
        assert errors_of(text, tmp_path) == ["jobs.yaml:5:9: name: taken by the job on line 2"]

    def test_after_a_hundred_mistakes_no_more_are_looked_for(self, tmp_path: Path) -> None:
        assert len(errors_of("- 1\n" * 20_000, tmp_path)) == 100

    @pytest.mark.parametrize(
        ("text", "place", "words"),
        [
            ("", "1:1", "no jobs here: expected a list"),
            ("# nothing\n", "1:1", "no jobs here: expected a list"),
            ("hello", "1:1", "expected a list of jobs"),
            ("jobs:\n  - name: a\n", "1:1", "expected a list of jobs"),
            ("- hello", "1:3", "expected a map"),
            ("- name: a\n  image: b\n---\n- name: c\n", "3:1", "a second document begins here"),
            (b"- name: a\n  image: \xe4\n", "2:10", "byte 0xe4 is not UTF-8"),
            ("- name: a\n".encode("utf-16"), "1:1", "byte 0xff is not UTF-8"),
            ("- name: a\x1b\n", "1:10", "'\\x1b' is not allowed"),
            ("- name: a\n\timage: b\n", "2:1", "indent with spaces, not tabs"),
            ("- name: [a\n", "1:9", "this [ is not closed, or a comma is missing before line 2"),
            ("- name: *a\n", "1:9", "found undefined alias"),
            ("[" * 500, "1:11", "nested more than 10 deep"),
            ("- " * 500, "1:21", "nested more than 10 deep"),
            ("{a: " * 500, "1:41", "nested more than 10 deep"),
        ],
    )
    def test_a_file_that_is_no_list_of_jobs_is_one_error_at_once(
        self, text: str | bytes, place: str, words: str, tmp_path: Path
    ) -> None:
        start = time.process_time()
        (error,) = errors_of(text, tmp_path)
        assert error.startswith(f"jobs.yaml:{place}: ")
        assert words in error
        assert time.process_time() - start < 1

    @pytest.mark.parametrize("opening", ["[", "- ", "{a: "])
    def test_a_bomb_of_depth_is_one_error_at_once(self, opening: str, tmp_path: Path) -> None:
        start = time.process_time()
        (error,) = errors_of(opening * 100_000, tmp_path)
        assert "nest" in error  # from 1,000 on, libyaml may say so first
        assert time.process_time() - start < 1

    @pytest.mark.parametrize("nested", ["{}: &{} [{}]\n", "- &{1} {{<<: [{2}]}}\n", "- {{command: &{1} [{2}]}}\n"])
    def test_a_bomb_of_aliases_is_one_error_at_once(self, nested: str, tmp_path: Path) -> None:
        first = nested.format("a", "a", "x")
        text = "".join(nested.format(y, y, ",".join([f"*{x}"] * 9)) for x, y in pairwise("abcdefghijk"))
        start = time.process_time()
        (error,) = errors_of(first + text, tmp_path)
        assert "anchors and aliases (&name, *name) are not supported" in error
        assert time.process_time() - start < 0.5

    def test_a_file_that_cannot_be_read_says_why(self, tmp_path: Path) -> None:
        for path, reason in [(tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")]:
            with pytest.raises(ConfigError) as error:
                load_jobs(path)
            assert str(error.value) == f"{path}: cannot be read: {reason}"

    def test_a_file_without_end_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="/dev/zero: is larger than 1,048,576 bytes"):
            load_jobs("/dev/zero")

    @settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        text=st.one_of(
            st.binary(max_size=200),
            st.text(max_size=200).map(lambda text: text.encode(errors="replace")),
            st.text(alphabet="-:[]{}&*!|>'\"%@`#,?\\ \n\tab0<=~.", max_size=120).map(str.encode),
            st.lists(
                st.sampled_from(
                    ["- ", "name: ", "image", ": ", "a", "\n  ", "\n", "&x ", "*x", "!!int ", "[", "]", "{", "}",
                     "options: ", "command: '", "--rm ", "timeout: ", "9", "0b_", "parameters: ", "pattern: ",
                     '"\\ud800"',
                     '"\\UFFFFFFFF"', "<<: ", "~", "---\n", "? ", "|", "environment", "%YAML 1.1\n"]
                ),
                max_size=30,
            ).map(lambda parts: "".join(parts).encode()),
        )
    )  # fmt: skip
    @example(text=b"- &a [*a]")
    @example(text=b"!!seq x")
    @example(text=b"- {name: a, image: b, environment: !!seq x, options: !!null [a], command: !!int {}}")
    def test_any_text_is_jobs_or_a_config_error(self, text: bytes, tmp_path: Path) -> None:
        with contextlib.suppress(ConfigError):
            jobs_of(text, tmp_path)


class TestWire:
    def test_version_1s_keys_come_first_and_nothing_unset_follows(self) -> None:
        assert json.dumps(JobConfig("n", "i").to_wire()) == '{"command": null, "image": "i", "name": "n"}'

    def test_every_key_that_is_set_follows_and_survives_json(self, tmp_path: Path) -> None:
        job = job_of(
            "command: [a, b]\nenvironment: [A]\ncpus: 1\nparameters: {P: {default: x}}\nentrypoint: ''", tmp_path
        )
        assert json.loads(json.dumps(job.to_wire())) == {
            "command": ["a", "b"],
            "image": "busybox",
            "name": "job",
            "entrypoint": "",
            "environment": {"A": None},
            "cpus": 1.0,
            "parameters": {"P": {"required": False, "default": "x", "pattern": None}},
        }

    @pytest.mark.parametrize(
        "keys", ["command: a b", "command: [a b]", "priority: 5", "retries: 2\nretry_delay: 2s", "concurrency: 1",
                 "command: a\nretries: 1\nretry_delay: 2\nconcurrency: 1\npriority: 1", "init: false",
                 "pull_policy: missing"]
    )  # fmt: skip
    def test_a_version_1_worker_can_run_what_only_the_server_sees_to(self, keys: str, tmp_path: Path) -> None:
        assert not job_of(keys, tmp_path).needs_version_2

    @pytest.mark.parametrize(
        "keys", ["command: [a, b]", "entrypoint: a", "environment: [A]", "volumes: [/a]", "init: true", "timeout: 1s",
                 "tags: [a]", "options: --init", "pull_policy: never", "pull_timeout: 1s", "labels: [a]", "user: a",
                 "parameters: {A: }", "parameters: {A: {required: true}}", "parameters: {A: {default: ''}}",
                 "stop_grace_period: 0"]
    )  # fmt: skip
    def test_a_version_1_worker_cannot_run_what_it_cannot_be_told(self, keys: str, tmp_path: Path) -> None:
        assert job_of(keys, tmp_path).needs_version_2


class TestParameters:
    JOB = JobConfig(
        "greeting",
        "busybox",
        parameters={
            "NAME": Parameter(required=True, pattern="[a-z]+"),
            "MARK": Parameter(default="!"),
            "MORE": Parameter(),
        },
    )

    def test_what_is_given_is_taken_and_defaults_fill_the_rest(self) -> None:
        assert check_parameters(self.JOB, {"NAME": "ada"}) == {"MARK": "!", "NAME": "ada"}
        assert check_parameters(self.JOB, {"NAME": "ada", "MARK": "?", "MORE": ""}) == {
            "MARK": "?",
            "NAME": "ada",
            "MORE": "",
        }

    def test_a_job_without_parameters_takes_none(self) -> None:
        plain = JobConfig("plain", "busybox")
        assert check_parameters(plain, None) == check_parameters(plain, {}) == {}
        with pytest.raises(
            ValueError, match='"A" is no parameter of plain, which takes none: add it under "parameters"'
        ):
            check_parameters(plain, {"A": "b"})

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [
            (None, 'NAME is missing: send {"environment": {"NAME": "..."}}'),
            ([], '"environment" must be an object such as {"NAME": "value"}'),
            ("NAME=a", '"environment" must be an object such as {"NAME": "value"}'),
            ({"NAME": "ada", "PATH": "/x"}, '"PATH" is no parameter of greeting, which takes NAME, MARK, MORE'),
            ({"NAME": "ada", "A\n": "/x"}, '"A\\n" is no parameter of greeting, which takes NAME, MARK, MORE'),
            ({"NAME": 5}, "NAME must be a string in quotes, not 5"),
            ({"NAME": True}, "NAME must be a string in quotes, not true"),
            ({"NAME": None}, "NAME must be a string in quotes, not null"),
            ({"NAME": ["a"]}, 'NAME must be a string in quotes, not ["a"]'),
            ({"NAME": "Ada"}, 'NAME must match the pattern [a-z]+, which "Ada" does not'),
            ({"NAME": "ada\n"}, 'NAME must match the pattern [a-z]+, which "ada\\n" does not'),
            ({"NAME": "a\0"}, "NAME holds a NUL character, which no argument and no variable can"),
            ({"NAME": "\ud800"}, "NAME holds half of a surrogate pair, which is no character"),
            ({"NAME": "a" * 33_000}, "NAME is longer than 32,768 bytes"),
            ({"NAME": "a" * 20_000, "MORE": "b" * 20_000},
             '"environment" is longer than 32,768 bytes: hand large input over in a volume'),
        ],
    )  # fmt: skip
    def test_anything_else_is_refused_in_a_sentence(self, environment: object, reason: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            check_parameters(self.JOB, environment)

    def test_a_value_whose_match_would_take_too_long_is_refused(self) -> None:
        value = "".join(random.Random(1).choices("ab", k=30_000))
        flaw = Parameter(pattern="(a|b)*a(a|b){20}(c|d)*").flaw_of(value)
        assert flaw.startswith(
            "takes too long to be matched with the pattern (a|b)*a(a|b){20}(c|d)* at 30,000 characters"
        )


class TestDuration:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("90", 90), ("0", 0), ("1.5", 1.5), ("1m30s", 90), ("2h", 7200), ("1d", 86400), ("500ms", 0.5), ("1.5s", 1.5),
         ("1h05m", 3900), ("1d1h1m1s", 90061)],
    )  # fmt: skip
    def test_it_is_seconds_or_numbers_with_units(self, text: str, seconds: float) -> None:
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize(
        "text", ["", "1 m", "m", "-1", "+1", "1e3", "010", "1:30", "1m30", "1w", "٣", "inf", "nan", "1s\n"]
    )
    def test_anything_else_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a duration such as"):
            parse_duration(text)


class TestSchedules:
    """When a job is due by itself, and what follows its end."""

    def test_a_text_or_a_list_in_a_zone(self, tmp_path: Path) -> None:
        one = job_of('schedule: "30 2 * * *"\ntimezone: Europe/Berlin', tmp_path)
        two = job_of('schedule: ["@daily", 5 4 * * *]', tmp_path)
        assert (one.schedule, one.timezone) == (("30 2 * * *",), "Europe/Berlin")
        assert (two.schedule, two.timezone) == (("@daily", "5 4 * * *"), "UTC")
        assert Configs([two]).schedules["job"].next_due(0) == (4 * 60 + 5) * 60

    def test_no_worker_is_told(self, tmp_path: Path) -> None:
        (job, _other) = jobs_of(
            "- {name: a, image: b, schedule: '@daily', timezone: Asia/Tokyo, on_failure: c}\n- {name: c, image: b}",
            tmp_path,
        )
        assert job.to_wire() == {"command": None, "image": "b", "name": "a"}

    def test_what_follows_needs_a_worker_that_can_be_told_of_its_cause(self, tmp_path: Path) -> None:
        configs = Configs(jobs_of("- {name: a, image: b, on_success: c}\n- {name: c, image: b}", tmp_path))
        assert configs.names_for((), 1) == {"a"}
        assert configs.names_for((), 2) == {"a", "c"}
        assert [job["name"] for job in configs.to_wire(1)] == ["a"]

    def test_what_follows_has_the_defaults_of_its_parameters(self, tmp_path: Path) -> None:
        text = "- {name: a, image: b, on_failure: c}\n"
        text += "- {name: c, image: b, priority: 3, parameters: {X: {default: y}, Z: }}"
        configs = Configs(jobs_of(text, tmp_path))
        assert configs.follow_up("a", "failure") == ("c", {"X": "y"}, 3)
        assert configs.follow_up("a", "success") is configs.follow_up("gone", "failure") is None

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("schedule: 0 3 * *", '3:13: schedule: expected .*: "0 3 \\* \\*": this is not five fields'),
            ("schedule: [5 4 * * *, 0 9 30 2 *]", '3:25: schedule: .* "30": never comes'),
            ("schedule: []", "3:13: schedule: an empty list is never due"),
            ("schedule: 5", "3:13: schedule: expected .*, not 5"),
            ("schedule: {cron: a}", "3:13: schedule: expected .*, not a map"),
            ('schedule: "@daily"\ntimezone: Europe/Belin', "4:13: timezone: .*did you mean Europe/Berlin"),
            ("timezone: Europe/Berlin", "3:3: timezone: says when a schedule is due, and there is none"),
            ('schedule: "@daily"\nparameters: {A: {required: true}}', "3:3: schedule: nobody sets A"),
            ("on_failure: jib", "3:3: on_failure: there is no job named .*; did you mean job"),
            ("on_success: job", "3:3: on_success: leads back to this job, for ever: job -> job"),
            ("schedule: * * * * *", "3:14: .*; put the value in quotes"),
            ("schedule: @daily", "3:13: .*; put the value in quotes"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_place(self, text: str, error: str, tmp_path: Path) -> None:
        lines = "".join(f"  {line}\n" for line in text.split("\n"))
        (found,) = errors_of("- name: job\n  image: busybox\n" + lines, tmp_path)
        assert re.match(f"jobs.yaml:{error}", found), found

    def test_a_chain_that_leads_back_is_shown(self, tmp_path: Path) -> None:
        text = "- {name: a, image: i, on_failure: b}\n- {name: b, image: i, on_success: c}\n"
        text += "- {name: c, image: i, on_failure: a}"
        found = errors_of(text, tmp_path)
        assert found[0] == "jobs.yaml:1:23: on_failure: leads back to this job, for ever: a -> b -> c -> a"
        assert len(found) == 3

    def test_two_ways_to_one_end_lead_nowhere_back(self, tmp_path: Path) -> None:
        text = "- {name: a, image: i, on_failure: b, on_success: c}\n- {name: b, image: i, on_success: c}\n"
        text += "- {name: c, image: i}"
        assert len(jobs_of(text, tmp_path)) == 3

    def test_what_follows_may_require_nothing(self, tmp_path: Path) -> None:
        text = "- {name: a, image: i, on_failure: b}\n- {name: b, image: i, parameters: {X: {required: true}}}"
        assert errors_of(text, tmp_path) == [
            "jobs.yaml:1:23: on_failure: b requires X, which nobody sets: give it a default"
        ]
