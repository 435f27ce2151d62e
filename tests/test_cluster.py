"""Submitting, uploading, waiting and reading logs, over HTTP, against the published description of the API."""

import ipaddress
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
import typer

from slimline import cli, errors, runs, submit
from slimline.cluster import Absent, Away, Cluster, Place
from tests.kubeflow import SWAGGER, Kubeflow, client, described, small

VALUES = {
    "text": "t",
    "count": 3,
    "rate": 2.0,
    "sure": True,
    "several": [1, "two", [3.5]],
    "options": {"a": {"b": [True]}},
}


@pytest.fixture
def order(tmp_path):
    return submit.order(str(small(tmp_path)))


@pytest.fixture
def version(cluster, order):
    return submit.upload(cluster, order)


def call(capsys, monkeypatch, *arguments):
    """The installed entry: exit code, standard output, and standard error in one line."""
    monkeypatch.setattr(sys, "argv", ["slimline", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    return stop.value.code, said.out, " ".join(said.err.split())


def once(*storms):
    """Weather that comes for the first requests to an operation, one each, and then is fine."""
    left = {}

    def weather(request, wanted):
        left.setdefault(wanted, list(storms))
        return left[wanted].pop(0) if request.operation == wanted and left[wanted] else None

    return weather


def test_the_generated_classes_and_the_published_description_agree_on_what_we_use():
    if not SWAGGER.is_file():
        pytest.skip("the published Swagger file is not beside this repository")
    published = json.loads(SWAGGER.read_text())["paths"]
    ours = [o for o in described() if o.template.startswith("/apis/v2beta1/") and re.search(USED, o.name)]
    assert len(ours) == 17
    for operation in ours:
        known = published[operation.template][operation.method.lower()]
        given = known.get("parameters", [])
        # The published file is a year of patches younger: what the classes know, it knows, and not always the reverse.
        assert set(operation.query) <= {p["name"] for p in given if p["in"] == "query"}, operation.name
        bodies = [p["schema"]["$ref"].rpartition("/")[2] for p in given if p["in"] == "body"]
        assert [operation.body] == [b[0].upper() + b[1:] for b in bodies] or (not operation.body and not bodies)


USED = (
    "get_pipeline_by_name|create_pipeline$|list_pipeline_versions|upload_pipeline_version|experiments$|create_experiment"
    "|create_run$|get_run$|list_runs|terminate_run|recurring_run|healthz"
)


def test_parameters_keep_their_kinds_on_the_way(kubeflow, cluster, order, version):
    whole = submit.check(order, VALUES)
    run, new = submit.submit(cluster, version, whole, submit.Start(name="first", service_account="runner"))
    kept = kubeflow.runs[run["run_id"]]
    assert new and kept["runtime_config"]["parameters"] == VALUES
    assert {k: type(v) for k, v in kept["runtime_config"]["parameters"].items()} == {
        k: type(v) for k, v in VALUES.items()
    }
    assert kept["service_account"] == "runner" and kept["display_name"] == "first"
    assert kubeflow.experiments[kept["experiment_id"]]["display_name"] == "small"
    assert kept["pipeline_version_reference"]["pipeline_version_id"] == version.version_id


def test_the_same_specification_is_uploaded_once_whatever_its_text_looks_like(kubeflow, cluster, order, tmp_path):
    first = submit.upload(cluster, order)
    file = tmp_path / "small.yaml"
    file.write_text("# a comment\n" + file.read_text())
    again = submit.upload(cluster, submit.order(str(file)))
    assert first.new and not again.new and again.version_id == first.version_id
    changed = submit.upload(cluster, submit.order(str(small(tmp_path, said="good bye"))))
    assert changed.new and changed.pipeline_id == first.pipeline_id and len(kubeflow.versions) == 2
    assert [r.operation for r in kubeflow.requests].count("upload_pipeline_version") == 2


def test_a_version_is_named_for_its_commit_and_for_its_digest_where_something_is_not_committed(
    kubeflow, cluster, tmp_path
):  # fmt: skip
    file = small(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    first = submit.upload(cluster, submit.order(str(file)))
    assert first.name == f"0.1.0-{commit}" and commit in kubeflow.versions[first.version_id]["description"]
    dirty = submit.order(str(small(tmp_path, said="changed")))
    assert submit.upload(cluster, dirty).name == f"0.1.0-{submit.digest(dirty.compiled)[:12]}"
    other = submit.order(str(small(tmp_path, said="other")))
    subprocess.run([*git, "commit", "-qam", "two"], check=True)
    assert re.fullmatch(r"0\.1\.0-[0-9a-f]{12}", submit.upload(cluster, other).name)
    subprocess.run([*git, "checkout", "-q", commit], check=True)
    elsewhere = submit.order(str(small(tmp_path / "..", name="small", said="at the same commit")))._replace(
        source=tmp_path
    )
    name = submit.upload(cluster, elsewhere).name
    assert name == f"0.1.0-{commit}-{submit.digest(elsewhere.compiled)[:8]}"  # one name is one specification


@pytest.mark.parametrize("weather", ["cut", "lost", "503", "500", "half", "slow"])
def test_an_answer_that_is_lost_neither_loses_nor_doubles_a_version_or_a_run(kubeflow, order, weather):
    cluster, storms = client(kubeflow, timeout_s=0.5), once(weather, weather)
    kubeflow.slow_s = 0.8
    changing = ("create_pipeline", "upload_pipeline_version", "create_experiment", "create_run")
    kubeflow.weather = lambda r: storms(r, r.operation) if r.operation.endswith(changing) else None
    version = submit.upload(cluster, order)
    run, _ = submit.submit(cluster, version, submit.check(order, VALUES), submit.Start())
    threading.Event().wait(0.5 if weather == "slow" else 0)  # what was given up as lost is done by now
    assert [len(t) for t in (kubeflow.pipelines, kubeflow.versions, kubeflow.experiments)] == [1, 1, 1]
    again, new = submit.submit(cluster, version, submit.check(order, VALUES), submit.Start(key=key_of(kubeflow, run)))
    alive = [r for r in kubeflow.runs.values() if r["state"] != "CANCELED"]
    assert not new and len(alive) == 1
    assert again["run_id"] in kubeflow.runs


def key_of(kubeflow, run):
    return re.search(r"key=(\w+)", kubeflow.runs[run["run_id"]]["description"])[1]


def test_a_build_that_is_started_again_finds_its_run_by_the_key(kubeflow, cluster, order, version):
    values = submit.check(order, VALUES)
    first, new = submit.submit(cluster, version, values, submit.Start(key="build-17"))
    again, newer = submit.submit(cluster, version, values, submit.Start(key="build-17"))
    other, newest = submit.submit(cluster, version, values, submit.Start(key="build-18"))
    assert (new, newer, newest) == (True, False, True) and first["run_id"] == again["run_id"] != other["run_id"]


def test_of_two_runs_with_one_key_the_later_is_stopped(kubeflow, cluster, order, version):
    values = submit.check(order, VALUES)
    threads = [
        threading.Thread(target=lambda: submit.submit(client(kubeflow), version, values, submit.Start(key="raced")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = [run["state"] for run in sorted(kubeflow.runs.values(), key=lambda r: r["created_at"])]
    assert states[0] == "PENDING" and set(states[1:]) <= {"CANCELED"}


def test_a_name_that_another_team_has_is_said_with_the_team(kubeflow, cluster, tmp_path):
    submit.upload(cluster, submit.order(str(small(tmp_path)), team="vision"))
    with pytest.raises(errors.ConfigError, match=r"'small' is taken by team vision, and you are team speech\. Give"):
        submit.upload(cluster, submit.order(str(small(tmp_path)), team="speech"))
    assert submit.upload(cluster, submit.order(str(small(tmp_path)), name="ours", team="speech")).pipeline == "ours"
    cluster.create_pipeline("by-hand", "Made in the page.")
    with pytest.raises(errors.ConfigError, match="taken by somebody who did not use slimline"):
        submit.upload(cluster, submit.order(str(small(tmp_path)), name="by-hand"))


def test_teams_in_namespaces_of_their_own_do_not_see_each_other(tmp_path):
    token = tmp_path / "token"
    token.write_text("of-vision\n")
    with Kubeflow(tokens={"of-vision": {"vision"}, "of-speech": {"speech"}}, multi_user=True) as standing:
        ours = client(standing, "vision", str(token))
        order = submit.order(str(small(tmp_path)), namespace="vision")
        version = submit.upload(ours, order)
        run, _ = submit.submit(ours, version, submit.check(order, VALUES), submit.Start())
        assert standing.pipelines[version.pipeline_id]["namespace"] == "vision"
        with pytest.raises(errors.ConfigError, match=r"you may not do this in namespace speech: .*not authorized"):
            runs.find(client(standing, "speech", str(token)))
        token.write_text("of-speech")
        theirs = client(standing, "speech", str(token))
        assert runs.find(theirs) == [] and submit.upload(theirs, order._replace(team="speech")).new
        with pytest.raises(errors.ConfigError, match="you may not do this in namespace speech"):
            theirs.run(run["run_id"])
        with pytest.raises(errors.ConfigError, match="you may not do this in namespace speech: pipeline upload denied"):
            theirs.upload_version(version.pipeline_id, small(tmp_path), "x", "x")
        assert standing.wrong == []


def test_a_token_that_expires_is_read_again_and_one_that_stays_expired_is_said(tmp_path):
    token = tmp_path / "token"
    token.write_text("old")
    with Kubeflow(tokens={"old": {"vision"}, "new": {"vision"}}) as standing:
        cluster = client(standing, "vision", str(token))
        assert runs.find(cluster) == []
        del standing.tokens["old"]

        def renewing(request):  # the kubelet writes while the first request is refused
            token.write_text("new")

        standing.weather = renewing
        assert runs.find(cluster) == []
        standing.weather = lambda request: None
        token.write_text("older still")
        with pytest.raises(errors.StoreError, match=r"does not know who asks \(401 .*\)\. Sign in again, and give"):
            runs.find(cluster)
    with pytest.raises(errors.ConfigError, match="the token file /nowhere does not exist"):
        Cluster(Place("http://x", token_file="/nowhere"))


@pytest.mark.parametrize(
    ("weather", "sentence"),
    [
        ("redirect", r"does not know who asks \(302"),
        ("page", r"answers with a page, not with the API"),
        ("503", r"answered 503 \(the database is away\) and went on doing so"),
        ("429", r"answered 429"),
        ("cut", r"cannot be reached"),
        ("half", r"cannot be reached"),
    ],
)
def test_whatever_stands_in_the_way_is_said_in_one_sentence_with_exit_5(kubeflow, weather, sentence):
    kubeflow.weather = lambda request: weather
    with pytest.raises(errors.StoreError, match=sentence) as caught:
        runs.find(client(kubeflow, patience_s=0.05))
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)


def test_a_server_that_is_away_for_a_while_is_waited_for(kubeflow):
    kubeflow.weather = lambda request: "503" if request.number < 4 else "cut" if request.number < 6 else None
    assert runs.find(client(kubeflow)) == [] and len(kubeflow.requests) == 7


def test_a_server_that_is_not_there_is_said_with_its_address():
    with pytest.raises(Away, match=r"http://127\.0\.0\.1:9 cannot be reached \(.*refused.*\)\. Check --host"):
        runs.find(Cluster(Place("http://127.0.0.1:9", patience_s=0)))


def test_no_address_is_said_with_what_to_type(monkeypatch):
    for variable in ("KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(errors.ConfigError, match="no Kubeflow is named.*port-forward"):
        Cluster(Place())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert Cluster(Place()).host == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"


def test_a_certificate_is_trusted_when_its_authority_is_given_and_refused_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificate = self_signed(tmp_path)
    with Kubeflow() as standing:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        standing.server.socket = context.wrap_socket(standing.server.socket, server_side=True)
        host = standing.host.replace("http:", "https:")
        with pytest.raises(errors.ConfigError, match=r"a certificate that is not trusted .*--ca-cert"):
            runs.find(Cluster(Place(host, patience_s=0)))
        assert runs.find(Cluster(Place(host, ca_cert=str(certificate)))) == []


def self_signed(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "certificate.pem"
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


def test_runs_are_read_page_by_page_and_no_further_than_asked(kubeflow, cluster, order, version):
    body = submit.body(cluster, version, submit.check(order, VALUES), submit.Start())
    made = [cluster.create_run({"display_name": f"run {n}", **body})["run_id"] for n in range(23)]
    for run_id in made[:5]:
        kubeflow.runs[run_id]["state"] = "FAILED"
    kubeflow.page = 4
    assert [run["run_id"] for run in runs.find(cluster, limit=100)] == made[::-1]
    asked = len(kubeflow.requests)
    assert [run["run_id"] for run in runs.find(cluster, limit=3)] == made[:-4:-1]
    assert len(kubeflow.requests) == asked + 1
    assert {run["run_id"] for run in runs.find(cluster, state="failed", experiment="small")} == set(made[:5])
    with pytest.raises(errors.ConfigError, match=r"there is no state 'broken'\. There is: PENDING"):
        runs.find(cluster, state="broken")
    with pytest.raises(errors.ConfigError, match="there is no experiment 'other'"):
        runs.find(cluster, experiment="other")


def started(kubeflow, cluster, order, version, state="RUNNING", said="", error=""):
    """A run as Argo shows one: drivers, a step, its executor with a second try, and what comes next."""
    run, _ = submit.submit(cluster, version, submit.check(order, VALUES), submit.Start())
    run_id = run["run_id"]

    def task(name, pod, children, state="SUCCEEDED", error=""):
        at = datetime.fromtimestamp(1_800_000_000 + len(tasks), UTC).isoformat()
        failure = {"error": {"code": 1, "message": error}} if error else {}
        tasks.append({
            "run_id": run_id, "task_id": pod, "display_name": name, "pod_name": pod, "state": state, "start_time": at,
            "child_tasks": [{"pod_name": child} for child in children], **failure,
        })  # fmt: skip

    tasks: list = []
    task("root", "p-0", ["p-1"])
    task("say-driver", "p-1", ["p-2"])
    task("say", "p-2", ["p-3"], state)
    task("executor", "p-3", ["p-4", "p-5"], state)
    task("executor(0)", "p-4", [], "FAILED")
    task("executor(1)", "p-5", ["p-6"], state, error)
    task("next-driver", "p-6", [], "PENDING")
    kubeflow.runs[run_id] |= {"state": state, "run_details": {"task_details": tasks}}
    kubeflow.logs |= {(run_id, "p-4"): "the first try\n", (run_id, "p-5"): said}
    return run_id


TRACEBACK = "Traceback (most recent call last):\n  File ...\nslimline.errors.DataError: no column 'label'. Add it.\n"


@pytest.mark.parametrize(
    ("said", "error", "kind", "sentence"),
    [
        (TRACEBACK, "", errors.DataError, "step say failed: no column 'label'. Add it."),
        ('{"event": "error", "kind": "GateError", "message": "no."}\n', "", errors.GateError, "step say failed: no."),
        ("", "Error (exit code 2)", errors.ConfigError, "step say failed: Error (exit code 2). See `slimline logs"),
        ("", "OOMKilled (exit code 137)", errors.StoreError, "step say failed: OOMKilled (exit code 137)"),
        ("", "Pod was evicted", errors.StoreError, "step say failed: Pod was evicted"),
        ("Segmentation fault\n", "", errors.SlimlineError, "step say failed: it does not say why"),
    ],
)
def test_a_run_that_failed_ends_as_its_step_did(kubeflow, cluster, order, version, said, error, kind, sentence):
    run_id = started(kubeflow, cluster, order, version, "FAILED", said, error)
    reason = runs.failure(cluster, runs.wait(cluster, run_id))
    assert type(reason) is kind and str(reason).startswith(sentence)


def test_waiting_outlives_a_restart_of_the_server_and_ends_with_the_run(kubeflow, order):
    cluster = client(kubeflow)
    run_id = started(kubeflow, cluster, order, submit.upload(cluster, order))
    seen = []

    def weather(request):
        seen.append(request)
        if len(seen) == 9:
            kubeflow.runs[run_id]["state"] = "SUCCEEDED"
        return {2: "cut", 3: "503", 4: "503", 6: "lost"}.get(len(seen))

    kubeflow.weather = weather
    told = []
    run = runs.wait(cluster, run_id, tell=lambda run: told.append(run["state"]), poll_s=0.001)
    assert runs.failure(cluster, run) is None and told[0] == "RUNNING" and told[-1] == "SUCCEEDED" and len(seen) >= 9


def test_waiting_gives_up_when_told_and_a_cancelled_run_is_worth_another(kubeflow, cluster, order, version):
    run_id = started(kubeflow, cluster, order, version)
    with pytest.raises(errors.StoreError, match=r"is still RUNNING after 0 s\. It goes on; wait again"):
        runs.wait(cluster, run_id, timeout_s=0.01, poll_s=0.001)
    cluster.terminate(run_id)
    reason = runs.failure(cluster, runs.wait(cluster, run_id))
    assert isinstance(reason, errors.StoreError) and "was canceled. Submit it again" in str(reason)
    with pytest.raises(Absent, match=r"Run nothing not found\. See `slimline runs`"):
        runs.wait(cluster, "nothing")


def test_the_verdict_is_read_from_the_summary_that_a_step_wrote(kubeflow, cluster, order, version):
    def judged(text):
        return runs.verdict(cluster, cluster.run(started(kubeflow, cluster, order, version, "SUCCEEDED", text)))

    summary = '{"event": "summary", "step": "report", "status": "%s", "sentence": "It lost 3 points."}\n'
    assert judged("a line\n" + summary % "PASS") is None
    assert str(judged(summary % "FAIL")) == "the verdict is FAIL: It lost 3 points."
    assert "cannot be seen" in str(judged("a line\n")) and judged("").exit_code == 4


def test_a_log_is_that_of_the_last_try_of_the_step_and_not_of_what_is_around_it(
    kubeflow, cluster, order, version
):  # fmt: skip
    run_id = started(kubeflow, cluster, order, version, said="the second try\n")
    assert [(s.name, s.pods) for s in runs.steps(cluster.run(run_id))] == [("say", ("p-4", "p-5"))]
    assert runs.logs(cluster, run_id) == runs.logs(cluster, run_id, "say") == [("say", "the second try\n")]
    with pytest.raises(Absent, match=r"has no step 'next' that has begun\. It has: say\."):
        runs.logs(cluster, run_id, "next")
    del kubeflow.logs[run_id, "p-5"]
    with pytest.raises(Absent, match=r"there is no log of p-5: the pod is gone .*kubectl logs p-5 -c main"):
        runs.logs(cluster, run_id, "say")


def test_following_shows_each_line_once_until_the_step_has_ended(kubeflow, cluster, order, version):
    run_id = started(kubeflow, cluster, order, version, said="one\n")
    seen = []
    for piece in runs.follow(cluster, run_id, "say", poll_s=0.001):
        seen.append(piece)
        if len(seen) == 1:
            kubeflow.logs[run_id, "p-5"] += "two\n"
        else:
            kubeflow.runs[run_id]["state"] = "SUCCEEDED"
    assert seen == ["one\n", "two\n"]


def test_submit_says_run_version_and_page_and_exits_as_the_run_does(kubeflow, tmp_path, capsys, monkeypatch):
    file, at = small(tmp_path), ("--host", kubeflow.host)
    code, said, _ = call(capsys, monkeypatch, "submit", file, "--set", "count=4", "--key", "k", "--json", *at)
    told = json.loads(said)
    assert code == 0 and told["new"] and told["url"] == f"{kubeflow.host}/#/runs/details/{told['run_id']}"
    assert kubeflow.runs[told["run_id"]]["runtime_config"]["parameters"]["count"] == 4
    code, said, _ = call(capsys, monkeypatch, "submit", file, "--set", "count=4", "--key", "k", *at)
    assert code == 0 and "(it was there already)" in said and len(kubeflow.runs) == 1
    kubeflow.runs[told["run_id"]]["state"] = "SUCCEEDED"
    code, said, _ = call(capsys, monkeypatch, "wait", told["run_id"], "--json", *at)
    assert code == 0 and json.loads(said)["state"] == "SUCCEEDED" and json.loads(said)["error"] is None
    code, _, error = call(capsys, monkeypatch, "wait", told["run_id"], "--require-pass", *at)
    assert code == 4 and "cannot be seen" in error
    kubeflow.runs[told["run_id"]]["state"] = "CANCELED"
    code, said, error = call(
        capsys, monkeypatch, "submit", file, "--set", "count=4", "--key", "k", "--wait", "--json", *at
    )
    assert code == 5 and json.loads(said)["state"] == "CANCELED" and "was canceled" in error


def test_what_is_wrong_with_a_recipe_is_said_before_the_cluster_is_asked(kubeflow, tmp_path, capsys, monkeypatch):
    file, at = small(tmp_path), ("--host", kubeflow.host)
    code, _, error = call(capsys, monkeypatch, "submit", file, "--set", "cuont=4", *at)
    assert code == 2 and "Did you mean 'count'?" in error
    code, _, error = call(capsys, monkeypatch, "submit", file, "--set", "count=many", *at)
    assert code == 2 and "a whole number is needed" in error
    code, said, _ = call(capsys, monkeypatch, "submit", file, "--dry-run", "--json", "--set", "options.a=1")
    assert code == 0 and json.loads(said)["parameters"]["options"] == {"a": 1}
    assert kubeflow.requests == []


def test_upload_runs_and_logs_speak_json(kubeflow, tmp_path, capsys, monkeypatch):
    at = ("--host", kubeflow.host)
    pipelines = [small(tmp_path), small(tmp_path, name="other")]
    code, said, _ = call(capsys, monkeypatch, "upload", *pipelines, "--json", *at)
    assert code == 0 and [v["pipeline"] for v in json.loads(said)] == ["small", "other"]
    code, said, _ = call(capsys, monkeypatch, "upload", *pipelines, *at)
    assert code == 0 and said.count("(the same is there already)") == 2
    code, _, error = call(capsys, monkeypatch, "upload", *pipelines, "--as", "one", *at)
    assert code == 2 and "--as names one pipeline" in error
    run = json.loads(call(capsys, monkeypatch, "submit", pipelines[0], "--json", *at)[1])["run_id"]
    assert [r["run_id"] for r in json.loads(call(capsys, monkeypatch, "runs", "--json", *at)[1])] == [run]
    code, said, _ = call(capsys, monkeypatch, "runs", *at)
    assert code == 0 and run in said and "PENDING" in said
    assert json.loads(call(capsys, monkeypatch, "logs", run, "--json", *at)[1]) == []
    code, _, error = call(capsys, monkeypatch, "logs", run, "--follow", *at)
    assert code == 2 and "--follow needs the name of one step" in error
    code, _, error = call(capsys, monkeypatch, "runs", "--host", "http://127.0.0.1:9", "--patience", "0")
    assert code == 5 and "cannot be reached" in error and "Traceback" not in error


@pytest.mark.parametrize("command", ["submit", "upload", "schedule", "runs", "wait", "logs"])
def test_help_says_what_every_option_means(command, capsys, monkeypatch):
    code, said, _ = call(capsys, monkeypatch, command, "--help")
    assert code == 0 and "--json" in said and "KF_PIPELINES_ENDPOINT" in said
    parameters = typer.main.get_command(cli.app).commands[command].params
    assert len(parameters) > 5 and all(p.help for p in parameters)


def test_the_command_line_starts_without_the_client_of_the_cluster():
    code = "import slimline.cli, sys; print({'kfp_server_api', 'cronsim', 'urllib3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
