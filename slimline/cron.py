"""A cron line in somebody's time zone, as the line that Kubeflow's controller reads.

That controller (robfig/cron 1, backend/src/crd/controller/scheduledworkflow) wants a field for seconds first: a line
of five fields is not refused, it is read as something else ("0 3 * * 1" runs every hour in January). It reads all
schedules in one time zone, CRON_SCHEDULE_TIMEZONE of the installation, and knows no 7 for Sunday, no L, W or #. So a
line is parsed here (cronsim, which reads what Debian's cron reads), moved between the zones where that is exact, and
written out as lists of numbers.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from slimline.errors import ConfigError

SHORT = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
AHEAD = timedelta(days=3650)
"""How far clocks are looked at for changes, where a schedule has no end."""


class Fields(NamedTuple):
    """The numbers that a line allows. Days match if both allow them, or if either does where both are limited."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]

    def line(self) -> str:
        """Six fields for the controller, seconds first."""
        return "0 " + " ".join(
            "*" if numbers == whole else ",".join(map(str, sorted(numbers)))
            for numbers, whole in zip(self, WHOLE, strict=True)
        )


WHOLE = Fields(*(frozenset(range(a, b)) for a, b in ((0, 60), (0, 24), (1, 32), (1, 13), (0, 7))))


def zone(name: str) -> ZoneInfo:
    """The time zone of this name. Raises ConfigError if there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"there is no time zone {name!r}. Write it as in Europe/Berlin, or UTC.") from None


def controller_line(
    text: str, local: ZoneInfo, controller: ZoneInfo, start: datetime, end: datetime | None = None
) -> str:
    """What to give to a controller in its own zone for a cron line in another. Raises ConfigError where none is exact.

    The moments are those of the line in `local`, from `start` to `end`: wherever clocks are changed and the hour
    in the controller's zone would have to move along, there is no such line.
    """
    fields = parse(text)
    shifts = {_shift(local, controller, moment) for moment in _moments(start, end or start + AHEAD)}
    lines = {_moved(fields, shift, text) for shift in sorted(shifts)}
    if len(lines) > 1:
        hours = " and ".join(sorted(f"{line.hours_text()} {controller.key}" for line in map(_Line, lines)))
        raise ConfigError(
            f"cron {text!r} in {local.key} is {hours}, by season, and Kubeflow has one time zone for the whole "
            f"installation (CRON_SCHEDULE_TIMEZONE, here {controller.key}). Give the hour with time_zone: "
            f"{controller.key}, or set the installation's to {local.key} and say so with controller_time_zone."
        )
    return lines.pop()


def next_times(line: str, controller: ZoneInfo, after: datetime, count: int = 5) -> list[datetime]:
    """The next moments at which a controller in this zone starts a run, by a line of six fields."""
    from cronsim import CronSim

    times = CronSim(line, after.astimezone(UTC if controller.key == "UTC" else controller))
    return [next(times).astimezone(UTC) for _ in range(count)]


def parse(text: str) -> Fields:
    """The numbers in a cron line of five fields. Raises ConfigError, with what is wrong."""
    from cronsim import CronSim, CronSimError

    line = SHORT.get(text.strip().lower(), text)
    if len(line.split()) != 5:
        raise ConfigError(
            f"cron {text!r} must have five fields: minute, hour, day of month, month, day of week. {EXAMPLE} The field "
            "for seconds that Kubeflow wants is added."
        )
    try:
        known = CronSim(line, datetime(2024, 1, 1))
    except CronSimError as error:
        raise ConfigError(f"cron {text!r} has a {str(error).replace('Bad', 'bad')}. {EXAMPLE}") from None
    if min(known.days) < 0 or any(isinstance(day, tuple) for day in known.weekdays):
        raise ConfigError(f"cron {text!r} uses L, W or #, which Kubeflow's cron does not know. Use numbers.")
    days, weekdays = frozenset(known.days), frozenset(int(day) % 7 for day in known.weekdays if isinstance(day, int))
    if WHOLE.days == days or WHOLE.weekdays == weekdays:
        if not known.day_and:  # written as a list, and either is enough: every day
            days, weekdays = WHOLE.days, WHOLE.weekdays
    elif known.day_and:
        raise ConfigError(
            f"cron {text!r} wants a day of the month by a step and a day of the week, both at once, which Kubeflow's "
            "cron reads otherwise. Use one of them."
        )
    return Fields(frozenset(known.minutes), frozenset(known.hours), days, frozenset(known.months), weekdays)


EXAMPLE = "Write five fields, as in '0 3 * * mon': every Monday at 3:00."


class _Line(str):
    def hours_text(self) -> str:
        minute, hour = self.split()[1:3]
        return f"{int(hour):02}:{int(minute):02}" if (hour + minute).isdigit() else f"hour {hour}, minute {minute}"


def _moments(start: datetime, end: datetime) -> list[datetime]:
    count = int((end - start) / timedelta(hours=6)) + 1
    return [start + index * timedelta(hours=6) for index in range(count)]


def _shift(local: ZoneInfo, controller: ZoneInfo, moment: datetime) -> int:
    """How many minutes the controller's clock is ahead of the local one."""
    ahead = [moment.astimezone(z).utcoffset() or timedelta() for z in (controller, local)]
    return round((ahead[0] - ahead[1]) / timedelta(minutes=1))


def _moved(fields: Fields, shift: int, text: str) -> str:
    """The line on a clock that is this many minutes ahead."""
    moments = {divmod(60 * hour + minute + shift, 1440) for hour in fields.hours for minute in fields.minutes}
    carries = {carry for carry, _ in moments}
    every_day = fields.days == WHOLE.days and fields.months == WHOLE.months and fields.weekdays == WHOLE.weekdays
    if every_day:
        moments, carries = {(0, minute) for _, minute in moments}, {0}
    hours, minutes = ({part[i] for part in (divmod(m, 60) for _, m in moments)} for i in (0, 1))
    if len(carries) > 1 or len(moments) != len(hours) * len(minutes):
        raise _inexact(text, "its times fall on two dates, or not on whole hours, there")
    carry = carries.pop()
    days = fields.days if not carry or fields.days == WHOLE.days else _next_days(fields.days, carry, text)
    if carry and fields.days == WHOLE.days and fields.months != WHOLE.months:
        raise _inexact(text, "a day at the end of a month falls into another month there")
    weekdays = frozenset((day + carry) % 7 for day in fields.weekdays)
    return Fields(frozenset(minutes), frozenset(hours), days, fields.months, weekdays).line()


def _next_days(days: frozenset[int], carry: int, text: str) -> frozenset[int]:
    if min(days) + carry < 1 or max(days) + max(carry, 0) > 28:  # 29 to 31 are not in every month
        raise _inexact(text, "a day at the end of a month falls into another month there")
    return frozenset(day + carry for day in days)


def _inexact(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"cron {text!r} cannot be written in the time zone of Kubeflow's controller: {why}. Give the times with "
        "time_zone: UTC (or what controller_time_zone says)."
    )
