"""The hours of a silo's week in which nothing is answered, by the clock of a named place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache
from zoneinfo import ZoneInfo

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

_FORM = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)(?: +(\S.*))?")


@dataclass(frozen=True)
class Hours:
    """A stretch of each of some days, in minutes from that day's midnight; beyond 1440 it ends on the next day."""

    start: int
    end: int
    days: frozenset[int]

    def around(self, day: date) -> Iterator[tuple[datetime, datetime]]:
        """The stretches by the clock that begin the day before, on this day, or on one of the next eight."""
        for ahead in range(-1, 9):
            begins = datetime.combine(day + timedelta(ahead), datetime.min.time())
            if begins.weekday() in self.days:
                yield begins + timedelta(minutes=self.start), begins + timedelta(minutes=self.end)


@cache
def parse_hours(text: str) -> Hours:
    """Hours written as '07:00-19:00 Mon-Fri', '22:00-06:00' or '00:00-24:00 Sat,Sun'.

    Raises:
        ValueError: they are not; says how to write them.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"'{text[:40]}' are no hours: write 'HH:MM-HH:MM', and days behind it such as 'Mon-Fri' or 'Sat,Sun'"
        )
    start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
    if int(found[2]) > 59 or int(found[4]) > 59 or start >= 1440 or end > 1440 or start == end:
        raise ValueError(f"'{text[:40]}' are no hours of a day (00:00 to 24:00)")
    days = frozenset(_days(found[5])) if found[5] else frozenset(range(7))
    return Hours(start, end if end > start else end + 1440, days)


def checked_hours(text: str) -> str:
    """The text itself. Raises ValueError as `parse_hours`."""
    parse_hours(text)
    return text


def checked_zone(name: str) -> str:
    """The name itself. Raises ValueError where this machine knows no such time zone."""
    try:
        _place(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError; '..' a ValueError
        raise ValueError(f"'{name[:40]}' is no time zone known here, such as 'Europe/Madrid'") from None
    return name


def local_day(zone: str, now: datetime) -> date:
    """The date at this moment by a place's clock."""
    return now.astimezone(_place(zone)).date()


def next_opening(hours: Sequence[str], zone: str, now: datetime) -> datetime | None:
    """The first moment from now on, in that zone, that lies in none of these hours; None where there is none in a week.

    Args:
        now: aware.
    """
    place = _place(zone)
    here = now.astimezone(place)
    clock = here.replace(tzinfo=None)
    stretches = [stretch for text in hours for stretch in parse_hours(text).around(clock.date())]
    for moment in [clock, *sorted(end for _, end in stretches if end > clock)]:
        if moment > clock + timedelta(days=8):
            return None
        if not any(start <= moment < end for start, end in stretches):
            # through UTC, since a clock that is put forward jumps over some times
            return here if moment == clock else moment.replace(tzinfo=place).astimezone(UTC).astimezone(place)
    return None


def _place(zone: str) -> tzinfo:
    return UTC if zone == "UTC" else ZoneInfo(zone)  # the one that needs no table


def _days(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = (piece.strip().capitalize() for piece in part.partition("-"))
        last = last or first
        if first not in DAYS or last not in DAYS:
            raise ValueError(f"'{text[:40]}' are no days: write {', '.join(DAYS)}, or a range such as Mon-Fri")
        begin, count = DAYS.index(first), (DAYS.index(last) - DAYS.index(first)) % 7 + 1
        yield from ((begin + i) % 7 for i in range(count))
