"""The verdict on a storm of `chaos.py`: promise by promise, each from the evidence alone.

What the server says is compared with what the engine and the jobs themselves have noted. It touches nothing.
"""

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

GRACE_SECONDS = 6.0
UNDISTURBED_SECONDS = 4.0  # with server, link and worker up for so long, a worker is expected to be back
RETRY_SECONDS = 9.0  # but one that has just started asks docker again only so long after docker's limp
HEALTH_SECONDS = 10.0  # for the slowest answer of /healthz on a busy machine
UNKNOWN_CODE = 255  # what an engine says of a container that ended just when it was stopped
PROMPT_SECONDS = 1.0  # for nine of ten

Job = dict[str, Any]
Key = tuple[int, int]  # job, attempt
Probe = tuple[float, float, int]  # when /healthz was asked for, seconds to the answer, its status (0: none)


@dataclass(frozen=True)
class Kind:
    """A sort of job, and what must come out of it."""

    lines: int = 3  # on each of its streams
    pause: str = "0.05"  # seconds after each line
    code: int = 0
    good_attempt: int = 1  # from this attempt on it exits 0 whatever `code` says; 0: never
    streams: int = 1  # 2: stdout and stderr in turns
    config: Job = field(default_factory=dict)

    def exit_code(self, attempt: int) -> int:
        return self.code if not self.good_attempt or attempt < self.good_attempt else 0


KINDS = {
    "quick": Kind(lines=0),
    "prints": Kind(lines=40),
    "fails": Kind(code=3, good_attempt=0, config={"on_failure": "told"}),
    "slow": Kind(lines=60, pause="0.1"),
    "burst": Kind(lines=4000, pause=""),
    "mixed": Kind(lines=25, streams=2),
    "flaky": Kind(code=4, good_attempt=3, config={"retries": 2, "retry_delay": "0.3", "on_success": "told"}),
    "hopeless": Kind(code=5, good_attempt=0, config={"retries": 2, "retry_delay": "0.3", "on_failure": "told"}),
    "steady": Kind(lines=30, pause="0.1", config={"retries": 2, "retry_delay": "0.3"}),
    "late": Kind(lines=200, pause="0.1", config={"timeout": "2s", "stop_grace_period": "1s"}),
    "deaf": Kind(lines=200, pause="0.1", config={"timeout": "2s", "stop_grace_period": "1s"}),
    "due": Kind(config={"schedule": "* * * * *"}),
    "told": Kind(),
}
UNASKED = {"due", "told"}


@dataclass
class Evidence:
    """All that was seen from outside."""

    accepted: dict[int, str] = field(default_factory=dict)  # job id -> kind
    posts: int = 0
    cancels: dict[int, float] = field(default_factory=dict)  # job id -> when DELETE was answered with 200
    seen: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # worker -> when the server, asked and answering, listed it
    disturbed: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    kills: Counter[str] = field(default_factory=Counter)
    finals: dict[int, Job] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)
    attempts: dict[Key, Job] = field(default_factory=dict)
    logs: dict[Key, str] = field(default_factory=dict)
    starts: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    deaths: dict[Key, tuple[float, int]] = field(default_factory=dict)
    notes: Counter[Key] = field(default_factory=Counter)  # what the jobs wrote themselves
    left: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    process_starts: dict[str, list[float]] = field(default_factory=dict)
    limps: list[tuple[float, float]] = field(default_factory=list)  # docker's and the engine's
    without_engine: list[tuple[float, float]] = field(default_factory=list)  # it was being stopped, away or starting
    unheard: set[Key] = field(default_factory=set)  # ended meanwhile
    probes: list[Probe] = field(default_factory=list)


FINAL = ("success", "failure", "cancelled")
Finding = tuple[bool, str]


def seconds(moment: str) -> float:
    return dt.datetime.fromisoformat(moment).timestamp()


def within(moment: float, spans: list[tuple[float, float]]) -> bool:
    return any(begin <= moment <= end for begin, end in spans)


def story(it: Evidence, key: Key) -> str:
    """All that is known of an attempt, on one line."""
    death = it.deaths.get(key)
    engine = f"started {it.starts[key]}, died {death}" if key in it.starts else "never started"
    cancel = f", cancelled at {it.cancels[key[0]]}" if key[0] in it.cancels else ""
    return f"{it.jobs[key[0]]['name']} {key}: {engine}{cancel}\n      {it.attempts.get(key)}\n      {it.jobs[key[0]]}"


def own_end(it: Evidence, key: Key) -> bool:
    """Whether nothing of ours could have ended that container early."""
    timed = "timeout" in KINDS[it.jobs[key[0]]["name"]].config
    return key[0] not in it.cancels and not timed and it.attempts[key]["reason"] != "lost"


def accepted_jobs_are_there(it: Evidence) -> Iterator[Finding]:
    for job, kind in it.accepted.items():
        yield job in it.jobs and it.jobs[job]["name"] == kind, f"job {job} ({kind}) was accepted and is not there"
    asked = [job for job in it.jobs.values() if job["name"] not in UNASKED]
    yield len(asked) == it.posts, f"{it.posts} different keys were posted, {len(asked)} jobs are there"


