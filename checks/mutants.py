"""Breaks the code on purpose, one line at a time, and sees that a test goes red each time.

A mutant is an exact piece of source and what stands there instead, and the tests that guard it (as for `pytest -k`).
Each runs in a copy of the tree. A piece that is not there exactly once is a stale mutant: the code has moved on, and so
must this list. Exit 1 where a mutant survived, is stale, or has no tests.

    python checks/mutants.py                 all of them
    python checks/mutants.py grace origin    those whose name holds one of the words
    python checks/mutants.py --simulate      those that the simulation finds, by that
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("*.py", "*.yaml", "*.toml", "*.md", "jobworker", "tests", "checks", "deploy", "docs")
TESTS = ("test_jobworker.py", "tests")
TIMEOUT_SECONDS = 180
RED = re.compile(r"^(?:FAILED|ERROR) \S*?::(\S+)", re.MULTILINE)
NO_TESTS_COLLECTED = 5
SIMULATION = "the simulation"
HISTORIES = 1_000


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    tests: str
    old: str
    new: str


# What the simulation finds, too: of the store, the dispatcher, sessions and attempts. Not what only a worker meets that
# breaks the protocol, nor what breaks no promise that it counts.
SIMULATED = {
    "what follows a success",
    "overlap",
    "a due time is dealt with once",
    "an old cursor",
    "a clock set far back",
    "the newest stays",
    "priority",
    "retries' backoff",
    "concurrency",
    "the slots of who went",
    "slots are counted",
    "a command that hangs is ended",
    "tags",
    "grace after a start",
    "a key belongs to a body",
    "the floor of the backoff",
    "allowed images",
    "group commit: results before their commit",
    "guard on the attempt",
    "guard on the worker",
    "the stale is settled",
    "unstarted is queued again",
    "the sweep at the start",
    "a log has a limit",
    "guard on the state",
    "guard of a failure",
    "a log is kept once",
    "cancelled, not failed",
    "what its worker forgot is lost",
    "grace",
    "two phases: no start without Go",
    "kept until Settled",
    "the log after a new connection",
    "a killed docker",
    "lost after the grace",
    "stop is said again",
    "retries' bound",
    "a delay is a duration",
    "a jump is seen",
    "the timeout",
    "no answer is none",
    "the late end of a connection",
    "a log begins anew",
}
MUTANTS = (
    # what comes by itself
    Mutant(
        "what follows a success",
        "jobworker/state.py",
        "Store or Promise12",
        "    if ended:\n        _follow(db, now, rules)\n",
        "",
    ),
    Mutant("overlap", "jobworker/due.py", "Overlap", "[0] >= most", "[0] > 9"),
    Mutant(
        "a due time is dealt with once",
        "jobworker/due.py",
        "DueTimes or JobsYamlChanges",
        "                    self._move(due.job.name, due.instant)\n",
        "                    pass\n",
    ),
    Mutant("an old cursor", "jobworker/due.py", "an_old_cursor", ", now, key=key)", ", now)"),
    Mutant(
        "a clock set far back", "jobworker/due.py", "more_than_a_day_ahead", "upto > now + TOO_FAR_SECONDS for", "0 for"
    ),
    Mutant(
        "the newest stays",
        "jobworker/retention.py",
        "Store or Schedules",
        '    rows = [row for row in rows if row["id"] not in kept][:limit]\n',
        "",
    ),
    Mutant("require", "jobworker/api.py", "Require", "if not require or row", "if row or row"),
    # the store: what is answered is on disk, and only what fits the state is taken
    Mutant(
        "group commit: results before their commit",
        "jobworker/store.py",
        "Store or Promise01 or Promise11 or on_disk",
        "            notes = database.commit()\n",
        "            self._hand_out(group, results, database.notes)\n"
        "            notes = database.commit()\n            return True\n",
    ),
    Mutant(
        "durability",
        "jobworker/store.py",
        "Store or Promise01",
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = NORMAL",
    ),
    Mutant(
        "one server a database",
        "jobworker/store.py",
        "a_database_has_one_server",
        "PRAGMA locking_mode = EXCLUSIVE",
        "PRAGMA locking_mode = NORMAL",
    ),
    Mutant(
        "guard on the attempt", "jobworker/state.py", "Store or Version2Worker", "AND attempt = :attempt AND", "AND"
    ),
    Mutant(
        "guard on the worker",
        "jobworker/state.py",
        "Store or Version2Worker",
        "AND worker = :worker AND state",
        "AND state",
    ),
    Mutant(
        "guard on the state",
        "jobworker/state.py",
        "Store or Version2Worker or never_changes",
        ':worker AND state = :from_state"',
        ':worker"',
    ),
    Mutant(
        "guard of a failure",
        "jobworker/state.py",
        "Store or Version2Worker",
        "    if not start(db, worker, job, attempt, now):\n",
        "    if start(db, worker, job, attempt, now) is None:\n",
    ),
    Mutant("cancelled, not failed", "jobworker/state.py", "Store or cancel", 'if row["cancelling"]:', "if False:"),
    Mutant(
        "unstarted is queued again",
        "jobworker/state.py",
        "Store or an_unstarted_job or did_not_start",
        '        if row["state"] == "assigned":\n            _requeue(',
        "        if False:\n            _requeue(",
    ),
    Mutant(
        "what its worker forgot is lost",
        "jobworker/state.py",
        "Store or no_longer_knows",
        "        else:\n            _lose(",
        "        elif False:\n            _lose(",
    ),
    Mutant("priority", "jobworker/state.py", "Store or higher_priority", '(-job["priority"], job["id"])', 'job["id"]'),
    Mutant("a log is kept once", "jobworker/logs.py", "Store or kept_once or twice", "if offset < have:", "if False:"),
    Mutant(
        "a log has a limit",
        "jobworker/logs.py",
        "LogLimit",
        "if have > LOG_HEAD_BYTES + LOG_TAIL_BYTES:",
        "if False:",
    ),
    # the server: retries, grace, strangers, framing
    Mutant(
        "retries' bound", "jobworker/config.py", "tried_again", "failures > job.retries", "failures > job.retries + 1"
    ),
    Mutant(
        "retries' backoff", "jobworker/config.py", "tried_again", "job.retry_delay * 2.0 **", "job.retry_delay * 0.0 **"
    ),
    Mutant(
        "concurrency",
        "jobworker/state.py",
        "than_its_concurrency",
        "claim(db, offers, db.limits)",
        "claim(db, offers, {})",
    ),
    Mutant(
        "the slots of who went",
        "jobworker/state.py",
        "malformed_frame_closes",
        "    db.notes.slots.pop(worker, None)\n",
        "",
    ),
    Mutant("slots are counted", "jobworker/state.py", "StoreHistories", "free=slots.free + more", "free=slots.free"),
    Mutant(
        "a failed claim undoes no group",
        "jobworker/store.py",
        "where_it_fails_all_else_stands",
        "            if not alone:\n                self._claim()\n",
        "            self._claim()\n",
    ),
    Mutant(
        "a name stays with its newest connection",
        "server.py",
        "does_not_take_the_name_back",
        "self._attach(worker, again=True)",
        "self._attach(worker)",
    ),
    Mutant(
        "who is back loses nothing",
        "jobworker/state.py",
        "is_back_keeps_its_job",
        "WHERE id = ? AND NOT connected",
        "WHERE id = ?",
    ),
    Mutant(
        "who does not come back",
        "server.py",
        "does_not_come_back_loses_it",
        "                del self._to_detach[worker_id]\n                self._lose_overdue()\n",
        "                del self._to_detach[worker_id]\n",
    ),
    Mutant(
        "jobs at the pace of the link",
        "server.py",
        "go_out_at_its_pace",
        "worker.send_jobs(enqueues)",
        "worker.send(*enqueues)",
    ),
    Mutant(
        "a command that hangs is ended",
        "client.py",
        "whose_container_has_ended_is_ended or one_that_reads_the_log",
        "if each.life.hangs(states.get(each.life.container))]",
        "if False]",
    ),
    Mutant(
        "nothing is swept before it is held",
        "client.py",
        "comes_back_as_the_worker_sweeps",
        "            self.server_id = None  # until",
        "            self.server_id = server_id  # until",
    ),
    Mutant(
        "a let go life is looked at",
        "client.py",
        "let_go_holds_up_no_other",
        "        self.living[attempt] = None\n        attempt.run(",
        "        attempt.run(",
    ),
    Mutant(
        "a log is not read for ever",
        "jobworker/life.py",
        "their_job_ends_and_says_so",
        "not is_running(state), failed >= LOG_TRIES\n",
        "not is_running(state), False\n",
    ),
    Mutant(
        "a log is read to the container's end",
        "jobworker/life.py",
        "ends_too_early_loses_none",
        "                if has_ended:\n",
        "                if True:\n",
    ),
    Mutant(
        "half an answer is none",
        "jobworker/container.py",
        "half_an_answer_is_not",
        "if answer.code == 0 and is_answer(answer.out):",
        "if answer.code == 0:",
    ),
    Mutant(
        "one that can't be inspected",
        "jobworker/container.py",
        "others_are_found_beside_it",
        "            if found is None:  # one may",
        "            if False:  # one may",
    ),
    Mutant(
        "a shift of delays is not lost",
        "jobworker/store.py",
        "a_shift_that_fails",
        "self._owed = [request for request in group if not (request.future or request.callback)]",
        "pass",
    ),
    Mutant(
        "what comes after a shift of delays knows of it",
        "jobworker/store.py",
        "a_shift_that_fails",
        "[*self._owed, *group]",
        "[*group, *self._owed]",
    ),
    Mutant(
        "nothing is stored before what was said before",
        "jobworker/state.py",
        "does_not_fit",
        "number != slots.frames + 1",
        "number <= slots.frames",
    ),
    Mutant(
        "a log that can't be read again stays",
        "jobworker/life.py",
        "read_again_stays",
        "            if goes_on is None:\n                break",
        "            if False:\n                break",
    ),
    Mutant(
        "what waits is forgotten",
        "server.py",
        "forgotten_with_what_the_store",
        "        worker.forget_claimed()\n",
        "",
    ),
    Mutant(
        "nothing but a 0 is a success",
        "jobworker/container.py",
        "though_its_log_can_not_be_read",
        "if type(code) is not int or abs(code) >= 2**31:",
        "if False:",
    ),
    Mutant(
        "a timeout is for what still runs",
        "jobworker/life.py",
        "ended_in_time",
        'if state is None or may_run(str(state.get("Status"))):',
        "if True:",
    ),
    Mutant(
        "what is let go does not start later",
        "client.py",
        "does_not_start_later",
        "if attempt in self.living:  # its container",
        "if False:  # its container",
    ),
    Mutant(
        "only docker's own words run a container again",
        "jobworker/life.py",
        "exits_125 or comes_back_empty",
        "lacks = complains and is_first and image in self._engine.images and is_absent(image, beginning)",
        "lacks = code == NOT_STARTED and image in self._engine.images",
    ),
    Mutant(
        "offers by free slots",
        "jobworker/state.py",
        "most_free_slots",
        "(-offer.free, db.chance.random(),",
        "(offer.free, db.chance.random(),",
    ),
    Mutant("offers by chance", "jobworker/state.py", "chance_decides", "free, db.chance.random(),", "free, 0.0,"),
    Mutant("tags", "jobworker/config.py", "tags_allow", "if set(job.tags) <= set(tags)", "if True"),
    Mutant("grace", "server.py", "within_its_grace or Promise03", "0 if leaves else self.grace", "0"),
    Mutant(
        "grace after a start", "server.py", "Promise02 or Promise03 or restart", "self.grace if version > 1 else 0", "0"
    ),
    Mutant("lost after the grace", "server.py", "never_comes_back", "if away.deadline <= now", "if False"),
    Mutant(
        "stop is said again",
        "server.py",
        "repeated_to_a_worker",
        "            if held.cancelling:\n",
        "            if False:\n",
    ),
    Mutant("the stale is settled", "server.py", "stale", "else Settled)(job, attempt)", "else Go)(job, attempt)"),
    Mutant("Origin", "jobworker/web.py", "another_site", "if not page and (foreign or", "if not page and (False or"),
    Mutant("Origin of a worker", "server.py", "cannot_be_a_worker", "origins=[None]", "origins=None"),
    Mutant("Host", "jobworker/web.py", "Strangers", "and not self._knows(host)", "and False"),
    Mutant("token", "jobworker/web.py", "Strangers", "return not tokens or", "return True or"),
    Mutant(
        "framing: a header twice",
        "jobworker/message.py",
        "FramingAttacks",
        "if name in headers and name in SINGLE_HEADERS:",
        "if False:",
    ),
    Mutant(
        "framing: chunked bodies",
        "jobworker/message.py",
        "FramingAttacks",
        'if "transfer-encoding" in headers:',
        "if False:",
    ),
    Mutant(
        "framing: digits",
        "jobworker/message.py",
        "FramingAttacks",
        're.fullmatch("[0-9]{1,18}", length)',
        "length.isprintable()",
    ),
    # the server, when others limp
    Mutant(
        "a pattern takes a bounded time",
        "jobworker/config.py",
        "match_would_take_too_long",
        "compiled(self.pattern).fullmatch(value, matching)",
        "re.compile(self.pattern).fullmatch(value)",
    ),
    Mutant(
        "frames are cut",
        "protocol.py",
        "server_limps and Frames",
        "if batch and size + len(frame) > BATCH_BYTES:",
        "if False:",
    ),
    Mutant(
        "what is not stored is waited for",
        "server.py",
        "faster_than_the_disk",
        "while self._unstored_bytes > MAX_UNSTORED_BYTES:",
        "while False:",
    ),
    Mutant(
        "a message counts",
        "server.py",
        "as_if_it_were_alone",
        " + len(messages) * MESSAGE_BYTES",
        "",
    ),
    Mutant(
        "who reads nothing is left",
        "server.py",
        "reads_nothing",
        "if socket.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:",
        "if False:",
    ),
    Mutant("configs go out once", "server.py", "go_out_once", "if self.configs is not configs:", "if True:"),
    Mutant("tags are not kept", "jobworker/config.py", "not_kept_for_ever", "len(self._names) >= NAMES_LIMIT", "False"),
    Mutant(
        "a delay is a duration",
        "jobworker/state.py",
        "server_limps and Clock",
        "        shift_delays(db, now - clock, now)\n",
        "        pass\n",
    ),
    Mutant(
        "a jump is seen",
        "jobworker/clock.py",
        "server_limps and Clock",
        "if abs(jump) >= CLOCK_JUMP_SECONDS:",
        "if False:",
    ),
    Mutant(
        "a key belongs to a body",
        "jobworker/state.py",
        "Idempotency",
        "    if content not in (None, key.content):",
        "    if False:",
    ),
    Mutant(
        "a handshake on any request",
        "jobworker/web.py",
        "test_places and TestRunner",
        "        if not RUNNER_START.match(head) or not",
        "        if self.patience < SEND_SECONDS or not RUNNER_START.match(head) or not",
    ),
    Mutant(
        "no request is waited for without end",
        "jobworker/web.py",
        "does_not_come_is_ended",
        "            if place.until < now and",
        "            if False and",
    ),
    Mutant(
        "without descriptors someone makes room",
        "jobworker/web.py",
        "without_descriptors",
        "if error.errno in (errno.EMFILE, errno.ENFILE):",
        "if False:",
    ),
    Mutant(
        "who says nothing makes room",
        "server.py",
        "never_says_anything",
        "        if len(self._silent) > MAX_SILENT:\n",
        "        if False:\n",
    ),
    Mutant(
        "who has said something stays",
        "server.py",
        "has_said_something",
        "                async for data in socket:\n                    self._silent.pop(socket, None)\n",
        "                async for data in socket:\n",
    ),
    Mutant(
        "who has gone is not counted",
        "server.py",
        "have_gone_are_not",
        "        finally:\n            self._silent.pop(socket, None)\n",
        "        finally:\n            pass\n",
    ),
    Mutant(
        "jobs.yaml is read beside the loop",
        "server.py",
        "callers_are_served_meanwhile",
        "await asyncio.to_thread(read_configs, self.options.jobs)",
        "read_configs(self.options.jobs)",
    ),
    Mutant(
        "version 1 is no name",
        "server.py",
        "like_those_of_version_1",
        "self.grace if version > 1 else 0",
        'self.grace if not name.startswith("version-1-") else 0',
    ),
    Mutant(
        "an unread log is not in memory",
        "jobworker/logs.py",
        "ask_for_a_log_and_do_not",
        "        if size >= LOG_PIECES_BYTES:\n",
        "        if False:\n",
    ),
    Mutant(
        "configs are asked for some at a time",
        "jobworker/api.py",
        "some_at_a_time",
        "in_pieces(configs.by_name, PAGE_CONFIGS)",
        "in_pieces(configs.by_name, 9_999)",
    ),
    Mutant(
        "unread events are not in memory",
        "jobworker/events.py",
        "who_listen_and_do_not",
        "        if too_many or sum(",
        "        if too_many or 0 * sum(",
    ),
    Mutant(
        "a copy is another server",
        "jobworker/backup.py",
        "test_backup and TestCopy",
        '            target.execute("UPDATE server SET id = ?", (server_id,))\n',
        "",
    ),
    Mutant(
        "a copy holds up no commit",
        "jobworker/store.py",
        "test_backup and TestCopy",
        "if not self._requests.empty() and not self.commit_waiting():",
        "if False:",
    ),
    # the worker: two phases, the outbox, what a former life left
    Mutant(
        "two phases: no start without Go",
        "client.py",
        "before_go or instead",
        "            self.session.send(JobRunning(*attempt.key))\n",
        "            self.session.send(JobRunning(*attempt.key))\n            self._start(attempt)\n",
    ),
    Mutant(
        "kept until Settled",
        "client.py",
        "until_it_is_settled or on_the_next_connection",
        "            if self.session.version == 1:  # it says no Settled\n",
        "            if True:\n",
    ),
    Mutant(
        "the sweep at the start",
        "client.py",
        "adopts or meanwhile",
        "        found = await self.engine.containers(labels)\n",
        "        found: list[Any] = []\n",
    ),
    Mutant(
        "what was only created",
        "client.py",
        "died_before_its_container_started",
        "if container in gone or (",
        "if (",
    ),
    Mutant(
        "the floor of the backoff", "client.py", "frenzy", "BACKOFF_FLOOR_SECONDS = 0.25", "BACKOFF_FLOOR_SECONDS = 0.0"
    ),
    Mutant(
        "the log after a new connection",
        "client.py",
        "Promise05 or next_connection",
        "            attempt.life.output.resend()\n",
        "            pass\n",
    ),
    Mutant(
        "a killed docker",
        "jobworker/container.py",
        "killed_docker",
        "if answer.code == 0 and is_answer(answer.out):",
        "if answer.code <= 0:",
    ),
    Mutant(
        "no answer is none",
        "jobworker/container.py",
        "client_limps and NoAnswer",
        "and about and is_absent(about, answer.err)",
        "",
    ),
    Mutant(
        "the late end of a connection",
        "jobworker/state.py",
        "StoreHistories",
        " WHERE id = ? AND connected_at = ?",
        " WHERE id = ? AND connected_at IS NOT ?",
    ),
    Mutant(
        "a log begins anew",
        "jobworker/output.py",
        "LogReadAgain",
        "        self._again = True\n",
        "        pass\n",
    ),
    Mutant(
        "a secret is no argument",
        "jobworker/container.py",
        "no_argument_of_docker",
        'option("--env", [name for name in everything if name not in filed])',
        'option("--env", [f"{name}={everything[name]}" for name in everything if name not in filed])',
    ),
    Mutant("allowed images", "jobworker/life.py", "does_not_allow", "return not globs or (", "return True or ("),
    Mutant(
        "the timeout",
        "jobworker/life.py",
        "past_its_timeout",
        "self._started + timeout",
        "self._started + timeout + 1e9",
    ),
    # the worker, when its engine, its host or its server is not what it should be
    Mutant(
        "what has started is waited for",
        "jobworker/life.py",
        "as_long_as_it_takes",
        "ENGINE_PATIENCE_SECONDS if unreached else math.inf",
        "ENGINE_PATIENCE_SECONDS",
    ),
    Mutant(
        "a stop that can't be started",
        "jobworker/container.py",
        "is_stopped_all_the_same",
        'except (NotStarted, PastDeadline) as error:\n            log.warning("docker stop',
        'except PastDeadline as error:\n            log.warning("docker stop',
    ),
    Mutant(
        "a removal that can't be started",
        "jobworker/container.py",
        "does_not_end_the_worker",
        "except (NotStarted, PastDeadline) as error:\n            return dict.fromkeys",
        "except PastDeadline as error:\n            return dict.fromkeys",
    ),
    Mutant(
        "a run that can't be started",
        "jobworker/life.py",
        "when_it_is_there_again",
        "if error.errno == errno.E2BIG or clock() > give_up_at:",
        "if True:",
    ),
    Mutant(
        "a log that can't be asked for",
        "jobworker/container.py",
        "CanNotBeStarted",
        'except NotStarted as error:\n            log.warning("docker logs could',
        'except PastDeadline as error:\n            log.warning("docker logs could',
    ),
    Mutant(
        "a version 1 server is another one each time",
        "client.py",
        "Version1Server",
        "                if session.version == 1:\n                    self._leave_behind()\n",
        "",
    ),
    Mutant(
        "the first of one name",
        "client.py",
        "the_first_counts",
        "for config in reversed(configs)",
        "for config in configs",
    ),
    Mutant(
        "another's folder for locks",
        "jobworker/identity.py",
        "folder_for_locks",
        "status.st_uid != os.getuid() or ",
        "",
    ),
    Mutant(
        "a folder for locks that is open",
        "jobworker/identity.py",
        "folder_for_locks",
        " or stat.S_IMODE(status.st_mode) & 0o077",
        "",
    ),
    # the wire
    Mutant(
        "a name in code points",
        "protocol.py",
        "Frames",
        "len(name)) + name.encode()",
        "len(name.encode())) + name.encode()",
    ),
    Mutant("a name as long as told", "protocol.py", "Frames", "if len(name) != length:", "if False:"),
    Mutant("no batch in a batch", "protocol.py", "Frames", "if frames[-1][:1] == bytes([_BATCH]):", "if False:"),
    Mutant("raw UTF-8", "protocol.py", "Frames", "JSONEncoder(ensure_ascii=False, sep", "JSONEncoder(sep"),
)


def copy_tree(folder: Path) -> None:
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(path, folder)


def run_tests(folder: Path, tests: str) -> tuple[int | None, str]:
    """Give the exit code of pytest, or of the simulation, None where it had to be ended, and what went red first."""
    chosen = f"({tests}) and not RealEngine"
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, *TESTS]
    if tests == SIMULATION:
        words = [sys.executable, "checks/simulate.py", "--histories", str(HISTORIES), "--first"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it still ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            return None, f"no end within {TIMEOUT_SECONDS} s"
    red = RED.search(output) or re.search(r"^(seed .*)$", output, re.MULTILINE)
    return process.returncode, red[1] if red else output.strip().rpartition("\n")[2]


def try_mutant(folder: Path, mutant: Mutant, tests: str) -> tuple[bool, str]:
    """Break the copy, run the tests, mend it; whether a test noticed, and which."""
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return False, f"stale mutant: its piece of {mutant.file} is there {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        code, told = run_tests(folder, tests)
    finally:
        path.write_text(source)
    if code == NO_TESTS_COLLECTED:
        return False, f"no tests match {tests!r}"
    return code != 0, "SURVIVED" if code == 0 else told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name holds one of these")
    parser.add_argument("--simulate", action="store_true", help="see that the simulation finds what it should find")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.words or any(word in each.name for word in options.words)]
    chosen = [mutant for mutant in chosen if mutant.name in SIMULATED or not options.simulate]
    if unknown := SIMULATED - {mutant.name for mutant in MUTANTS}:
        print(f"there are no mutants of these names: {', '.join(sorted(unknown))}")
        return 1
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_tree(folder)
        every = SIMULATION if options.simulate else " or ".join(sorted({mutant.tests for mutant in chosen}))
        code, told = run_tests(folder, every)
        if code != 0:  # a busy machine may have been too slow for one of them
            code, told = run_tests(folder, every)
        if code != 0:
            print(f"the tests are red before anything is broken: {told}")
            return 1
        for mutant in chosen:
            begin = time.monotonic()
            noticed, told = try_mutant(folder, mutant, SIMULATION if options.simulate else mutant.tests)
            survivors += not noticed
            print(f"{mutant.name:50} {time.monotonic() - begin:4.0f} s  {'' if noticed else '! '}{told}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
