"""What infra/ starts, started here: the very arguments, settings and scripts of the rendered manifests, as processes.

PostgreSQL, S3 and MLflow are real; only Kubernetes is missing. See servers.py for the first two.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.manifests import ROOT, named, render, template
from tests.servers import S3, Postgres, Server, free_ports
from tests.test_exporter import free_port

ADMIN, READER, TEAM = (
    ("admin", "a-password-of-admins"),
    ("reader", "a-password-of-readers"),
    ("team", "a-password-of-teams"),
)
pytestmark = pytest.mark.slow


def config(objects, key):
    """The ConfigMap that has a key."""
    (found,) = (o["data"] for o in objects if o["kind"] == "ConfigMap" and key in o["data"])
    return found


@pytest.fixture(scope="module")
def rendered():
    return render("overlays/kind")


@pytest.fixture(scope="module")
def scripts(rendered, tmp_path_factory):
    """The scripts as a pod finds them in /scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in config(rendered, "restore.sh").items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        server.create("mlflow")
        server.create("mlflow_auth")
        yield server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with S3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("slimline")
        yield server


@pytest.fixture(scope="module")
def environment(rendered, database, bucket, tmp_path_factory):
    """What a pod of infra/ gets: the ConfigMap as it is, but for addresses, and what stands in the Secrets."""
    ini = tmp_path_factory.mktemp("sign-in") / "basic_auth.ini"  # mounted, where MLflow's own code runs
    ini.write_text(config(rendered, "basic_auth.ini")["basic_auth.ini"])
    for kind, name in (("Job", "mlflow-migrate"), ("Deployment", "mlflow")):
        mounts = template(named(rendered, kind, name))["spec"]["containers"][0]["volumeMounts"]
        at = {mount["name"]: mount["mountPath"] for mount in mounts}["sign-in"]
        assert config(rendered, "PGHOST")["MLFLOW_AUTH_CONFIG_PATH"] == f"{at}/basic_auth.ini"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLIMLINE_", "AWS_", "PG"))}
    kept["PATH"] = f"{Path(sys.executable).parent}:{database.bin}:{kept['PATH']}"
    return {
        **kept, **config(rendered, "PGHOST"), **config(rendered, "BACKUPS"), **database.env, **bucket.env,
        "MLFLOW_AUTH_CONFIG_PATH": str(ini), "BACKUP": "newest", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(scripts, environment, name, **more):
    return subprocess.run(
        ["sh", scripts / name], env={**environment, **more}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def migrated(scripts, environment):
    """Both databases with tables in them, made by the Job's script."""
    early = run(scripts, environment, "wait.sh", WAIT_S="0")
    done = run(scripts, environment, "migrate.sh")
    assert done.returncode == 0, done.stderr
    return early


class Tracking(Server):
    """The container `mlflow` of the Deployment, its arguments and settings untouched."""

    patience_s = 300.0

    def __init__(self, folder, objects, environment):
        super().__init__(folder)
        self.port, self.environment = free_ports(1)[0], environment
        (self.one,) = template(named(objects, "Deployment", "mlflow"))["spec"]["containers"]
        self.metrics = folder / "metrics"

    def command(self):
        moved = [word.replace("=/metrics", f"={self.metrics}") for word in self.one["args"]]
        return [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), *moved]

    def start(self, **options):
        secrets = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "for-forms", "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1]}
        hosts = f"{self.environment['MLFLOW_SERVER_ALLOWED_HOSTS']},localhost:{self.port}"  # not everybody says `Host`
        secrets["MLFLOW_SERVER_ALLOWED_HOSTS"] = hosts
        super().start(env={**self.environment, **secrets}, cwd=self.folder, **options)

    def answers(self):
        try:
            return self.ask(self.one["readinessProbe"]["httpGet"]["path"])[0] == 200
        except OSError:
            return False

    def ask(self, path, user=None, body=None, **headers):
        """(status, text) of a request; with a body it is a POST."""
        if user:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
        headers.setdefault("Host", "mlflow.slimline.svc:5000")  # as a step asks for it
        data = None if body is None else json.dumps(body).encode()
        if data:
            headers["Content-Type"] = "application/json"
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def done(self, path, user, **body):
        status, text = self.ask(f"/api/2.0/mlflow/{path}", user, body)
        assert status == 200, text
        return json.loads(text)


@pytest.fixture(scope="module")
def server(rendered, environment, migrated, tmp_path_factory):
    with Tracking(tmp_path_factory.mktemp("mlflow"), rendered, environment) as one:
        for name, password in (READER, TEAM):
            one.done("users/create", ADMIN, username=name, password=password)
        yield one


SEARCH = "/api/2.0/mlflow/registered-models/search"


def test_servers_wait_for_the_migrations_and_migrating_twice_changes_nothing(migrated, scripts, environment, database):
    assert migrated.returncode == 1 and "see the job mlflow-migrate" in migrated.stderr
    assert run(scripts, environment, "wait.sh", WAIT_S="0").returncode == 0
    tables = database.query("mlflow", "select count(*) from pg_tables where schemaname = 'public'")
    again = run(scripts, environment, "migrate.sh")
    assert again.returncode == 0, again.stderr
    assert database.query("mlflow", "select count(*) from pg_tables where schemaname = 'public'") == tables


def test_probes_are_answered_unsigned_and_nothing_else_is(server):
    probes = {server.one[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {server.ask(path, Host="10.1.2.3:5000")[0] for path in probes} == {200}
    assert {server.ask(path)[0] for path in ("/", SEARCH, "/metrics", "/version")} == {401}
    assert server.ask(SEARCH, ("reader", "guessed"))[0] == 401
    assert server.ask(SEARCH, READER)[0] == 200


def test_a_host_that_is_not_named_and_a_page_of_another_site_are_refused(server):
    assert server.ask(SEARCH, READER, Host="evil.example.com")[0] == 403
    assert (
        server.ask("/api/2.0/mlflow/experiments/create", TEAM, {"name": "x"}, Origin="https://evil.example.com")[0]
        == 403
    )


def test_artifacts_go_to_the_bucket_and_not_through_the_server(server):
    made = server.done("experiments/create", TEAM, name="straight")["experiment_id"]
    _, text = server.ask(f"/api/2.0/mlflow/experiments/get?experiment_id={made}", TEAM)
    assert json.loads(text)["experiment"]["artifact_location"].startswith("s3://slimline/mlflow/")
    assert server.ask("/api/2.0/mlflow-artifacts/artifacts", ADMIN)[0] in (403, 404, 503)


def test_whoever_made_a_model_moves_its_champion_and_a_reader_does_not(server):
    experiment = server.done("experiments/create", TEAM, name="roles")["experiment_id"]
    run_id = server.done("runs/create", TEAM, experiment_id=experiment)["run"]["info"]["run_id"]
    server.done("registered-models/create", TEAM, name="reviews")
    source = {
        "name": "reviews",
        "source": f"s3://slimline/mlflow/{experiment}/{run_id}/artifacts/model",
        "run_id": run_id,
    }
    server.done("model-versions/create", TEAM, **source)
    champion = {"name": "reviews", "alias": "champion", "version": "1"}
    assert server.ask("/api/2.0/mlflow/registered-models/alias", READER, champion)[0] == 403
    assert server.ask("/api/2.0/mlflow/model-versions/create", READER, source)[0] == 403
    server.done("registered-models/alias", TEAM, **champion)
    asked = "/api/2.0/mlflow/registered-models/alias?name=reviews&alias=champion"
    assert json.loads(server.ask(asked, READER)[1])["model_version"]["version"] == "1"


def test_mlflow_shows_its_numbers_to_its_administrator_alone_and_the_sidecar_to_prometheus(
    server, rendered, environment
):
    assert server.ask("/metrics", READER)[0] == 403  # why there is a sidecar
    spec = template(named(rendered, "Deployment", "mlflow"))["spec"]
    sidecar = next(one for one in spec["initContainers"] if one["name"] == "metrics")
    port = free_port()
    words = [w.replace("9095", str(port)).replace("/metrics", str(server.metrics)) for w in sidecar["command"]]
    assert words[:3] == ["python3", "-m", "slimline.cli"]
    served = subprocess.Popen([sys.executable, *words[1:]], env={**environment, "PYTHONPATH": str(ROOT)})
    try:
        text = until_served(port, "mlflow_http_request_total")
        assert re.search(r'mlflow_http_request_total\{method="GET",status="401"\} [1-9]', text)
    finally:
        served.terminate()
        assert served.wait(30) == 143


def test_champions_are_read_over_http_by_a_user_who_may_only_look(server, rendered, environment):
    server.done("registered-models/create", TEAM, name="judged")
    server.done("model-versions/create", TEAM, name="judged", source="s3://slimline/mlflow/x",
                tags=[{"key": "slimline.verdict", "value": "FAIL"}])  # fmt: skip
    (one,) = template(named(rendered, "Deployment", "metrics"))["spec"]["containers"]
    given = {variable["name"] for variable in one["env"]}
    assert given == {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    who = dict(zip(sorted(given), (READER[1], f"http://127.0.0.1:{server.port}", READER[0]), strict=True))
    who["MLFLOW_TRACKING_URI"], port = f"http://localhost:{server.port}", free_port()
    words = [w.replace("9095", str(port)) for w in one["command"]]
    served = subprocess.Popen([sys.executable, *words[1:]], env={**environment, **who, "PYTHONPATH": str(ROOT)})
    try:
        assert 'slimline_gate_not_passed_in_a_row{model="judged"} 1.0' in until_served(port, "slimline_store_up 1.0")
    finally:
        served.terminate()
        served.wait(30)


def until_served(port, wanted):
    for _ in range(600):
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            if wanted in text:
                return text
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{wanted} is not served")


# The databases, to the bucket and back


@pytest.fixture
def kept(scripts, environment, migrated, tmp_path):
    """A function that makes a backup, as the CronJob does, and returns its name."""

    def keep(**more):
        folder = tmp_path / "dump"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("dump.sh", "keep.sh"):
            done = run(scripts, environment, name, FOLDER=str(folder), **more)
            assert done.returncode == 0, done.stderr
        time.sleep(1.1)  # names are seconds
        return done.stdout.strip().rpartition("\n")[2].split("/")[-2]

    return keep


def restored(scripts, environment, folder, **more):
    folder.mkdir()
    for name in ("fetch.sh", "restore.sh"):
        done = run(scripts, environment, name, FOLDER=str(folder), **more)
        if done.returncode:
            break
    return done


def rows(database):
    """Every row of both databases, as texts."""
    found = {}
    for name in ("mlflow", "mlflow_auth"):
        for (table,) in database.query(name, "select tablename from pg_tables where schemaname = 'public' order by 1"):
            found[name, table] = database.query(name, f'select t::text from "{table}" t order by 1')
    return found


def write(database, value):
    database.query(
        "mlflow", f"insert into experiments (name, lifecycle_stage, workspace) values ('{value}', 'active', 'default')"
    )
    database.query(
        "mlflow_auth", f"insert into users (username, password_hash, is_admin) values ('{value}', 'x', false)"
    )


@pytest.fixture
def stopped(database, migrated):
    """Nobody uses the databases: restoring asks for that."""
    database.restart()
    return database


def test_what_was_dumped_and_wiped_comes_back_row_by_row(kept, scripts, environment, stopped, bucket, tmp_path):
    write(stopped, "before")
    kept()
    was = rows(stopped)
    assert len(was) > 60 and sum(map(len, was.values())) > 3
    for name in ("mlflow", "mlflow_auth"):
        stopped.drop(name)
        stopped.create(name)
    assert rows(stopped) == {}
    done = restored(scripts, environment, tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert rows(stopped) == was
    write(stopped, "after")  # and it is a database like any other: sequences go on, and it is backed up again
    kept()
    second = rows(stopped)
    assert restored(scripts, environment, tmp_path / "second").returncode == 0
    assert rows(stopped) == second != was


def test_a_backup_is_taken_by_name_and_replaces_what_came_later(kept, scripts, environment, stopped, tmp_path):
    name, was = kept(), rows(stopped)
    write(stopped, "later")
    kept()
    assert restored(scripts, environment, tmp_path / "back", BACKUP=name).returncode == 0
    assert rows(stopped) == was


def test_nothing_is_restored_under_a_server_that_runs(kept, scripts, environment, stopped, tmp_path):
    kept()
    was = rows(stopped)
    import psycopg

    with psycopg.connect(stopped_url(stopped)):
        done = restored(scripts, environment, tmp_path / "back")
    assert done.returncode == 1 and "1 sessions use mlflow_auth. Stop the servers first" in done.stderr
    assert rows(stopped) == was


def stopped_url(database):
    env = database.env
    return f"postgresql://{env['PGUSER']}:{env['PGPASSWORD']}@127.0.0.1:{database.port}/mlflow_auth"


@pytest.mark.parametrize("broken", ["cut short", "changed"])
def test_a_dump_that_is_not_what_was_kept_leaves_the_databases_alone(
    kept, scripts, environment, stopped, bucket, tmp_path, broken
):
    name, was = kept(), rows(stopped)
    key = f"backups/{name}/mlflow_auth.dump"
    whole = bucket.client().get_object(Bucket="slimline", Key=key)["Body"].read()
    bytes_ = whole[: len(whole) // 2] if broken == "cut short" else whole[:-1] + bytes([whole[-1] ^ 1])
    bucket.client().put_object(Bucket="slimline", Key=key, Body=bytes_)
    done = restored(scripts, environment, tmp_path / "back", BACKUP=name)
    assert done.returncode != 0 and "mlflow_auth.dump" in done.stderr + done.stdout
    assert rows(stopped) == was


def test_a_restore_that_fails_in_the_middle_leaves_the_database_as_it_was(
    kept, scripts, environment, stopped, tmp_path
):
    name, was = kept(), rows(stopped)
    # Whatever is made in this database from here on fails, as on a full disk, when half of it is there.
    fail = "create function theirs.fail() returns event_trigger language plpgsql as $$ begin raise 'disk full'; end $$"
    stopped.query("mlflow", f"create schema theirs; {fail}")
    when = "create event trigger full_disk on ddl_command_end when tag in ('CREATE INDEX')"
    stopped.query("mlflow", f"{when} execute function theirs.fail()")
    done = restored(scripts, environment, tmp_path / "back", BACKUP=name)
    stopped.query("mlflow", "drop event trigger full_disk; drop schema theirs cascade")
    assert done.returncode != 0 and "disk full" in done.stderr
    assert rows(stopped) == was


def test_the_newest_are_kept_incomplete_ones_count_for_nothing_and_are_not_restored(
    kept, scripts, environment, stopped, bucket, tmp_path
):
    names = [kept(KEEP="2") for _ in range(3)]
    torn = "9999-01-01T00-00-00Z"  # begun later than all, never finished: no sums
    bucket.client().put_object(Bucket="slimline", Key=f"backups/{torn}/mlflow.dump", Body=b"half")
    there = {key.split("/")[1] for key in bucket.keys("slimline", "backups/")}
    assert there == {*names[1:], torn}
    done = run(scripts, environment, "fetch.sh", FOLDER=str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip().endswith(f"{names[2]}/")
    for key in bucket.keys("slimline", f"backups/{torn}/"):
        bucket.client().delete_object(Bucket="slimline", Key=key)


def test_where_there_is_no_backup_that_is_said(scripts, environment, tmp_path):
    done = run(scripts, environment, "fetch.sh", FOLDER=str(tmp_path), BACKUPS="s3://slimline/elsewhere")
    assert done.returncode == 1 and "there is no complete backup at s3://slimline/elsewhere" in done.stderr
