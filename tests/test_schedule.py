"""Schedules: cron lines in time zones, and a file that becomes what exists whatever fails on the way."""

import itertools
import json
import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline import cron, errors, schedule
from slimline.schedule import Action, Standing, next_action
from tests.kubeflow import client, robfig, small
from tests.test_cluster import call

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
UTC_ZONE, BERLIN, TOKYO, INDIA = (ZoneInfo(z) for z in ("UTC", "Europe/Berlin", "Asia/Tokyo", "Asia/Kolkata"))


def as_controller(line: str, controller: ZoneInfo, after: datetime, count: int) -> list[datetime]:
    """The next moments by robfig's rules, minute by minute: nothing of cronsim, nothing of ours."""
    (seconds, minutes, hours, days, months, weekdays), both = robfig(line)
    assert seconds == {0}
    found, moment = [], after.replace(second=0, microsecond=0)
    for _ in range(60 * 24 * 15):
        moment += timedelta(minutes=1)
        here = moment.astimezone(controller)
        dates = here.day in days, here.isoweekday() % 7 in weekdays
        fits = all(dates) if both else any(dates)
        if fits and here.month in months and here.hour in hours and here.minute in minutes:
            found.append(moment)
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize(
    ("text", "zone", "line"),
    [
        ("0 3 * * mon", UTC_ZONE, "0 0 3 * * 1"),
        ("@daily", UTC_ZONE, "0 0 0 * * *"),
        ("*/15 * * * *", BERLIN, "0 0,15,30,45 * * * *"),  # every quarter of an hour, whatever the clock does
        ("0 3 * * 1", TOKYO, "0 0 18 * * 0"),  # Monday morning in Tokyo is Sunday evening
        ("30 2 * * *", INDIA, "0 0 21 * * *"),
        ("0 12 15 * *", TOKYO, "0 0 3 15 * *"),
        ("0 3 15 * *", TOKYO, "0 0 18 14 * *"),
        ("0 0 * * 7", UTC_ZONE, "0 0 0 * * 0"),  # Kubeflow's cron has no 7
        ("0 0 1-31 * 1", UTC_ZONE, "0 0 0 * * *"),  # either is enough, and one always is
        ("0 0 13 * 5", UTC_ZONE, "0 0 0 13 * 5"),
    ],
)
def test_a_cron_line_becomes_six_fields_in_the_zone_of_the_controller(text, zone, line):
    assert cron.controller_line(text, zone, UTC_ZONE, NOW) == line
    robfig(line)


@pytest.mark.parametrize(
    ("text", "zone", "sentence"),
    [
        (
            "0 3 * * 1",
            BERLIN,
            r"is 01:00 UTC and 02:00 UTC, by season, .*CRON_SCHEDULE_TIMEZONE, here UTC.*time_zone: UTC",
        ),
        ("0 3 1 * *", TOKYO, "a day at the end of a month falls into another month there"),
        ("0 3 31 * *", TOKYO, "a day at the end of a month falls into another month there"),
        ("0 3 * 2 *", TOKYO, "a day at the end of a month falls into another month there"),
        ("0 3,12 * * 1", TOKYO, "its times fall on two dates, or not on whole hours, there"),
        ("0,40 4,9 * * *", INDIA, "its times fall on two dates, or not on whole hours, there"),
        ("0 0 3 * * 1", UTC_ZONE, r"must have five fields: .*The field for seconds that Kubeflow wants is added"),
        ("0 25 * * *", UTC_ZONE, "has a bad hour"),
        ("0 3 30 2 *", UTC_ZONE, "has a bad day-of-month"),
        ("0 3 L * *", UTC_ZONE, "uses L, W or #"),
        ("0 3 * * 5#2", UTC_ZONE, "uses L, W or #"),
        ("0 3 */2 * 1", UTC_ZONE, "both at once"),
        ("every monday", UTC_ZONE, "must have five fields"),
    ],
)
def test_a_line_that_has_no_equal_is_refused_with_the_reason(text, zone, sentence):
    with pytest.raises(errors.ConfigError, match=sentence) as caught:
        cron.controller_line(text, zone, UTC_ZONE, NOW)
    assert text in str(caught.value)


