"""When a job is due: five cron fields in a time zone. Knows nothing of jobs.

From text to due times: a text becomes the days and the times of day that it names. A local day has one offset from
UTC, or two and the instant at which the zone's clocks change (no zone ever changed twice within four days). With these,
times of the day become instants. A search walks from day to day, forward or backward, until it has found something.

An instant is in seconds since the epoch. Due times are whole minutes of the zone's clocks. They are looked for in the
years 2 to 9998 only, so that no date on the way is out of Python's range. Nothing here reads the clock.
"""

import calendar
import difflib
import itertools
import math
import re
import zoneinfo
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import NamedTuple

DAY_SECONDS = 86_400
EPOCH = date(1970, 1, 1).toordinal()
FIRST_DAY = date(2, 1, 1).toordinal()
LAST_DAY = date(9998, 12, 31).toordinal()
MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


class ScheduleError(ValueError):
    """The operator's mistake in a schedule or a time zone: what is wrong, its words, and what to write instead."""


_NUMBER = "([0-9]{1,2}|[a-z]{3})"
_ITEM = re.compile(rf"(?:(\*)|{_NUMBER}(?:-{_NUMBER})?)(?:/([0-9]{{1,4}}))?")
_DIALECT = re.compile(r"(?:[0-9]*|[a-z]{3})([lwh])w?\b.*|.*?([#?~]).*")
_INSTEAD = {
    **dict.fromkeys("lw#", "not known here: name all days that it may be, and let the job look at the date"),
    **dict.fromkeys("h~", "nothing is chosen for you here: write a number"),
    "?": "write *",
}


class _Field(NamedTuple):
    name: str
    least: int
    most: int
    names: tuple[str, ...] = ()

    def numbers(self, words: str) -> frozenset[int]:
        """Give the numbers that a comma-separated list stands for. Raises ScheduleError."""
        return frozenset(itertools.chain.from_iterable(self._range(item) for item in words.split(",")))

    def _range(self, item: str) -> range:
        if not (match := _ITEM.fullmatch(item.lower())):
            raise self._error(item, self._hint(item.lower()))
        star, first, last, step = match.groups()
        begin = self.least if star else self._number(first, item)
        end = self.most if star else self._number(last or first, item)
        if step and not (star or last):
            raise self._error(item, f"a step needs a range: write {first}-{self.most}/{step}")
        if step and not 1 <= int(step) <= self.most:
            raise self._error(item, f"a step is 1 to {self.most}")
        if begin > end:
            rest = f"{self.least}-{end}" if end > self.least else f"{end}"
            raise self._error(item, f"a range can't go backwards: write {begin}-{self.most},{rest}")
        return range(begin, end + 1, int(step or 1))

    def _number(self, word: str, item: str) -> int:
        names = [name[:3] for name in self.names]
        number = int(word) if word.isdigit() else names.index(word) + self.least if word in names else -1
        if not self.least <= number <= self.most:
            raise self._error(item, self._hint(word))
        return number

    def _hint(self, words: str) -> str:
        for word, name in itertools.product(re.split("[-/]", words), self.names):
            if len(word) > 3 and name.startswith(word):
                return f"names have three letters: write {name[:3]}"
        if sign := _DIALECT.fullmatch(words):
            return _INSTEAD[sign[1] or sign[2]]
        names = f" or {self.names[0][:3]} to {self.names[-1][:3]}" if self.names else ""
        return f"write {self.least} to {self.most}{names}, a range N-M, */S, N-M/S, a list of these with commas, or *"

    def _error(self, words: str, problem: str) -> ScheduleError:
        return ScheduleError(f"{self.name} {_show(words)}: {problem}")


_MONTHS = "january february march april may june july august september october november december"
_WEEKDAYS = "sunday monday tuesday wednesday thursday friday saturday"
_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day-of-month", 1, 31),
    _Field("month", 1, 12, tuple(_MONTHS.split())),
    _Field("day-of-week", 0, 7, tuple(_WEEKDAYS.split())),
)


class _Clocks(NamedTuple):
    """How many seconds a zone's clocks are ahead of UTC, before and after an instant; alike where nothing changes."""

    before: int
    after: int
    change: int