def jobs_are_final(it: Evidence) -> Iterator[Finding]:
    for job in it.jobs.values():
        yield job["state"] in FINAL, f"not final: {story(it, (job['id'], job['attempt']))}"


def final_jobs_stay(it: Evidence) -> Iterator[Finding]:
    for job, final in it.finals.items():
        yield final == it.jobs.get(job), f"{final} became {it.jobs.get(job)}"
    for change in it.changes:
        yield False, change


def started_once(it: Evidence) -> Iterator[Finding]:
    for key, starts in it.starts.items():
        yield len(starts) == 1 and it.notes[key] <= 1, f"attempt started twice: {story(it, key)}"
    per_job = Counter(job for job, _attempt in it.starts)
    for job, count in per_job.items():
        allowed = 1 + KINDS[it.jobs[job]["name"]].config.get("retries", 0)
        yield count <= allowed, f"{count} starts, {allowed} allowed: {[story(it, k) for k in it.starts if k[0] == job]}"


def attempts_are_apart(it: Evidence) -> Iterator[Finding]:
    for (job, attempt), starts in it.starts.items():
        before = [key for key in it.starts if key[0] == job and key[1] < attempt]
        for key in before:
            lost = it.attempts[key]["reason"] == "lost"  # its host was cut off: nothing can be promised
            apart = key in it.deaths and it.deaths[key][0] <= starts[0]
            yield lost or apart, f"overlap: {story(it, key)}\n   and {story(it, (job, attempt))}"


def outcomes_are_true(it: Evidence) -> Iterator[Finding]:
    for key, attempt in it.attempts.items():
        kind, job = KINDS[it.jobs[key[0]]["name"]], it.jobs[key[0]]
        code = it.deaths[key][1] if key in it.deaths else None
        last = key[1] == job["attempt"]
        reason = "success" if last and job["state"] == "success" else attempt["reason"]
        if last and job["state"] == "cancelled":
            true = key[0] in it.cancels
        elif reason == "success":
            true = code == 0 and attempt["exit_code"] == 0
        elif reason == "exit":
            true = code == attempt["exit_code"] != 0
        elif reason == "timeout":
            true = "timeout" in kind.config
        elif reason == "docker":
            true = key not in it.starts or code == 137
        else:
            true = reason == "lost"
        yield true, f"{reason!r} is not what happened: {story(it, key)}"
        if own_end(it, key) and code is not None:
            unknown = code == UNKNOWN_CODE and within(it.deaths[key][0], it.without_engine)
            yield code == kind.exit_code(key[1]) or unknown, f"its container was ended by another: {story(it, key)}"