def test_a_zone_whose_clocks_change_is_fine_where_the_controller_has_it_or_the_schedule_ends_before():
    assert cron.controller_line("0 3 * * 1", BERLIN, BERLIN, NOW) == "0 0 3 * * 1"
    assert cron.controller_line("0 3 * * 1", BERLIN, UTC_ZONE, NOW, NOW + timedelta(days=60)) == "0 0 2 * * 1"
    assert cron.controller_line("0 3 * * *", ZoneInfo("Europe/Lisbon"), ZoneInfo("Europe/London"), NOW) == "0 0 3 * * *"
    with pytest.raises(errors.ConfigError, match="there is no time zone 'Europe/Atlantis'"):
        cron.zone("Europe/Atlantis")


def test_five_fields_given_to_kubeflow_as_they_are_would_mean_another_thing():
    monday, both = robfig("0 3 * * 1")
    assert monday[1] == {3} and monday[4] == {1} and len(monday[2]) == 24 and both  # each hour at :03, in January


numbers = {"minute": range(60), "hour": range(24), "day": range(1, 32), "month": range(1, 13), "weekday": range(8)}


def field(name):
    listed = st.lists(st.sampled_from(numbers[name]), min_size=1, max_size=3, unique=True).map(
        lambda ns: ",".join(map(str, sorted(ns)))
    )
    return st.one_of(st.just("*"), st.sampled_from([2, 3, 6]).map("*/{}".format), listed)


@settings(max_examples=40)
@given(
    st.tuples(field("minute"), field("hour"), st.one_of(st.just("*"), field("day")), st.just("*"), field("weekday")),
    st.sampled_from(["UTC", "Asia/Tokyo", "Asia/Kolkata", "America/Phoenix", "Europe/Berlin", "Pacific/Apia"]),
    st.sampled_from(["UTC", "Asia/Tokyo", "America/Bogota"]),
)
def test_what_the_controller_makes_of_a_line_is_what_its_author_meant(fields, local, controller):
    text = " ".join(fields)
    try:
        line = cron.controller_line(text, ZoneInfo(local), ZoneInfo(controller), NOW)
    except errors.ConfigError:
        return
    times = as_controller(line, ZoneInfo(controller), NOW, 3)
    meant = CronSim(f"0 {text}", NOW.astimezone(ZoneInfo(local)) if local != "UTC" else NOW)
    assert times == [next(meant).astimezone(UTC) for _ in times]


def test_what_comes_next_ends_at_one_schedule_from_every_beginning_with_never_two_more_active():
    """All beginnings with up to three schedules, and all wishes; `a` is what the file says."""
    kinds = list(itertools.product("ab", (True, False)))
    begins = [c for n in range(4) for c in itertools.product(kinds, repeat=n)]
    assert len(begins) == 85
    for begin, digest, wish in itertools.product(begins, ("a", ""), (True, False)):
        standing = [Standing(str(i), d, on, f"{i}") for i, (d, on) in enumerate(begin)]
        most = max(1, sum(s.active for s in standing))
        for _ in range(12):
            action = next_action(standing, digest, wish)
            if action is None:
                break
            standing = done(standing, action)
            assert sum(s.active for s in standing) <= most
        assert action is None
        assert [(s.digest, s.active) for s in standing] == ([("a", wish)] if digest else [])


def done(standing: list[Standing], action: Action) -> list[Standing]:
    if action.verb == "create":
        return [*standing, Standing("new", "a", False, "9")]
    if action.verb == "delete":
        assert not next(s for s in standing if s.id == action.id).active  # first disabled, then deleted
        return [s for s in standing if s.id != action.id]
    return [s._replace(active=action.verb == "enable") if s.id == action.id else s for s in standing]


def written(folder: Path, *entries: dict, **plan) -> Path:
    """A file of schedules; each runs the small pipeline, every Monday, if it does not say otherwise."""
    small(folder)
    usual = {"name": "weekly", "pipeline": "small.yaml", "cron": "0 3 * * mon", "parameters": {"count": 2}}
    file = folder / "schedules.yaml"
    whole = {"owner": "us", "schedules": [{**usual, **entry} for entry in entries], **plan}
    file.write_text(yaml.safe_dump(whole))
    return file


def applied(cluster, file: Path, prune: bool = False):
    plan = schedule.read(file)
    return schedule.apply(cluster, plan, schedule.check(plan, file.parent, None, NOW, ""), prune)


