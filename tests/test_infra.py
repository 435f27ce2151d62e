"""infra/ as Kubernetes would get it: rendered, checked against its description, and held to rules of our own."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.manifests import INFRA, RENDERED, ROOT, containers, faults, named, render, secrets_of_kind, template

KUBERNETES = ("1.31", "1.34")  # the oldest and the newest that the manifests are checked against
BUILT_IN = re.compile(r"^(v1|(apps|batch|policy|autoscaling)/v1|(rbac\.authorization|networking|storage)\.k8s\.io/v1)$")


def whole(folder):
    """The objects of a folder, and the secrets that it refers to without bringing them."""
    objects = render(folder)
    if folder == "overlays/production":
        return objects
    spaces = {o["metadata"]["namespace"] for o in objects if "namespace" in o["metadata"]}
    given = [s for s in secrets_of_kind() if s["metadata"]["namespace"] in spaces]
    return objects + [{**s, "kind": "ExternalSecret", "spec": external(s)} for s in given]


def external(secret):
    return {"target": {"name": secret["metadata"]["name"]}, "data": [{"secretKey": k} for k in secret["stringData"]]}


@pytest.mark.parametrize("folder", RENDERED)
def test_every_rule_of_ours_holds(folder):
    assert faults(whole(folder)) == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", ["overlays/kind", "overlays/production"])  # and so base, team and monitoring
def test_kubernetes_knows_every_field(folder, version):
    for thing in (o for o in render(folder) if BUILT_IN.match(o["apiVersion"])):
        kubernetes_validate.validate(thing, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_refused():
    thing = copy.deepcopy(named(render("base"), "Deployment", "mlflow"))
    thing["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(thing, KUBERNETES[0], strict=True)


# What the operators' own descriptions know of the fields that are used here (they are not built into Kubernetes).
CUSTOM = {
    "monitoring.coreos.com/v1 ServiceMonitor": {"selector", "endpoints", "endpoints.port", "endpoints.interval"},
    "monitoring.coreos.com/v1 PrometheusRule": {
        "groups", "groups.name", "groups.rules", *(f"groups.rules.{k}" for k in ("alert", "expr", "for")),
    },
    "external-secrets.io/v1 ExternalSecret": {
        "refreshInterval", "secretStoreRef", "secretStoreRef.kind", "secretStoreRef.name", "target", "target.name",
        "data", "data.secretKey", "data.remoteRef", "data.remoteRef.key", "data.remoteRef.property",
    },
}  # fmt: skip
FREE = ("labels", "annotations", "matchLabels", "matchExpressions")  # whatever stands below these


def fields(thing, path=""):
    for one in thing if isinstance(thing, list) else [thing]:
        if isinstance(one, dict):
            for key, value in one.items():
                if key not in FREE:
                    yield f"{path}{key}"
                    yield from fields(value, f"{path}{key}.")


@pytest.mark.parametrize("folder", RENDERED)
def test_operators_know_every_field(folder):
    for thing in render(folder):
        if not BUILT_IN.match(thing["apiVersion"]):
            assert set(fields(thing["spec"])) <= CUSTOM[f"{thing['apiVersion']} {thing['kind']}"], thing["kind"]


def pod(objects, name="mlflow"):
    return template(named(objects, "Deployment", name))["spec"]


def server(objects):
    return pod(objects)["containers"][0]


def policy(objects, name):
    return named(objects, "NetworkPolicy", name)["spec"]


def role(objects, name):
    return named(objects, "Role", name, "team")["rules"]


def without(objects, kind, name):
    objects.remove(named(objects, kind, name))


MUTATIONS = {
    "may run as root": lambda o: pod(o)["securityContext"].pop("runAsNonRoot"),
    "whom the node knows": lambda o: pod(o)["securityContext"].update(runAsUser=0),
    "no seccomp profile": lambda o: pod(o)["securityContext"].pop("seccompProfile"),
    "is given a token": lambda o: pod(o).pop("automountServiceAccountToken"),
    "shares the node": lambda o: pod(o).update(hostNetwork=True),
    "`restricted` forbids": lambda o: pod(o)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "may gain privileges": lambda o: server(o)["securityContext"].update(privileged=True),
    "may write to its root": lambda o: server(o)["securityContext"].pop("readOnlyRootFilesystem"),
    "keeps capabilities": lambda o: server(o)["securityContext"]["capabilities"].update(add=["NET_RAW"]),
    "root after all": lambda o: server(o)["securityContext"].update(runAsUser=0),
    ":latest is no one image": lambda o: server(o).update(image="slimline-mlflow:latest"),
    "mlflow is no one image": lambda o: server(o).update(image="registry.example.com:5000/slimline-mlflow"),
    "no limits for memory": lambda o: server(o)["resources"]["limits"].pop("memory"),
    "wait has no requests for cpu": lambda o: pod(o)["initContainers"][0]["resources"]["requests"].pop("cpu"),
    "has no readinessProbe": lambda o: server(o).pop("readinessProbe"),
    "metrics has no livenessProbe": lambda o: pod(o)["initContainers"][1].pop("livenessProbe"),
    "more than can be named": lambda o: role(o, "reads")[0].update(verbs=["*"]),
    "secrets that it does not name": lambda o: role(o, "promotes")[0].pop("resourceNames"),
    "whole cluster": lambda o: named(o, "Role", "reads", "team").update(kind="ClusterRole"),
    "a role that is not there": lambda o: named(o, "RoleBinding", "reads", "team")["roleRef"].update(name="x"),
    "bound to nobody": lambda o: o.remove(named(o, "RoleBinding", "reads", "team")),
    "binds an account": lambda o: named(o, "RoleBinding", "step", "team")["subjects"][0].update(name="x"),
    "to-database selects no pod": lambda o: policy(o, "to-database")["podSelector"]["matchLabels"].update(x="y"),
    "peer that is no pod": lambda o: policy(o, "to-mlflow")["ingress"][0]["from"][0].update(
        namespaceSelector={"matchLabels": {"slimline/taem": "true"}}
    ),
    "everybody through": lambda o: policy(o, "to-mlflow")["ingress"][0].pop("from"),
    "no policy that denies": lambda o: without(o, "NetworkPolicy", "nobody"),
    "lets nobody in from there": lambda o: without(o, "NetworkPolicy", "from-database-users"),
    "does not listen": lambda o: policy(o, "prometheus-to-metrics")["ingress"][0]["ports"][0].update(port=9096),
    "Service/slimline/mlflow selects no pod": lambda o: named(o, "Service", "mlflow")["spec"]["selector"].update(a="b"),
    "ports that no container has": lambda o: named(o, "Service", "mlflow")["spec"]["ports"][0].update(targetPort="x"),
    "protects no pod": lambda o: named(o, "PodDisruptionBudget", "mlflow")["spec"]["selector"].update(
        matchLabels={"app.kubernetes.io/name": "flow"}
    ),
    "select its own pods": lambda o: pod(o)["topologySpreadConstraints"][0]["labelSelector"].update(
        matchLabels={"app": "mlflow"}
    ),
    "account that is not there": lambda o: without(o, "ServiceAccount", "metrics"),
    "refers to Secret mlflow-server": lambda o: without(o, "ExternalSecret", "mlflow-server"),
    "which has no such key": lambda o: pod(o, "metrics")["containers"][0]["env"][1]["valueFrom"]["secretKeyRef"].update(
        key="user"
    ),
    "refers to ConfigMap x": lambda o: pod(o)["volumes"][-2]["configMap"].update(name="x"),
    "which the pod has not": lambda o: pod(o)["volumes"].pop(0),
    "does not enforce": lambda o: named(o, "Namespace", "slimline", "")["metadata"]["labels"].pop(
        "pod-security.kubernetes.io/enforce"
    ),
    "has no ResourceQuota": lambda o: without(o, "ResourceQuota", "platform"),
    "no bound on GPUs": lambda o: named(o, "ResourceQuota", "team", "team")["spec"]["hard"].pop(
        "requests.nvidia.com/gpu"
    ),
    "written down": lambda o: o.append(secrets_of_kind()[0]),
    "keeps PGPASSWORD in the open": lambda o: server(o).update(env=[{"name": "PGPASSWORD", "value": "x"}]),
    "password in a URL": lambda o: server(o)["args"].append("--backend-store-uri=postgresql://me:secret@host/db"),
    "may run for ever": lambda o: named(o, "Job", "mlflow-migrate")["spec"].pop("activeDeadlineSeconds"),
}


@pytest.mark.parametrize("said", MUTATIONS)
def test_a_broken_rule_is_seen(said):
    objects = copy.deepcopy(whole("overlays/kind"))
    MUTATIONS[said](objects)
    assert any(said in fault for fault in faults(objects)), faults(objects)


def test_an_ingress_without_tls_is_seen():
    objects = copy.deepcopy(whole("overlays/production"))
    del named(objects, "Ingress", "mlflow")["spec"]["tls"]
    assert any("without TLS" in fault for fault in faults(objects))


def test_the_secrets_of_a_laptop_are_new_each_time_and_those_that_production_gets():
    first, second = secrets_of_kind(), secrets_of_kind()
    passwords = [set(s["stringData"].values()) - {"mlflow", "reader", "slimline", "team"} for s in first + second]
    assert all(len(word) >= 12 for found in passwords for word in found)  # MLflow asks twelve of its administrator
    assert not set.union(*passwords[: len(first)]) & set.union(*passwords[len(first) :])
    keys = {s["metadata"]["name"]: set(s["stringData"]) for s in first}
    asked = [o for o in render("overlays/production") if o["kind"] == "ExternalSecret"]
    assert {o["spec"]["target"]["name"]: {d["secretKey"] for d in o["spec"]["data"]} for o in asked} == {
        name: found for name, found in keys.items() if name != "slimline-s3"
    }  # an account reaches the bucket there, without a key


def test_two_teams_share_nothing_but_what_they_are_made_of():
    objects = render("overlays/production")
    mine, theirs = ([o for o in objects if o["metadata"].get("namespace") == team] for team in ("search", "support"))
    assert {(o["kind"], o["metadata"]["name"]) for o in mine} == {(o["kind"], o["metadata"]["name"]) for o in theirs}
    for objects, other in ((mine, "support"), (theirs, "search")):
        assert other not in yaml.safe_dump(objects)
    assert not [o for o in objects if "team-" in json.dumps(o.get("subjects", []))]


def test_reading_is_less_than_running_and_neither_sees_the_key_that_promotes():
    objects = render("team")
    verbs = {name: {v for rule in role(objects, name) for v in rule["verbs"]} for name in ("reads", "runs-pipelines")}
    assert verbs["reads"] == {"get", "list", "watch"} and "create" in verbs["runs-pipelines"]
    for name in ("reads", "runs-pipelines"):
        assert "secrets" not in {r for rule in role(objects, name) for r in rule["resources"]}
    assert role(objects, "promotes")[0]["resourceNames"] == ["slimline-mlflow"]


def test_the_platform_keeps_off_gpu_nodes_and_only_teams_may_ask_for_gpus():
    objects = render("overlays/production")
    for name in ("mlflow", "metrics"):
        (term,) = pod(objects, name)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert term["matchExpressions"] == [{"key": "nvidia.com/gpu.present", "operator": "DoesNotExist"}]
    quotas = {o["metadata"]["namespace"]: o["spec"]["hard"] for o in objects if o["kind"] == "ResourceQuota"}
    assert {space: hard["requests.nvidia.com/gpu"] for space, hard in quotas.items()} == {
        "slimline": "0", "search": "4", "support": "2",
    }  # fmt: skip


def test_the_page_that_a_browser_opens_is_one_that_the_server_lets_in():
    objects = render("overlays/production")
    (host,) = (rule["host"] for rule in named(objects, "Ingress", "mlflow")["spec"]["rules"])
    (config,) = (o["data"] for o in objects if o["kind"] == "ConfigMap" and "PGHOST" in o["data"])
    assert host in config["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert config["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"


def test_steps_ask_for_mlflow_by_a_name_that_it_answers_to():
    objects = render("overlays/production")
    (allowed,) = (o["data"] for o in objects if o["kind"] == "ConfigMap" and "PGHOST" in o["data"])
    for thing in objects:
        if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == "slimline":
            host = thing["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
            assert host in allowed["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_the_proxied_component_changes_the_artifact_mode_and_nothing_else(tmp_path):
    shutil.copytree(INFRA, tmp_path / "infra")
    site = tmp_path / "infra/overlays/site"
    site.mkdir()
    (site / "kustomization.yaml").write_text("resources: [../../base]\ncomponents: [../../proxied]\n")
    done = subprocess.run(["kubectl", "kustomize", site], capture_output=True, text=True, check=True)
    before, after = render("base"), list(yaml.safe_load_all(done.stdout))
    one, other = server(before), server(after)
    assert "--no-serve-artifacts" in one["args"] and "--no-serve-artifacts" not in other["args"]
    assert other["args"][-2:] == [
        "--artifacts-destination=$(MLFLOW_DEFAULT_ARTIFACT_ROOT)", "--default-artifact-root=mlflow-artifacts:/",
    ]  # fmt: skip
    for key in ("args", "env"):
        one.pop(key, None)
        other.pop(key, None)
    assert before == after


@pytest.mark.parametrize("script", sorted(INFRA.rglob("*.sh")), ids=lambda p: p.name)
def test_a_script_is_what_shellcheck_would_write(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not on this machine: apt-get install shellcheck")
    assert script.read_text().startswith("#!/bin/sh\n# ")  # as the images have it, whose sh is not always bash
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_that_a_pod_runs_is_brought_to_it():
    for folder in ("base", "overlays/kind"):
        objects = render(folder)
        (brought,) = (set(o["data"]) for o in objects if o["kind"] == "ConfigMap" and "restore.sh" in o["data"])
        run = set()
        for thing in objects:
            for one, _ in containers(template(thing)["spec"]) if template(thing) else ():
                run |= {word.removeprefix("/scripts/") for word in one.get("command", []) if "/scripts/" in word}
        assert run == brought


@pytest.fixture(scope="module")
def promtool():
    local = ROOT / "build/prometheus/usr/bin/promtool"
    found = shutil.which("promtool") or (str(local) if local.exists() else None)
    if not found:
        pytest.skip("promtool is not on this machine: apt-get install prometheus")
    return found


def test_alerts_say_what_they_must_when_they_must(promtool, tmp_path):
    (rules,) = (o["spec"] for o in render("monitoring") if o["kind"] == "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    cases = tmp_path / "alerts.yaml"
    cases.write_text((Path(__file__).parent / "alerts.yaml").read_text())
    done = subprocess.run([promtool, "test", "rules", cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {
        case["alertname"] for test in yaml.safe_load(cases.read_text())["tests"] for case in test["alert_rule_test"]
    }
    assert tried == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


def test_the_dashboard_asks_only_for_numbers_that_are_served():
    (board,) = (o["data"]["dashboard.json"] for o in render("monitoring") if o["kind"] == "ConfigMap")
    panels = json.loads(board)["panels"]
    asked = {w for p in panels for t in p["targets"] for w in re.findall(r"\b(?:slimline|mlflow|kube)_\w+", t["expr"])}
    exporter = (ROOT / "slimline/exporter.py").read_text()
    for number in asked:
        plain = re.sub(r"_(total|bucket)$", "", number)
        assert f'"{plain}"' in exporter or number.startswith(("mlflow_http_request", "kube_pod_container_status"))
    assert len({p["id"] for p in panels}) == len(panels) == 9
