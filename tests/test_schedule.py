"""schedule.py: a job is due when section 12 of the design says so, around every change of every clock.

The oracle is a reading of that page alone: it looks at each minute that a zone's clocks show, and shares no code.
"""

import functools
import itertools
import math
import random
import statistics
import time
import zoneinfo
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.schedule import Schedule, ScheduleError

MINUTE, DAY = 60, 86_400
WINDOW_DAYS = 3
LISTS_PER_WINDOW = 25

# A zone and a day in UTC on which its clocks change. Each is looked at with the day before and the day after.
CHANGES = [
    ("Europe/Berlin", "2026-03-29"),
    ("Europe/Berlin", "2026-10-25"),
    ("America/New_York", "2026-03-08"),
    ("America/New_York", "2026-11-01"),
    ("Europe/Dublin", "2026-03-29"),  # negative: winter is the exception
    ("Europe/Dublin", "2026-10-25"),
    ("Africa/Casablanca", "2026-02-15"),  # negative: in Ramadan
    ("Africa/Casablanca", "2026-03-22"),
    ("Australia/Lord_Howe", "2026-04-04"),  # half an hour
    ("Australia/Lord_Howe", "2026-10-03"),
    ("Pacific/Chatham", "2026-04-04"),  # at a quarter to
    ("Pacific/Chatham", "2026-09-26"),
    ("Antarctica/Troll", "2026-03-29"),  # two hours
    ("Antarctica/Troll", "2026-10-25"),
    ("America/Caracas", "2007-12-09"),  # half an hour, for good
    ("Asia/Kathmandu", "1985-12-31"),  # a quarter, at midnight
    ("America/Havana", "2026-03-08"),  # from midnight on
    ("America/Havana", "2026-11-01"),  # back to midnight
    ("Asia/Beirut", "2026-03-28"),
    ("Asia/Beirut", "2026-10-24"),  # from midnight back to the day before
    ("America/Asuncion", "2024-03-24"),
    ("America/Asuncion", "2024-10-06"),
    ("Africa/Cairo", "2026-04-23"),
    ("Africa/Cairo", "2026-10-29"),
    ("America/Santiago", "2026-04-05"),
    ("America/Santiago", "2026-09-06"),
    ("Atlantic/Azores", "2026-03-29"),
    ("Atlantic/Azores", "2026-10-25"),
    ("America/St_Johns", "2006-04-02"),  # a minute after midnight
    ("America/St_Johns", "2006-10-29"),  # a minute after midnight, back to the day before
    ("Asia/Pyongyang", "2015-08-14"),  # half an hour back from midnight
    ("Asia/Pyongyang", "2018-05-04"),  # half an hour on to midnight
    ("Antarctica/Casey", "2010-03-04"),  # three hours, from 2:00 back to the day before
    ("Pacific/Apia", "2011-12-30"),  # a day that never was
    ("Pacific/Kwajalein", "1993-08-21"),
    ("Pacific/Kwajalein", "1969-09-30"),  # a day but for an hour twice
]
ZONES = sorted({zone for zone, _day in CHANGES} | {"UTC"})
# Without those that skip midnight: cronsim lets `0 */2 * * *` be due at a midnight that no clock shows.
CRONSIM_ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Europe/Dublin", "Africa/Casablanca"]
SPEED_TEXTS = [
    ["* * * * *"],
    ["*/5 9-17 * * mon-fri"],
    ["0-59 0-23 * * *"],
    ["30 2 * * *"],
    ["0 0 29 2 *"],
    ["* * 29 2 *"],
    ["0 0 29 2 1"],
    ["0 0 31 12 *"],
    ["0 0 13 * 5"],
    [f"{minute} */2 * * *" for minute in range(10)],
    [f"{minute} 0 29 2 *" for minute in range(10)],
]


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def shown(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%dT%H:%M") if math.isfinite(instant) else str(instant)


def walk(schedule: Schedule, after: float, count: int) -> list[float]:
    """Give the next `count` due times."""
    steps = itertools.accumulate(range(count), lambda last, _: schedule.next_due(last), initial=after)
    return list(steps)[1:]


# The oracle


def numbers(field: str, least: int, most: int, names: str = "") -> set[int]:
    found: set[int] = set()
    field = field.upper()
    for place, name in enumerate(names.split()):
        field = field.replace(name, str(place + least))
    for item in field.split(","):
        span, _, step = item.partition("/")
        begin, _, end = (f"{least}-{most}" if span == "*" else span).partition("-")
        found |= {n for n in range(int(begin), int(end or begin) + 1) if (n - int(begin)) % int(step or 1) == 0}
    return found


def fits(text: str) -> tuple[Callable[[date], bool], set[tuple[int, int]], bool]:
    """Read a text: does a day fit; which (hour, minute) do; does minute or hour begin with a star?"""
    minute, hour, day, month, weekday = text.split()
    months = numbers(month, 1, 12, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC")
    days, weekdays = numbers(day, 1, 31), numbers(weekday, 0, 7, "SUN MON TUE WED THU FRI SAT")
    weekdays |= {0} if 7 in weekdays else set()

    def day_fits(date_: date) -> bool:
        two = date_.day in days, (date_.weekday() + 1) % 7 in weekdays
        neither_starred = day[0] != "*" and weekday[0] != "*"
        return date_.month in months and (any(two) if neither_starred else all(two))

    times = set(itertools.product(numbers(hour, 0, 23), numbers(minute, 0, 59)))
    return day_fits, times, minute[0] == "*" or hour[0] == "*"


class Window:
    """Each minute from a day before to a day after a day, and what the clocks of a zone show then."""

    def __init__(self, zone: str, day: str) -> None:
        self.begin = int(at(day)) - DAY
        self.end = self.begin + WINDOW_DAYS * DAY
        margin = 3 * DAY // 2
        every_minute = range(self.begin - margin, self.end + margin, MINUTE)
        info = zoneinfo.ZoneInfo(zone)
        clock = [(t, datetime.fromtimestamp(t, info).replace(tzinfo=None)) for t in every_minute]
        self.clock, self.once = self._cut(clock), self._cut(_each_time_once(clock))

    def _cut(self, clock: Iterable[tuple[int, datetime]]) -> list[tuple[int, date, tuple[int, int]]]:
        return [(t, wall.date(), (wall.hour, wall.minute)) for t, wall in clock if self.begin < t <= self.end]

    def due(self, texts: list[str]) -> list[int]:
        """Give all due times after the window's begin and up to its end."""
        found: set[int] = set()
        for text in texts:
            day_fits, times, starred = fits(text)
            known = functools.cache(day_fits)
            minutes = self.clock if starred else self.once
            found |= {t for t, day, time_ in minutes if time_ in times and known(day)}
        return sorted(found)


def _each_time_once(clock: list[tuple[int, datetime]]) -> Iterator[tuple[int, datetime]]:
    """Yield each time of each day: the first minute that shows it, or the first after the gap that swallows it."""
    seen: set[datetime] = set()
    for (_, before), (t, wall) in itertools.pairwise(clock):
        swallowed = before + timedelta(minutes=1)
        while swallowed < wall:
            yield t, swallowed
            swallowed += timedelta(minutes=1)
        if wall not in seen:
            seen.add(wall)
            yield t, wall


window = functools.cache(Window)


# Random texts


def random_field(chance: random.Random, least: int, most: int) -> str:
    def one() -> str:
        low, high = sorted(chance.sample(range(least, most + 1), 2))  # cronsim takes N-N/S for N/S
        step = chance.randint(1, max(1, (most - least) // 2))
        return chance.choice([f"{low}", f"{low}", f"{low}-{high}", f"{low}-{high}/{step}", f"*/{step}", "*"])

    return ",".join(one() for _ in range(chance.choice([1, 1, 1, 2, 3])))


def random_days(chance: random.Random, near: date) -> str:
    """Give the last three fields, often such that a day near this one is among them."""
    days = [near + timedelta(days=n) for n in (-1, 0, 1)]
    month = chance.choice(["*", "*", str(near.month), f"{near:%b}", f"*/{chance.randint(1, 4)}"])
    day = chance.choice(["*", "*", "*,7", str(chance.choice(days).day), random_field(chance, 1, 31)])
    weekday = chance.choice(["*", "*", "0", "7", "5-7", f"{chance.choice(days):%a}", random_field(chance, 0, 7)])
    if ("*/" in day and weekday != "*") or ("*/" in weekday and day != "*"):
        return f"* {month} {weekday}"
    return f"{day} {month} {weekday}"


def random_text(chance: random.Random, near: date) -> str:
    minute = chance.choice(["*", "0", "30", "*/15", "15,45", "59", "1", random_field(chance, 0, 59)])
    hours = ["*", "0", "1", "2", "3", "23", "0-3", "22,23", "*/2", random_field(chance, 0, 23)]
    return f"{minute} {chance.choice(hours)} {random_days(chance, near)}"


def random_texts(seed: str, near: date, count: int) -> Iterator[list[str]]:
    """Yield lists of one to three texts that parse."""
    chance = random.Random(seed)
    while count:
        texts = [random_text(chance, near) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        try:
            Schedule.parse(texts)
        except ScheduleError as error:
            assert "never comes" in str(error)  # noqa: PT017 - by chance; all else that is made here is right
        else:
            count -= 1
            yield texts


class TestTable:
    """The table of section 12, row for row."""

    @pytest.mark.parametrize(
        ("zone", "text", "after", "due"),
        [
            ("Europe/Berlin", "30 2 * * *", "2026-03-28T12:00", "2026-03-29T01:00 2026-03-30T00:30"),
            ("Europe/Berlin", "30 2 * * *", "2026-10-24T12:00", "2026-10-25T00:30 2026-10-26T01:30"),
            (
                "Europe/Berlin",
                "30 * * * *",
                "2026-10-24T23:45",
                "2026-10-25T00:30 2026-10-25T01:30 2026-10-25T02:30 2026-10-25T03:30",
            ),
            ("Europe/Berlin", "0 */2 * * *", "2026-03-28T22:30", "2026-03-28T23:00 2026-03-29T02:00"),
            ("America/New_York", "30 1 * * *", "2026-10-31T12:00", "2026-11-01T05:30 2026-11-02T06:30"),
            ("Australia/Lord_Howe", "15,30 2 * * *", "2026-10-03T02:00", "2026-10-03T15:30 2026-10-04T15:15"),
            ("America/Havana", "30 0 * * *", "2026-03-07T12:00", "2026-03-08T05:00 2026-03-09T04:30"),
            ("UTC", "0 0 29 2 *", "2096-03-01T00:00", "2104-02-29T00:00"),
            ("UTC", "0 0 13 * 5", "2026-02-01T00:00", "2026-02-06T00:00 2026-02-13T00:00 2026-02-20T00:00"),
        ],
    )
    def test_a_row(self, zone: str, text: str, after: str, due: str) -> None:
        wanted = due.split()
        assert [shown(each) for each in walk(Schedule.parse([text], zone), at(after), len(wanted))] == wanted


class TestOracle:
    """Thousands of random texts around the changes of two dozen zones, each minute looked at."""

    @pytest.mark.parametrize(("zone", "day"), CHANGES)
    def test_each_due_time_is_found_forward_backward_and_counted(self, zone: str, day: str) -> None:
        seen = window(zone, day)
        chance = random.Random(day)
        for texts in random_texts(zone + day, date.fromisoformat(day), LISTS_PER_WINDOW):
            schedule, wanted = Schedule.parse(texts, zone), seen.due(texts)
            assert schedule.count_due(seen.begin, seen.end, DAY) == len(wanted), texts
            for instant in [chance.uniform(seen.begin, seen.end), *chance.sample(wanted, min(3, len(wanted)))]:
                place = bisect_right(wanted, instant)
                due = schedule.next_due(instant)
                assert (due if due <= seen.end else None) == next(iter(wanted[place:]), None), (texts, instant)
                assert schedule.latest_due(seen.begin, instant) == next(iter(wanted[:place][-1:]), None), texts
                assert schedule.count_due(seen.begin, instant, DAY) == place, (texts, instant)

    def test_each_window_has_a_change(self) -> None:
        """A guard for the list above: what it tests is there."""
        for zone, day in CHANGES:
            info, begin = zoneinfo.ZoneInfo(zone), at(day)
            offsets = [datetime.fromtimestamp(begin + n * DAY, info).utcoffset() for n in (0, 1)]
            assert offsets[0] != offsets[1], (zone, day)

    def test_a_chain_of_next_or_latest_ones_is_all_there_are(self) -> None:
        for zone, day in CHANGES:
            seen = window(zone, day)
            for texts in ["*/20 * * * *", "10 0-3,21-23 * * *"], ["*/30 23 * * *", "* 0 * * *"]:
                schedule, wanted = Schedule.parse(texts, zone), seen.due(texts)
                assert walk(schedule, seen.begin, len(wanted)) == wanted, (zone, day)
                latest = [schedule.latest_due(seen.begin, end - 1) for end in [*wanted, seen.end + 1]]
                assert latest == [None, *wanted], (zone, day)


class TestCronSim:
    @pytest.mark.parametrize("zone", CRONSIM_ZONES)
    def test_another_program_says_the_same(self, zone: str) -> None:
        info = zoneinfo.ZoneInfo(zone)
        for day in [day for name, day in CHANGES if name == zone] or ["2026-02-27"]:
            begin = at(day) - DAY
            for text, *_ in random_texts(zone + day, date.fromisoformat(day), 40):
                theirs = CronSim(text, datetime.fromtimestamp(begin, info))
                wanted = sorted({each.timestamp() for each in itertools.islice(theirs, 8)})
                assert walk(Schedule.parse([text], zone), begin, len(wanted)) == wanted, text


class TestDays:
    """Section 12, point 2."""

    @pytest.mark.parametrize(
        ("text", "days"),
        [
            ("0 0 13 6 5", "05 12 13 19 26"),  # either
            ("0 0 * 6 5", "05 12 19 26"),  # both
            ("0 0 *,13 6 5", "05 12 19 26"),  # begins with *
            ("0 0 13 6 *", "13"),
            ("0 0 */10 6 *", "01 11 21"),
            ("0 0 * 6 */3", "03 06 07 10 13 14 17 20 21 24 27 28"),
            ("0 0 * jun 7", "07 14 21 28"),  # Sunday is 7
            ("0 0 * JUN Sun", "07 14 21 28"),
            ("0 0 * 6 0", "07 14 21 28"),
            ("0 0 * 6 fri-7", "05 06 07 12 13 14 19 20 21 26 27 28"),
        ],
    )
    def test_of_june_2026(self, text: str, days: str) -> None:
        due = walk(Schedule.parse([text]), at("2026-05-31T12:00"), len(days.split()) + 1)
        assert [shown(each)[8:10] for each in due[:-1]] == days.split()
        assert due[-1] > at("2026-07-01") - 1

    @pytest.mark.parametrize(
        ("macro", "text"),
        [
            ("@hourly", "0 * * * *"),
            ("@daily", "0 0 * * *"),
            ("@midnight", "0 0 * * *"),
            ("@weekly", "0 0 * * 0"),
            ("@monthly", "0 0 1 * *"),
            ("@yearly", "0 0 1 1 *"),
            ("@annually", "0 0 1 1 *"),
        ],
    )
    def test_a_macro_is_its_fields(self, macro: str, text: str) -> None:
        assert Schedule.parse([macro]) == Schedule.parse([text])
        assert walk(Schedule.parse([macro]), 0, 3) == walk(Schedule.parse([text]), 0, 3)


class TestUnion:
    """A list of texts is due when any of them is."""

    def test_times_that_fall_together_count_once(self) -> None:
        schedule = Schedule.parse(["0 2 * * *", "*/30 2 * * *", "0 2 29 3 *"], "Europe/Berlin")
        due = [shown(each) for each in walk(schedule, at("2026-03-27T12:00"), 4)]
        assert due == ["2026-03-28T01:00", "2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:00"]
        assert schedule.count_due(at("2026-03-27T12:00"), at("2026-03-29T12:00")) == 3

    def test_the_end_of_a_gap_and_the_next_day_fall_together(self) -> None:
        schedule = Schedule.parse(["0 0 * * *"], "Pacific/Apia")
        assert [shown(each) for each in walk(schedule, at("2011-12-29T12:00"), 2)] == [
            "2011-12-30T10:00",
            "2011-12-31T10:00",
        ]
        assert schedule.count_due(at("2011-12-29T12:00"), at("2011-12-31T00:00")) == 1

    def test_the_same_due_times_have_the_same_text(self) -> None:
        """The store compares it: a new order, case or spacing is not a new schedule."""
        schedule = Schedule.parse(["0  2 * * MON", "@hourly", "0 2 * * mon "], "Europe/Berlin")
        assert schedule.text == "0 * * * *; 0 2 * * mon Europe/Berlin"
        assert schedule == Schedule.parse(["0 * * * *", "0 2 * * Mon"], "Europe/Berlin")
        assert schedule != Schedule.parse(["0 * * * *", "0 2 * * Mon"], "Europe/Vienna")
        assert schedule != Schedule.parse(["0 * * * *"], "Europe/Berlin")


class TestOddClocks:
    """Clocks that are ahead of UTC by odd seconds, as before 1972: due times are whole minutes of theirs."""

    @pytest.mark.parametrize("zone", ["Africa/Monrovia", "Europe/Paris", "America/New_York", "Asia/Manila"])
    def test_local_mean_time(self, zone: str) -> None:
        info, schedule = zoneinfo.ZoneInfo(zone), Schedule.parse(["*/7 * * * *", "5 5 * * *"], zone)
        for due in walk(schedule, at("1844-12-28"), 500) + walk(schedule, at("1883-11-17"), 500):
            local = datetime.fromtimestamp(due, info)
            assert (local.second, local.minute % 7 == 0 or (local.hour, local.minute) == (5, 5)) == (0, True)

    def test_a_gap_ends_at_the_first_whole_minute_that_is_shown(self) -> None:
        """Monrovia's clocks went from 0:00:00 to 0:44:30."""
        schedule = Schedule.parse(["30 0 * * *", "0-59 0 * * *"], "Africa/Monrovia")
        due = walk(schedule, at("1972-01-07T00:44:00"), 3)
        assert [shown(each) for each in due] == ["1972-01-07T00:45", "1972-01-07T00:46", "1972-01-07T00:47"]
        assert all(each % MINUTE == 0 for each in due)

    def test_a_fold_of_odd_seconds(self) -> None:
        """Paris went from 0:01:00 back to 23:51:39 of the day before."""
        info, begin = zoneinfo.ZoneInfo("Europe/Paris"), int(at("1911-03-10T22:00"))
        seen = [t for t in range(begin, begin + 14_400) if datetime.fromtimestamp(t, info).second == 0]
        assert walk(Schedule.parse(["* * * * *"], "Europe/Paris"), begin - 1, len(seen)) == seen


class TestProperties:
    texts = st.integers(0, 10_000).map(lambda n: next(random_texts(str(n), date(2026, 3, 29), 1)))
    instants = st.floats(at("1890-01-01"), at("2200-01-01"))

    @settings(max_examples=150, deadline=None)
    @given(texts, st.sampled_from(ZONES), instants, st.floats(0, 40 * DAY))
    def test_forward_backward_and_count_agree(self, texts: list[str], zone: str, after: float, span: float) -> None:
        schedule = Schedule.parse(texts, zone)
        due = schedule.next_due(after)
        assert after < due
        assert schedule.next_due(after + span) >= due
        assert schedule.next_due(due - 0.001) == due
        assert schedule.latest_due(after, due) == due
        assert schedule.latest_due(after, due - 0.001) is None
        assert (schedule.count_due(after, due), schedule.count_due(after, due - 0.001)) == (1, 0)
        latest = schedule.latest_due(after, after + span)
        assert (latest is None) == (due > after + span) == (schedule.count_due(after, after + span) == 0)
        if latest is not None:
            assert latest <= after + span < schedule.next_due(latest)

    def test_counting_ends_one_above_its_limit(self) -> None:
        schedule = Schedule.parse(["* * * * *"])
        assert [schedule.count_due(0, n * 60) for n in (0, 1, 999, 1000, 1001, 1002, 10**9)] == [
            *(0, 1, 999, 1000),
            *(1001, 1001, 1001),
        ]
        assert schedule.count_due(0, 6000, 10) == 11
        assert schedule.count_due(6000, 0) == 0

    @pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Manila", "Pacific/Kiritimati"])
    def test_no_clock_is_too_far_off(self, zone: str) -> None:
        """Due times are looked for in the years 2 to 9998, give or take two days."""
        for texts in ["* * * * *"], ["0 0 29 2 *"]:
            schedule = Schedule.parse(texts, zone)
            first, last = schedule.next_due(-math.inf), schedule.latest_due(-math.inf, math.inf)
            assert -62_135_596_800 < first < 1.2e8 - 62_135_596_800  # in the first leap year
            assert last is not None
            assert at("9996-02-28") < last < at("9999-01-03")
            assert schedule.next_due(last) == math.inf
            for far in -math.inf, -1e18, -62_135_596_801:
                assert (schedule.next_due(far), schedule.latest_due(-math.inf, far)) == (first, None)
            for far in 253_402_300_801, 1e18, math.inf:
                assert (schedule.next_due(far), schedule.latest_due(0, far)) == (math.inf, last)
                assert schedule.count_due(last, far) == 0


NUMBERS = r"a range N-M, \*/S, N-M/S, a list of these with commas, or \*$"


class TestRefused:
    """Each mistake is told with its words, their field and what to write instead."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0 0 2 * * *", '"0 0 2 * * *": this is not five fields: there are no seconds.*: write "0 2 * * *"'),
            ("0 0 2 * * * 2026", '"0 0 2 * * * 2026": this is not five fields: .*: write "0 2 * * *"'),
            ("0 2 * *", '"0 2 * *": this is not five fields: write minute hour day-of-month month day-of-week'),
            ("", '"": this is not five fields: write minute hour'),
            ("@reboot", '"@reboot": this is not five fields: no job is due because a machine starts: .*POST'),
            ("@every 5m", '"@every 5m": this is not five fields: write .*"*/5 * * * *"'),
            ("@Daily", '"@Daily": this is not five fields: known are @hourly, @daily, @midnight, @weekly'),
            ("@daily root * * x", '"@daily root * * x": this is not five fields: known are'),
            ("5/10 * * * *", 'minute "5/10": a step needs a range: write 5-59/10'),
            ("0 3/2 * * *", 'hour "3/2": a step needs a range: write 3-23/2'),
            ("0 0 1/2 * *", 'day-of-month "1/2": a step needs a range: write 1-31/2'),
            ("0 0 * Feb/2 *", 'month "Feb/2": a step needs a range: write feb-12/2'),
            ("0 0 * * 1/2", 'day-of-week "1/2": a step needs a range: write 1-7/2'),
            ("0 22-2 * * *", 'hour "22-2": a range can\'t go backwards: write 22-23,0-2'),
            ("0 0 * * FRI-SUN", 'day-of-week "FRI-SUN": a range can\'t go backwards: write 5-7,0'),
            ("*/0 * * * *", 'minute "*/0": a step is 1 to 59'),
            ("*/60 * * * *", 'minute "*/60": a step is 1 to 59'),
            ("0 0-5/24 * * *", 'hour "0-5/24": a step is 1 to 23'),
            ("0 0 */32 * *", 'day-of-month "*/32": a step is 1 to 31'),
            ("0 0 L * *", 'day-of-month "L": not known here: name all days that it may be'),
            ("0 0 L-3 * *", 'day-of-month "L-3": not known here: name all days that it may be'),
            ("0 0 1,LW * *", 'day-of-month "LW": not known here: name all days that it may be'),
            ("0 0 15W * *", 'day-of-month "15W": not known here: name all days that it may be'),
            ("0 0 * * friL", 'day-of-week "friL": not known here: name all days that it may be'),
            ("0 0 * * 1#2", 'day-of-week "1#2": not known here: name all days that it may be'),
            ("0 0 ? * 1", 'day-of-month "?": write *'),
            ("H * * * *", 'minute "H": nothing is chosen for you here: write a number'),
            ("H/15 * * * *", 'minute "H/15": nothing is chosen for you here: write a number'),
            ("0~30 * * * *", 'minute "0~30": nothing is chosen for you here: write a number'),
            ("0 0 30 2 *", 'day-of-month "30": never comes in month "2": write a day that it has'),
            ("0 0 31 4,jun */1", 'day-of-week "*/1": cron programs differ .* beside day-of-month "31"'),
            ("0 0 31 4,jun *", 'day-of-month "31": never comes in month "4,jun"'),
            ("0 0 */2 * 1", 'day-of-month "*/2": cron programs differ .* beside day-of-week "1": write .* 1-31/2 for'),
            ("0 0 1 * */2", 'day-of-week "*/2": cron programs differ .* beside day-of-month "1": write .* 0-6/2 for'),
            ("0 0 5,*/2 * 1", 'day-of-month "5,*/2": cron programs differ'),
            ("0 0 * Sept *", 'month "Sept": names have three letters: write sep'),
            ("0 0 * * mon-thurs", 'day-of-week "mon-thurs": names have three letters: write thu'),
            ("60 * * * *", 'minute "60": write 0 to 59, a range N-M, */S, N-M/S'),
            ("0 24 * * *", 'hour "24": write 0 to 23, a range'),
            ("0 0 0 * *", 'day-of-month "0": write 1 to 31, a range'),
            ("0 0 * 13 *", 'month "13": write 1 to 12 or jan to dec, a range'),
            ("0 0 * * 8", 'day-of-week "8": write 0 to 7 or sun to sat, a range'),
            ("0 0 * * 1,,2", 'day-of-week "": write 0 to 7'),
            ("-1 * * * *", 'minute "-1": write 0 to 59'),
            ("1-5-7 * * * *", 'minute "1-5-7": write 0 to 59'),
            ("*-5 * * * *", 'minute "*-5": write 0 to 59'),
            ("100 * * * *", 'minute "100": write 0 to 59'),
            ("\u0661 * * * *", 'minute "\u0661": write 0 to 59'),
            ("\x1b[m * * * *", r"minute '\\x1b\[m': write 0 to 59"),
        ],
    )
    def test_a_text(self, text: str, message: str) -> None:
        pattern = "^" + message.replace("*", r"\*").replace(r".\*", ".*").replace("?", r"\?")
        with pytest.raises(ScheduleError, match=pattern):
            Schedule.parse(["@daily", text])

    def test_an_empty_list(self) -> None:
        with pytest.raises(ScheduleError, match="an empty list is never due: write five fields"):
            Schedule.parse([])

    def test_a_long_text_is_cut(self) -> None:
        with pytest.raises(ScheduleError) as caught:
            Schedule.parse([f"{'9' * 1_000_000} * * * *"])
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(
        ("zone", "message"),
        [
            ("Europe/Berlinn", 'timezone "Europe/Berlinn": there is none of that name: did you mean Europe/Berlin?'),
            ("berlin", 'timezone "berlin": there is none of that name: did you mean Europe/Berlin?'),
            ("utc", 'timezone "utc": there is none of that name: did you mean UTC?'),
            ("America", 'timezone "America": there is none of that name: did you mean'),
            ("../../etc/passwd", 'timezone "../../etc/passwd": there is none of that name: write one such as Europe/'),
            ("/etc/localtime", 'timezone "/etc/localtime": there is none of that name'),
            ("localtime", 'timezone "localtime": there is none of that name'),
            (
                "right/Europe/Paris",
                'timezone "right/Europe/Paris": there is none of that name: did you mean Europe/Paris',
            ),
            ("", 'timezone "": there is none of that name'),
            ("\0", r"timezone '\x00': there is none of that name"),
            ("x" * 1_000_000, 'timezone "xxx'),
        ],
    )
    def test_a_zone(self, zone: str, message: str) -> None:
        with pytest.raises(ScheduleError) as caught:
            Schedule.parse(["@daily"], zone)
        assert str(caught.value).startswith(message)

    def test_a_machine_without_zones_knows_utc_and_says_what_to_install(self) -> None:
        zoneinfo.reset_tzpath(to=[])
        zoneinfo.ZoneInfo.clear_cache()
        try:
            assert Schedule.parse(["@daily"]).next_due(0) == DAY
            with pytest.raises(
                ScheduleError, match=r'timezone "Europe/Berlin": .*no time zone data: apt-get install tzdata'
            ):
                Schedule.parse(["@daily"], "Europe/Berlin")
        finally:
            zoneinfo.reset_tzpath()


class TestSpeed:
    """In processor time: what else the machine does has no part in it."""

    @pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Australia/Lord_Howe"])
    @pytest.mark.parametrize("texts", SPEED_TEXTS, ids=lambda texts: texts[0])
    def test_a_due_time_is_found_in_1_ms_and_in_20_at_worst(self, texts: list[str], zone: str) -> None:
        schedule = Schedule.parse(texts, zone)
        instants = [at("2096-02-29T23:59") + n * 70 * DAY for n in range(30)]
        instants += [at(day) + n * 3600 for name, day in CHANGES if name == zone for n in range(-12, 36, 4)]
        forward = [seconds(lambda: schedule.next_due(instant)) for instant in instants]  # noqa: B023 - called at once
        backward = [seconds(lambda: schedule.latest_due(0, instant)) for instant in instants]  # noqa: B023
        assert statistics.median(forward) < 0.001 * len(texts)
        assert max(*forward, *backward) < 0.020

    @pytest.mark.parametrize("now", ["1971-01-01", "2026-11-25", "2104-02-28", "9998-12-31"])
    def test_the_latest_is_found_in_20_ms_whatever_the_clock_says(self, now: str) -> None:
        for texts in SPEED_TEXTS:
            schedule = Schedule.parse(texts, "Europe/Berlin")
            assert seconds(lambda: schedule.latest_due(-math.inf, at(now))) < 0.020  # noqa: B023
            assert seconds(lambda: schedule.latest_due(at(now) - 1, at(now))) < 0.020  # noqa: B023


def seconds(call: Callable[[], object]) -> float:
    """Give the least processor time of three calls."""

    def once() -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    return min(once() for _ in range(3))