def test_a_file_becomes_what_exists_and_a_second_time_changes_nothing(kubeflow, cluster, tmp_path):
    file = written(
        tmp_path, {}, {"name": "often", "cron": "", "every": "6h", "max_concurrency": 2, "catchup": True},
        {"name": "off", "enabled": False, "start": "2027-01-01", "time_zone": "Asia/Tokyo", "experiment": "trial"},
    )  # fmt: skip
    assert [c.actions for c in applied(cluster, file)] == [["create", "enable"], ["create", "enable"], ["create"]]
    weekly, often, off = kubeflow.schedules.values()
    assert weekly["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}} and weekly["status"] == "ENABLED"
    assert weekly["no_catchup"] is True and weekly["max_concurrency"] == "1" and weekly["display_name"] == "weekly"
    assert weekly["runtime_config"]["parameters"] == {
        "text": "said", "count": 2, "rate": 0.5, "sure": False, "several": [], "options": {}
    }  # fmt: skip
    assert often["trigger"] == {"periodic_schedule": {"interval_second": "21600"}}
    assert often["no_catchup"] is False and often["max_concurrency"] == "2"
    assert off["status"] == "DISABLED" and off["trigger"]["cron_schedule"]["start_time"] == "2026-12-31T15:00:00+00:00"
    assert kubeflow.experiments[off["experiment_id"]]["display_name"] == "trial"
    before, changed = dict(kubeflow.schedules), len([r for r in kubeflow.requests if r.method != "GET"])
    assert [c.actions for c in applied(cluster, file)] == [[], [], []] and kubeflow.schedules == before
    assert len([r for r in kubeflow.requests if r.method != "GET"]) == changed


def test_a_changed_entry_replaces_its_schedule_and_a_switch_does_not(kubeflow, cluster, tmp_path):
    applied(cluster, written(tmp_path, {}))
    (first,) = kubeflow.schedules
    assert applied(cluster, written(tmp_path, {"enabled": False}))[0].actions == ["disable"]
    assert applied(cluster, written(tmp_path, {}))[0].actions == ["enable"] and list(kubeflow.schedules) == [first]
    changed = applied(cluster, written(tmp_path, {"parameters": {"count": 3}}))
    assert changed[0].actions == ["create", "disable", "enable", "delete"] and first not in kubeflow.schedules
    (second,) = kubeflow.schedules
    small_file = small(tmp_path, said="another specification")
    plan = schedule.read(tmp_path / "schedules.yaml")
    schedule.apply(cluster, plan, schedule.check(plan, tmp_path, None, NOW, ""))
    (third,) = kubeflow.schedules
    assert third != second and small_file.is_file()


def test_pruning_takes_our_own_that_the_file_lacks_and_nothing_of_others(kubeflow, cluster, tmp_path):
    applied(cluster, written(tmp_path, {}, {"name": "gone"}))
    applied(cluster, written(tmp_path, {"name": "theirs"}, owner="them"))
    by_hand = {**next(iter(kubeflow.schedules.values())), "recurring_run_id": "x", "display_name": "by-hand"}
    kubeflow.schedules["x"] = {**by_hand, "description": "made in the page"}
    file = written(tmp_path, {})
    assert applied(cluster, file)[0].actions == [] and len(kubeflow.schedules) == 4
    changes = applied(cluster, file, prune=True)
    assert [(c.name, c.actions) for c in changes] == [("weekly", []), ("gone", ["disable", "delete"])]
    assert [s["display_name"] for s in kubeflow.schedules.values()] == ["weekly", "theirs", "by-hand"]
    for name, whose in (("theirs", "belongs to them"), ("by-hand", "was not made from a file")):
        with pytest.raises(errors.ConfigError, match=f"a schedule named '{name}' is there already and {whose}"):
            applied(cluster, written(tmp_path, {"name": name}))


MODES = ("503", "cut", "lost", "half")


@pytest.fixture
def replaced(kubeflow, tmp_path):
    """A schedule that is about to be replaced, beside those of others; tells how many requests that takes."""
    cluster = client(kubeflow, patience_s=0)
    applied(cluster, written(tmp_path, {"name": "theirs"}, owner="them"))
    applied(cluster, written(tmp_path, {"name": "another"}, {}))
    old = json.dumps(kubeflow.schedules)
    file = written(tmp_path, {"name": "another"}, {"parameters": {"count": 9}})
    plan = schedule.read(file)
    wanted = schedule.check(plan, tmp_path, None, NOW, "")
    active: list[int] = []
    kubeflow.watch = lambda k: active.append(len(k.active("weekly")))

    def attempt(weather, patience_s=0.0):
        """One run of the command, from the first request on, in this weather: whether it got through."""
        first = len(kubeflow.requests)
        kubeflow.weather = lambda request: weather(request.number - first)
        try:
            schedule.apply(client(kubeflow, patience_s=patience_s), plan, wanted)
        except errors.StoreError as error:
            assert error.exit_code == 5
            return False
        finally:
            kubeflow.weather = lambda request: None
        return True

    def reset():
        kubeflow.schedules.clear()
        kubeflow.schedules.update(json.loads(old))
        active.clear()

    def settled():
        ours = [s for s in kubeflow.schedules.values() if s["display_name"] == "weekly"]
        assert [s["runtime_config"]["parameters"]["count"] for s in ours] == [9] and ours[0]["status"] == "ENABLED"
        assert max(active) <= 1, "two were active at once"
        others = [s for s in kubeflow.schedules.values() if s["display_name"] != "weekly"]
        assert others == [s for s in json.loads(old).values() if s["display_name"] != "weekly"], "others were touched"
        return active

    reset()
    first = len(kubeflow.requests)
    assert attempt(lambda n: None)
    return attempt, reset, settled, len(kubeflow.requests) - first


def test_a_crash_before_or_after_any_request_is_mended_by_the_same_command(replaced):
    attempt, reset, settled, requests = replaced
    assert requests > 15
    for number, mode in itertools.product(range(requests), ("cut", "lost")):
        reset()
        assert not attempt(lambda n, number=number, mode=mode: mode if n >= number else None)
        assert attempt(lambda n: None)
        active = settled()
        assert active[-1] == 1


@pytest.mark.slow
def test_a_second_crash_while_mending_is_mended_by_the_third_run(replaced):
    attempt, reset, settled, requests = replaced
    pairs = list(itertools.product(range(requests), repeat=2))
    for first, second in random.Random(5).sample(pairs, 40):
        reset()
        attempt(lambda n, first=first: "lost" if n >= first else None)
        attempt(lambda n, second=second: "lost" if n >= second else None)
        assert attempt(lambda n: None)
        settled()


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_is_outlasted_in_one_run(replaced):
    attempt, reset, settled, _ = replaced
    for seed in range(25):
        reset()
        luck = random.Random(seed)
        assert attempt(lambda n, luck=luck: luck.choice(MODES) if luck.random() < 0.3 else None, patience_s=20)
        settled()


def test_a_creation_that_was_given_up_and_done_all_the_same_leaves_one(kubeflow, tmp_path):
    kubeflow.slow_s = 0.6
    slow = iter(["slow"])
    kubeflow.weather = lambda r: next(slow, None) if r.operation.endswith("create_recurring_run") else None
    applied(client(kubeflow, timeout_s=0.3), written(tmp_path, {}))
    threading.Event().wait(0.5)  # the first creation is done by now
    assert len(kubeflow.active("weekly")) == 1
    applied(client(kubeflow), written(tmp_path, {}))
    assert [s["status"] for s in kubeflow.schedules.values()] == ["ENABLED"]


def test_none_is_active_only_between_disabling_the_old_and_enabling_the_new(kubeflow, cluster, tmp_path):
    applied(cluster, written(tmp_path, {}))
    active = []
    kubeflow.watch = lambda k: active.append(
        (k.requests[-1].operation.rpartition("service_")[2], len(k.active("weekly")))
    )
    applied(cluster, written(tmp_path, {"parameters": {"count": 3}}))
    changing = [
        (name, count) for name, count in active if name.split("_")[0] in ("create", "disable", "enable", "delete")
    ]
    assert changing == [
        ("create_recurring_run", 1), ("disable_recurring_run", 0), ("enable_recurring_run", 1),
        ("delete_recurring_run", 1),
    ]  # fmt: skip
    without = [name for name, count in active if count == 0]
    assert without == ["disable_recurring_run", "list_recurring_runs"]


def test_two_who_apply_one_file_at_once_leave_one_schedule(kubeflow, cluster, tmp_path):
    file = written(tmp_path, {})
    applied(cluster, file)
    plan = schedule.read(written(tmp_path, {"parameters": {"count": 5}}))
    wanted = schedule.check(plan, tmp_path, None, NOW, "")
    threads = [threading.Thread(target=schedule.apply, args=(client(kubeflow), plan, wanted)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    schedule.apply(cluster, plan, wanted)
    (one,) = kubeflow.schedules.values()
    assert one["status"] == "ENABLED" and one["runtime_config"]["parameters"]["count"] == 5


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"cron": "0 25 * * *"}, "schedule weekly: cron '0 25 * * *' has a bad hour"),
        ({"cron": ""}, "schedule weekly: it needs either cron or every, and has both or none"),
        ({"every": "6h"}, "schedule weekly: it needs either cron or every"),
        ({"cron": "", "every": "six hours"}, "schedule weekly: every 'six hours' is not an interval"),
        ({"time_zone": "Mars"}, "schedule weekly: there is no time zone 'Mars'"),
        (
            {"start": "2027-02-01", "end": "2027-01-01"},
            "schedule weekly: it ends (2027-01-01 00:00:00) before it starts",
        ),
        ({"max_concurrency": 11}, "schedule weekly: max_concurrency: input should be less than or equal to 10"),
        ({"crn": "x"}, "schedule weekly: crn: extra inputs are not permitted"),
        ({"name": "Weekly run"}, "schedule Weekly run: name: string should match pattern"),
        ({"parameters": {"cuont": 1}}, "schedule weekly: the pipeline has no parameter 'cuont'. Did you mean 'count'?"),
        ({"pipeline": "nothing"}, "schedule weekly: no pipeline 'nothing'"),
    ],
)
def test_a_schedule_that_cannot_be_is_named_before_the_cluster_is_asked(tmp_path, entry, sentence):
    file = written(tmp_path, entry)
    with pytest.raises(errors.ConfigError) as caught:
        schedule.check(schedule.read(file), tmp_path, None, NOW, "")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_is_said(tmp_path):
    for text, sentence in (
        ("schedules: [", "is not a file of schedules"), ("[]", "the file: input should be"),
        ("schedules: []", "owner: field required"),
    ):  # fmt: skip
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(errors.ConfigError, match=sentence):
            schedule.read(tmp_path / "s.yaml")
    with pytest.raises(errors.ConfigError, match="has two schedules named 'weekly'"):
        schedule.read(written(tmp_path, {}, {}))
    with pytest.raises(errors.ConfigError, match="does not exist"):
        schedule.read(tmp_path / "nothing.yaml")