@dataclass(frozen=True, slots=True)
class _Text:
    """The five fields of one text, read."""

    times: tuple[int, ...]  # of a day, in seconds from midnight
    every: bool  # minute or hour begins with *: whatever the clocks show counts. Otherwise each time once a day
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either: bool  # a day counts that fits one of the day fields

    def counts(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        if self.either:
            return day.day in self.days or day.isoweekday() % 7 in self.weekdays
        return day.day in self.days and day.isoweekday() % 7 in self.weekdays

    def due(self, midnight: int, clocks: _Clocks, after: float, until: float) -> set[int]:
        """Give what is due in (after, until] on a local day; `midnight` is its begin, read as if it were in UTC."""
        begin = bisect_right(self.times, after - midnight + min(clocks.before, clocks.after))
        end = bisect_right(self.times, until - midnight + max(clocks.before, clocks.after))
        if clocks.before == clocks.after:
            return {midnight - clocks.before + time for time in self.times[begin:end]}
        walls = (midnight + time for time in self.times[begin:end])
        return {due for due in self._instants(walls, clocks) if after < due <= until}

    def _instants(self, walls: Iterable[int], clocks: _Clocks) -> Iterator[int]:
        gap_end = clocks.change + -(clocks.change + clocks.after) % 60
        for wall in walls:
            first, second = wall - clocks.before, wall - clocks.after
            if not self.every:
                yield first if first < clocks.change else max(second, gap_end)
                continue
            if first < clocks.change:
                yield first
            if second >= clocks.change:
                yield second


@dataclass(frozen=True)
class Schedule:
    """The due times of one or more texts in a zone. Two of the same `text` are equal: they have the same due times."""

    text: str  # canonical: the fields of each text without their macros, and the zone
    timezone: str = field(compare=False)
    _texts: tuple[_Text, ...] = field(compare=False, repr=False)
    _zone: tzinfo = field(compare=False, repr=False)

    @classmethod
    def parse(cls, texts: Sequence[str], timezone: str = "UTC") -> "Schedule":
        """Read texts of five fields or a macro each, in one zone. Raises ScheduleError."""
        if not texts:
            raise ScheduleError('an empty list is never due: write five fields, such as "0 2 * * *"')
        zone = zone_named(timezone)
        read = {" ".join(fields).lower(): _text(*fields) for fields in map(_fields, texts)}
        return cls(f"{'; '.join(sorted(read))} {timezone}", timezone, tuple(read.values()), zone)

    def next_due(self, after: float) -> float:
        """Give the first due time after an instant; infinity if there is none up to the year 9998."""
        for day in self._days(after, math.inf, 1):
            if due := self._due_on(day, after, math.inf):
                first = min(due)
                return min(self._due_on(day + 1, after, first), default=first)  # in a fold days may overlap
        return math.inf

    def latest_due(self, after: float, now: float) -> float | None:
        """Give the last due time in (after, now], searched backwards from now; None if there is none."""
        for day in self._days(after, now, -1):
            if due := self._due_on(day, after, now):
                last = max(due)
                return max(self._due_on(day - 1, last, now), default=last)
        return None

    def count_due(self, after: float, now: float, limit: int = 1000) -> int:
        """Count the due times in (after, now]; limit + 1 stands for any number above limit."""
        counted: set[int] = set()
        for day in self._days(after, now, 1):
            counted |= self._due_on(day, after, now)
            if len(counted) > limit:
                break
        return min(len(counted), limit + 1)

    def _days(self, after: float, until: float, step: int) -> Iterator[int]:
        """Yield the days (ordinals) of the schedule's months on which something in (after, until] may be due."""
        first, last = _day(after) - 1, _day(until) + 1  # no zone is a day or more away from UTC
        years = range(date.fromordinal(first).year, date.fromordinal(last).year + 1)
        months = sorted(frozenset().union(*(text.months for text in self._texts)))
        for year in years[::step]:
            for month in months[::step]:
                begin = date(year, month, 1).toordinal()
                end = begin + calendar.monthrange(year, month)[1]
                yield from range(max(begin, first), min(end, last + 1))[::step]

    def _due_on(self, day: int, after: float, until: float) -> set[int]:
        local_day = date.fromordinal(day)
        if not (texts := [text for text in self._texts if text.counts(local_day)]):
            return set()
        midnight, clocks = (day - EPOCH) * DAY_SECONDS, _clocks(self._zone, day)
        return set[int]().union(*(text.due(midnight, clocks, after, until) for text in texts))


def zone_named(name: str) -> tzinfo:
    """Give the time zone of that name. Raises ScheduleError. UTC needs no zone data."""
    if name == "UTC":
        return UTC
    try:
        if name == "localtime" or name.startswith("right/"):  # each machine's own; leap seconds shift the minutes
            raise ValueError(name)
        return zoneinfo.ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise ScheduleError(f"timezone {_show(name)}: {_zone_hint(name)}") from None


def _zone_hint(name: str) -> str:
    known = zoneinfo.available_timezones() - {"localtime"}
    if not known:
        return "this machine has no time zone data: apt-get install tzdata, or write UTC"
    spelled = {zone.rpartition("/")[2].lower(): zone for zone in sorted(known)} | {zone.lower(): zone for zone in known}
    if not (near := difflib.get_close_matches(name[:60].lower(), spelled, 1)):
        return "there is none of that name: write one such as Europe/Berlin, or UTC"
    return f"there is none of that name: did you mean {spelled[near[0]]}?"


def _fields(text: str) -> list[str]:
    """Split a text into its five fields. Raises ScheduleError."""
    words = MACROS.get(text.strip(), text).split()
    if len(words) == 5 and not words[0].startswith("@"):
        return words
    hint = "write " + " ".join(each.name for each in _FIELDS)
    if words[:1] == ["@reboot"]:
        hint = "no job is due because a machine starts: let a script that starts there POST it"
    elif words[:1] == ["@every"]:
        hint = 'write its minutes or hours, such as "*/5 * * * *"'
    elif text.strip().startswith("@"):
        hint = f"known are {', '.join(MACROS)}"
    elif len(words) in (6, 7):
        hint = f'there are no seconds and no years: write "{" ".join(words[1:6])}"'
    raise ScheduleError(f"{_show(text)}: this is not five fields: {hint}")


def _text(minute: str, hour: str, day: str, month: str, weekday: str) -> _Text:
    """Read five fields. Raises ScheduleError."""
    words = (minute, hour, day, month, weekday)
    minutes, hours, days, months, weekdays = (each.numbers(word) for each, word in zip(_FIELDS, words, strict=True))
    _refuse_mixed(day, weekday)
    either = not (day.startswith("*") or weekday.startswith("*"))
    if not either and min(days) > max(calendar.monthrange(2000, number)[1] for number in months):
        raise ScheduleError(f"day-of-month {_show(day)}: never comes in month {_show(month)}: write a day that it has")
    return _Text(
        times=tuple((hour * 60 + minute) * 60 for hour in sorted(hours) for minute in sorted(minutes)),
        every=minute.startswith("*") or hour.startswith("*"),
        days=days,
        months=months,
        weekdays=frozenset(number % 7 for number in weekdays),
        either=either,
    )


def _refuse_mixed(day: str, weekday: str) -> None:
    """Refuse `*/N` in one day field beside a restriction in the other. Raises ScheduleError."""
    fields = ("day-of-month", day, "1-31"), ("day-of-week", weekday, "0-6")
    for (name, words, whole), (other, others, _) in itertools.permutations(fields):
        if others != "*" and (step := re.search(r"(?<![^,])\*(/[0-9]+)", words)):
            problem = f"cron programs differ in what it means beside {other} {_show(others)}"
            hint = f"write * in one of the two, or {whole}{step[1]} for the days that fit either"
            raise ScheduleError(f"{name} {_show(words)}: {problem}: {hint}")


def _show(words: str) -> str:
    return f'"{words[:60]}{"..." * (len(words) > 60)}"' if words.isprintable() else ascii(words[:60])


def _day(instant: float) -> int:
    """Give the day in UTC (an ordinal), moved into the years that are looked at."""
    days = math.floor(max(-1e12, min(instant, 1e12)) / DAY_SECONDS)
    return max(FIRST_DAY, min(EPOCH + days, LAST_DAY))


def _clocks(zone: tzinfo, day: int) -> _Clocks:
    """Give the offsets at both ends of a local day, and when they change. `fold` decides where 0:00 is in doubt."""
    midnight = (day - EPOCH) * DAY_SECONDS
    before = _offset(datetime.fromordinal(day).replace(tzinfo=zone))
    after = _offset(datetime.fromordinal(day + 1).replace(tzinfo=zone, fold=1))
    if before == after:
        return _Clocks(before, after, midnight)
    span = range(midnight - max(before, after), midnight + DAY_SECONDS - min(before, after) + 1)

    def changed(instant: int) -> bool:
        return _offset(datetime.fromtimestamp(instant, zone)) == after

    return _Clocks(before, after, span[bisect_left(span, True, key=changed)])


def _offset(moment: datetime) -> int:
    return (moment.utcoffset() or timedelta()) // timedelta(seconds=1)