def logs_are_whole(it: Evidence) -> Iterator[Finding]:
    for key, text in it.logs.items():
        kind, lines = KINDS[it.jobs[key[0]]["name"]], text.splitlines()
        for stream in ("out", "err")[: kind.streams]:
            got = [line for line in lines if line.startswith(stream)]
            want = [f"{stream} {number}" for number in range(kind.lines)]
            # What is written without an engine is lost to it where the container ends before it is back.
            is_whole = own_end(it, key) and key in it.deaths and key not in it.unheard
            good = got == want if is_whole else got == want[: len(got)]
            wrong = next(
                (n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
            )
            yield good, f"log wrong from line {wrong}, {got[wrong : wrong + 3]} of {len(got)} lines: {story(it, key)}"
        other = [line for line in lines if line[:4] not in ("out ", "err ")]
        # What docker said itself stays where nothing has started, or nobody was left to read the container's log again.
        unread = key not in it.starts or it.attempts[key]["reason"] == "lost"
        yield not other or unread, f"not the job's own lines in the log: {other[:5]}: {story(it, key)}"


def lost_after_the_grace(it: Evidence) -> Iterator[Finding]:
    for key, attempt in it.attempts.items():
        if attempt["reason"] != "lost" or key not in it.starts or fenced(it, key):
            continue
        end, name = seconds(attempt["finished_at"]), attempt["worker"]
        seen = max((asked for asked, answered in it.seen[name] if answered < end - 0.1), default=0)
        since = max(seen, *(start for start in it.process_starts["server"] if start < end))
        yield end - since > GRACE_SECONDS - 0.4, f"lost {end - since:.2f} s after it was there: {story(it, key)}"
        disturbed = [*it.disturbed[name], *it.disturbed["server"], *blind(it, name)]
        calm = longest_gap(disturbed, end - GRACE_SECONDS, end)
        yield (
            calm < UNDISTURBED_SECONDS,
            f"lost, though nothing disturbed its worker for {calm:.1f} s: {story(it, key)}",
        )


def blind(it: Evidence, worker: str) -> Iterator[tuple[float, float]]:
    """Give when a worker that had just started was kept by docker from knowing its containers, and so from a Hello."""
    for start in it.process_starts[worker]:
        end = start + UNDISTURBED_SECONDS
        for limp_begin, limp_end in sorted(it.limps):
            if limp_begin < end and limp_end >= start:
                end = max(end, limp_end + RETRY_SECONDS)
        if end > start + UNDISTURBED_SECONDS:
            yield start, end


def fenced(it: Evidence, key: Key) -> bool:
    """Whether a container was removed while it was only just starting: its worker had died meanwhile."""
    return key in it.deaths and it.deaths[key][1] == 137 and it.deaths[key][0] - it.starts[key][0] < 2


def longest_gap(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Give the longest time between `begin` and `end` that no span covers."""
    longest, at = 0.0, begin
    for start, stop in sorted(spans):
        longest, at = max(longest, min(start, end) - at), max(at, stop)
    return max(longest, end - at)


def cut_off_before_its_start(it: Evidence, key: Key) -> bool:
    """Whether its worker was told to start it, could not as docker limped, and was cut off until it was lost."""
    attempt = it.attempts[key]
    if attempt["reason"] != "lost" or not attempt["started_at"]:
        return False
    begin, end = seconds(attempt["started_at"]), seconds(attempt["finished_at"])
    return any(a < end and b > begin for a, b in it.limps)


def nothing_starts_after_its_end(it: Evidence) -> Iterator[Finding]:
    for key, starts in it.starts.items():
        finished = it.attempts[key]["finished_at"] if key in it.attempts else None
        late = finished is not None and starts[0] > seconds(finished) + 0.1 and not cut_off_before_its_start(it, key)
        cancelled = it.cancels.get(key[0], float("inf"))
        held_up = any(
            begin < starts[0] and cancelled < end for begin, end in it.limps
        )  # its docker run, as DELETE came
        late = late or (starts[0] > cancelled + 5 and not held_up)
        yield key in it.attempts and not late, f"a container started after its attempt was over: {story(it, key)}"


def undisturbed_probes(it: Evidence) -> list[Probe]:
    """Give those that found the server at work: not killed, not stopped, and not just starting."""
    answered = [asked for asked, _took, status in it.probes if status]
    starts = it.process_starts["server"]
    starting = [(start, min((asked for asked in answered if asked > start), default=start)) for start in starts]
    spans = [(0.0, starts[0]), *it.disturbed["server"], *starting]
    return [probe for probe in it.probes if not any(a <= probe[0] + probe[1] and probe[0] <= b for a, b in spans)]


def prompt_share(it: Evidence) -> float:
    probes = undisturbed_probes(it)
    return sum(took < PROMPT_SECONDS for _asked, took, _status in probes) / max(len(probes), 1)


def health_is_told(it: Evidence) -> Iterator[Finding]:
    for asked, took, status in undisturbed_probes(it):
        yield status == 200 and took < HEALTH_SECONDS, f"/healthz, asked at {asked}: {status} after {took:.1f} s"
    yield prompt_share(it) > 0.9, f"only {prompt_share(it):.0%} of /healthz were answered within {PROMPT_SECONDS} s"


def due_times_make_one_job(it: Evidence) -> Iterator[Finding]:
    dues = Counter(job["due_at"] for job in it.jobs.values() if job["name"] == "due")
    for due, count in dues.items():
        yield count == 1 and due is not None, f"{count} jobs were due at {due}"


def ends_are_followed_once(it: Evidence) -> Iterator[Finding]:
    causes = Counter(job["cause"] for job in it.jobs.values() if job["name"] == "told")
    for job in it.jobs.values():
        key = {"failure": "on_failure", "success": "on_success"}.get(job["state"])
        wanted = int(key in KINDS[job["name"]].config)
        if wanted or causes[job["id"]]:
            yield causes[job["id"]] == wanted, f"followed {causes[job['id']]} times: {job}"


PROMISES: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "1  every accepted job is there, once": accepted_jobs_are_there,
    "2  every job became final": jobs_are_final,
    "2  a final job never changed": final_jobs_stay,
    "2  lost only after a whole grace": lost_after_the_grace,
    "3  started at most once an attempt, attempts within retries": started_once,
    "3  attempts of a job never overlap": attempts_are_apart,
    "3  nothing starts after its end": nothing_starts_after_its_end,
    "4  the outcome is the container's own": outcomes_are_true,
    "5  logs are whole and in order": logs_are_whole,
    "7  no container is left behind": lambda it: ((False, name) for name in it.left),
    "8  no traceback": lambda it: ((False, text) for text in it.tracebacks),
    "12 a due time makes one job": due_times_make_one_job,
    "12 what follows an end is there, once": ends_are_followed_once,
    "13 /healthz is answered, whoever limps": health_is_told,
    "10 exits are clean": lambda it: ((False, text) for text in it.exits),
}


def judge(evidence: Evidence) -> int:
    """Print the table and what is wrong; gives the number of violations."""
    details, total = [], 0
    print(f"   {'promise':62}{'checked':>8}{'broken':>8}")
    for promise, check in PROMISES.items():
        findings = list(check(evidence))
        broken = [text for good, text in findings if not good]
        print(f"   {promise:62}{len(findings) or '':>8}{len(broken):>8}")
        details += [f"   {promise.split(maxsplit=1)[1]}: {text}" for text in broken[:8]]
        total += len(broken)
    print(*details, sep="\n")
    return total