def test_a_dry_run_shows_the_next_five_times_in_both_zones_and_asks_nobody(kubeflow, tmp_path, capsys, monkeypatch):
    file = written(tmp_path, {"time_zone": "Asia/Tokyo"}, {"name": "off", "enabled": False, "cron": "", "every": "1d"})
    code, said, _ = call(capsys, monkeypatch, "schedule", "-f", file, "--dry-run")
    assert code == 0 and said.count("Mon 03:00 Asia/Tokyo") == 5 and "(disabled)" in said and "Sun " in said
    code, said, _ = call(capsys, monkeypatch, "schedule", "-f", file, "--dry-run", "--json", "--host", kubeflow.host)
    assert code == 0 and [len(one["next"]) for one in json.loads(said)] == [5, 5] and kubeflow.requests == []


def test_the_command_says_what_it_did(kubeflow, tmp_path, capsys, monkeypatch):
    file, at = written(tmp_path, {}), ("--host", kubeflow.host)
    code, said, told = call(capsys, monkeypatch, "schedule", "-f", file, *at)
    assert code == 0 and "weekly  create, enable" in said and "weekly: create" in told
    code, said, _ = call(capsys, monkeypatch, "schedule", "-f", file, "--json", *at)
    assert code == 0 and json.loads(said) == [{"name": "weekly", "actions": []}]
    code, _, error = call(capsys, monkeypatch, "schedule", "-f", written(tmp_path, {"cron": "x"}), *at)
    assert code == 2 and "must have five fields" in error and "Traceback" not in error
