"""What infra/ renders to, and the rules that it keeps: `faults(objects)` is a sentence for each that is broken.

Kubernetes' own schema is not checked here (kubernetes-validate does that), nor what checkov asks; this is what neither
knows: that selectors select something, that references lead somewhere, that what is sent is also let in.
"""

# Long because it is a list of rules, one short function each.
from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
RENDERED = ("base", "team", "monitoring", "overlays/kind", "overlays/production")
LONG_RUNNING = ("Deployment", "StatefulSet", "DaemonSet")
VOLUMES = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "downwardAPI", "ephemeral", "csi"}
SECRET_WORD = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|PRIVATE|ACCESS_KEY", re.IGNORECASE)

# What is in a cluster beside ours: (labels of the namespace, labels of the pod).
NAME = "kubernetes.io/metadata.name"
STEP = {"pipelines.kubeflow.org/v2_component": "true"}
OUTSIDE = [
    ({NAME: "kube-system"}, {"k8s-app": "kube-dns"}),
    ({NAME: "monitoring"}, {"app.kubernetes.io/name": "prometheus"}),
    ({NAME: "ingress-nginx"}, {"app.kubernetes.io/name": "ingress-nginx"}),
    ({NAME: "kubeflow"}, {"app": "ml-pipeline"}),
]


class Pod(NamedTuple):
    """A pod template: what made it, its namespace and labels, and its spec (None for what is not ours)."""

    owner: str
    namespace: dict[str, str]
    labels: dict[str, str]
    spec: dict[str, Any] | None


@cache
def _rendered(folder: str) -> str:
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"
    done = subprocess.run([kubectl, "kustomize", str(INFRA / folder)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def render(folder: str) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k infra/<folder>` would send."""
    return list(yaml.safe_load_all(_rendered(folder)))


def secrets_of_kind() -> list[dict[str, Any]]:
    """What overlays/kind/secrets.sh prints."""
    done = subprocess.run([INFRA / "overlays/kind/secrets.sh"], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def named(objects, kind, name, namespace="slimline"):
    """The one object of a kind, a name and a namespace."""
    (found,) = (o for o in objects if kind == o["kind"] and _id(o) == (namespace, name))
    return found


def _id(thing):
    return thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def _said(thing):
    return "/".join((thing["kind"], *filter(None, _id(thing))))


def template(thing):
    """The pod template of an object, or None."""
    spec = thing.get("spec", {})
    if thing["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    return spec.get("template") if thing["kind"] in (*LONG_RUNNING, "Job", "CronJob") else None


def containers(spec):
    """(container, whether it stays) of a pod."""
    for one in spec.get("initContainers", []):
        yield one, one.get("restartPolicy") == "Always"
    for one in spec["containers"]:
        yield one, True


def pods(objects, with_outside=True) -> list[Pod]:
    spaces = {o["metadata"]["name"]: o["metadata"].get("labels", {}) for o in objects if o["kind"] == "Namespace"}
    found = []
    for thing in objects:
        if made := template(thing):
            space = thing["metadata"]["namespace"]
            labels = {NAME: space, **spaces.get(space, {})}
            found.append(Pod(_said(thing), labels, made["metadata"].get("labels", {}), made["spec"]))
    if with_outside:
        found += [Pod("outside", space, labels, None) for space, labels in OUTSIDE]
        teams = [(n, labels) for n, labels in spaces.items() if labels.get("slimline/team") == "true"]
        found += [Pod("step", {NAME: name, **labels}, STEP, None) for name, labels in teams]
        if not teams:  # base alone: teams are overlays
            found.append(Pod("step", {NAME: "team", "slimline/team": "true"}, STEP, None))
        if "slimline" not in spaces:  # a team alone: the platform is another overlay
            found.append(Pod("platform", {NAME: "slimline"}, {"app.kubernetes.io/name": "mlflow"}, None))
    return found


def selects(selector, labels) -> bool:
    """Whether a label selector, also an empty one, takes these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for one in selector.get("matchExpressions") or []:
        have, values = labels.get(one["key"]), one.get("values", [])
        met = {"In": have in values, "NotIn": have not in values, "Exists": have is not None,
               "DoesNotExist": have is None}[one["operator"]]  # fmt: skip
        if not met:
            return False
    return True


def _peer_takes(peer, pod: Pod, here: str) -> bool:
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        in_space = selects(peer["namespaceSelector"], pod.namespace)
    else:
        in_space = pod.namespace[NAME] == here
    return in_space and selects(peer.get("podSelector", {}), pod.labels)


def faults(objects) -> list[str]:
    """A sentence for each rule that is broken, and where."""
    rules = (
        _pods_hardened, _containers_hardened, _images, _resources, _probes, _access, _network, _closed, _let_in,
        _listening, _services, _ways_in, _selectors, _accounts, _references, _mounts, _namespaces, _plain_secrets,
        _ends,
    )  # fmt: skip
    return [fault for rule in rules for fault in rule(objects)]


def _pods_hardened(objects) -> Iterator[str]:
    for pod in pods(objects, with_outside=False):
        spec, context = pod.spec, pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) < 10000:
            yield f"{pod.owner} may run as root, or as somebody whom the node knows"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner} has no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner} is given a token of Kubernetes"
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.owner} shares the node's namespaces"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= VOLUMES:
                yield f"{pod.owner} mounts {volume['name']} of a kind that `restricted` forbids"


def _containers_hardened(objects) -> Iterator[str]:
    for pod in pods(objects, with_outside=False):
        for one, _ in containers(pod.spec):
            own = one.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{pod.owner}: {one['name']} may gain privileges"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{pod.owner}: {one['name']} may write to its root file system"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.owner}: {one['name']} keeps capabilities"
            if own.get("runAsNonRoot") is False or own.get("runAsUser", 10000) < 10000:
                yield f"{pod.owner}: {one['name']} runs as root after all"


def _images(objects) -> Iterator[str]:
    for pod in pods(objects, with_outside=False):
        for one, _ in containers(pod.spec):
            tag = one["image"].rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in one["image"] and tag in ("", "latest"):
                yield f"{pod.owner}: {one['image']} is no one image"


def _resources(objects) -> Iterator[str]:
    for pod in pods(objects, with_outside=False):
        for one, _ in containers(pod.spec):
            for side in ("requests", "limits"):
                lacks = {"cpu", "memory", "ephemeral-storage"} - set(one.get("resources", {}).get(side, {}))
                if lacks:
                    yield f"{pod.owner}: {one['name']} has no {side} for {', '.join(sorted(lacks))}"


def _probes(objects) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] not in LONG_RUNNING:
            continue
        spec = template(thing)["spec"]
        for one, stays in containers(spec):
            wanted = {"startupProbe", "livenessProbe"} if stays else set()
            wanted |= {"readinessProbe"} if one in spec["containers"] else set()
            if lacks := wanted - set(one):
                yield f"{_said(thing)}: {one['name']} has no {', '.join(sorted(lacks))}"


def _access(objects) -> Iterator[str]:
    roles = {_id(o) for o in objects if o["kind"] == "Role"}
    bound = set()
    for thing in objects:
        if thing["kind"].startswith("ClusterRole"):
            yield f"{_said(thing)} reaches the whole cluster"
        for rule in thing.get("rules") or []:
            if thing["kind"] == "Role":
                words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
                if "*" in words or {"escalate", "bind", "impersonate"} & set(words):
                    yield f"{_said(thing)} allows more than can be named: {words}"
                if "secrets" in rule["resources"] and (not rule.get("resourceNames") or rule["verbs"] != ["get"]):
                    yield f"{_said(thing)} opens secrets that it does not name"
        if thing["kind"] == "RoleBinding":
            place = (thing["metadata"]["namespace"], thing["roleRef"]["name"])
            bound.add(place)
            if place not in roles:
                yield f"{_said(thing)} binds a role that is not there"
    yield from (f"the role {name} in {space} is bound to nobody" for space, name in roles - bound)


def _policies(objects):
    """(namespace, policy, the pods that it is about)."""
    everybody = pods(objects)
    for thing in objects:
        if thing["kind"] == "NetworkPolicy":
            space, selector = thing["metadata"]["namespace"], thing["spec"]["podSelector"]
            yield space, thing, [p for p in everybody if p.namespace[NAME] == space and selects(selector, p.labels)]


def _network(objects) -> Iterator[str]:
    everybody = pods(objects)
    for space, thing, mine in _policies(objects):
        if not mine:
            yield f"{_said(thing)} selects no pod"
        rules = [(r, "from") for r in thing["spec"].get("ingress", [])]
        rules += [(r, "to") for r in thing["spec"].get("egress", [])]
        for rule, key in rules:
            if not rule.get(key):
                yield f"{_said(thing)} lets everybody through"
            for peer in rule.get(key, []):
                if "ipBlock" not in peer and not any(_peer_takes(peer, p, space) for p in everybody):
                    yield f"{_said(thing)} names a peer that is no pod: {peer}"


def _closed(objects) -> Iterator[str]:
    both = ["Ingress", "Egress"]
    denies = [s for s, p, _ in _policies(objects) if p["spec"] == {"podSelector": {}, "policyTypes": both}]
    for thing in objects:
        if thing["kind"] == "Namespace" and thing["metadata"]["name"] not in denies:
            yield f"{_said(thing)} is open to everybody: it has no policy that denies"


def _let_in(objects) -> Iterator[str]:
    """What one policy lets out to a pod of ours, another must let in."""
    ours = pods(objects, with_outside=False)
    policies = [thing for _, thing, _ in _policies(objects)]
    for space, thing, senders in _policies(objects):
        for rule in thing["spec"].get("egress", []):
            reached = [pod for pod in ours if any(_peer_takes(peer, pod, space) for peer in rule["to"])]
            for pod, sender, port in itertools.product(reached, senders, rule.get("ports", [])):
                if not _admits(policies, pod, sender, port["port"]):
                    yield f"{_said(thing)} sends to {pod.owner}:{port['port']}, which lets nobody in from there"


def _listening(objects) -> Iterator[str]:
    for _, thing, mine in _policies(objects):
        for rule, pod in itertools.product(thing["spec"].get("ingress", []), mine):
            listens = (
                {p["containerPort"] for c, _ in containers(pod.spec) for p in c.get("ports", [])} if pod.spec else ()
            )
            for port in rule["ports"] if pod.spec else ():
                if port["port"] not in listens:
                    yield f"{_said(thing)} lets in to {port['port']}, where {pod.owner} does not listen"


def _admits(policies, pod: Pod, sender: Pod, port: int) -> bool:
    here = pod.namespace[NAME]
    return any(
        _peer_takes(peer, sender, here) and port in [p["port"] for p in rule["ports"]]
        for policy in policies
        if policy["metadata"]["namespace"] == here and selects(policy["spec"]["podSelector"], pod.labels)
        for rule in policy["spec"].get("ingress", [])
        for peer in rule.get("from", [])
    )


def _services(objects) -> Iterator[str]:
    ours = pods(objects, with_outside=False)
    for thing in (o for o in objects if o["kind"] == "Service"):
        space, selector = thing["metadata"]["namespace"], {"matchLabels": thing["spec"]["selector"]}
        behind = [p for p in ours if p.namespace[NAME] == space and selects(selector, p.labels)]
        names = {port["name"] for p in behind for c, _ in containers(p.spec) for port in c.get("ports", [])}
        if not behind:
            yield f"{_said(thing)} selects no pod"
        elif lost := {p["targetPort"] for p in thing["spec"]["ports"]} - names:
            yield f"{_said(thing)} leads to ports that no container has: {lost}"


def _ways_in(objects) -> Iterator[str]:
    services = {_id(o): {p["name"] for p in o["spec"]["ports"]} for o in objects if o["kind"] == "Service"}
    for thing in (o for o in objects if o["kind"] == "Ingress"):
        secured = {host for tls in thing["spec"].get("tls", []) for host in tls["hosts"]}
        for rule in thing["spec"]["rules"]:
            if rule["host"] not in secured:
                yield f"{_said(thing)} serves {rule['host']} without TLS"
            for to in (path["backend"]["service"] for path in rule["http"]["paths"]):
                if to["port"]["name"] not in services.get((thing["metadata"]["namespace"], to["name"]), set()):
                    yield f"{_said(thing)} leads to no service"
    for thing in (o for o in objects if o["kind"] == "ServiceMonitor" and services):
        for one in thing["spec"]["endpoints"]:
            if not any(one["port"] in ports for ports in services.values()):
                yield f"{_said(thing)} scrapes a port that no service has: {one['port']}"


def _selectors(objects) -> Iterator[str]:
    ours = pods(objects, with_outside=False)
    for thing in objects:
        space = thing["metadata"].get("namespace")
        if thing["kind"] == "PodDisruptionBudget" and not any(
            p.namespace[NAME] == space and selects(thing["spec"]["selector"], p.labels) for p in ours
        ):
            yield f"{_said(thing)} protects no pod"
        if thing["kind"] in LONG_RUNNING:
            made = template(thing)
            spread = [one["labelSelector"] for one in made["spec"].get("topologySpreadConstraints", [])]
            for selector in (thing["spec"]["selector"], *spread):
                if not selects(selector, made["metadata"]["labels"]):
                    yield f"{_said(thing)} does not select its own pods"


def _brought(objects) -> dict[tuple[str, str, str], set[str]]:
    """(kind, namespace, name) of everything that is there, and the keys of what has keys."""
    keys: dict[tuple[str, str, str], set[str]] = {}
    for thing in objects:
        space, name = _id(thing)
        keys[thing["kind"], space, name] = {*thing.get("data", {}), *thing.get("stringData", {})}
        if thing["kind"] == "ExternalSecret":
            keys["Secret", space, thing["spec"]["target"]["name"]] = {d["secretKey"] for d in thing["spec"]["data"]}
    return keys


def _accounts(objects) -> Iterator[str]:
    keys = _brought(objects)
    for pod in pods(objects, with_outside=False):
        if ("ServiceAccount", pod.namespace[NAME], pod.spec.get("serviceAccountName")) not in keys:
            yield f"{pod.owner} runs as an account that is not there"
    for thing in objects:
        for one in thing.get("subjects") or []:
            if one["kind"] == "ServiceAccount" and ("ServiceAccount", one["namespace"], one["name"]) not in keys:
                yield f"{_said(thing)} binds an account that is not there"


def _references(objects) -> Iterator[str]:
    keys = _brought(objects)
    for pod in pods(objects, with_outside=False):
        for kind, name, key in _refers(pod.spec):
            if (kind, pod.namespace[NAME], name) not in keys:
                yield f"{pod.owner} refers to {kind} {name}, which is not there"
            elif key is not None and key not in keys[kind, pod.namespace[NAME], name]:
                yield f"{pod.owner} refers to {key} in {kind} {name}, which has no such key"


REFERENCES = {  # field: (kind, where its name stands)
    "configMap": ("ConfigMap", "name"), "secret": ("Secret", "secretName"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"), "configMapRef": ("ConfigMap", "name"),
    "secretRef": ("Secret", "name"), "configMapKeyRef": ("ConfigMap", "name"), "secretKeyRef": ("Secret", "name"),
}  # fmt: skip


def _refers(spec) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, key) of everything that a pod cannot start without."""
    sources = list(spec.get("volumes", []))
    for one, _ in containers(spec):
        sources += one.get("envFrom", []) + [variable.get("valueFrom", {}) for variable in one.get("env", [])]
    for source in sources:
        for field in REFERENCES.keys() & source.keys():
            kind, name = REFERENCES[field]
            if not source[field].get("optional"):
                yield kind, source[field][name], source[field].get("key")


def _mounts(objects) -> Iterator[str]:
    for thing in (o for o in objects if template(o)):
        spec = template(thing)["spec"]
        claims = [claim["metadata"]["name"] for claim in thing["spec"].get("volumeClaimTemplates", [])]
        volumes = {*claims, *(volume["name"] for volume in spec.get("volumes", []))}
        for one, _ in containers(spec):
            if lost := {mount["name"] for mount in one.get("volumeMounts", [])} - volumes:
                yield f"{_said(thing)}: {one['name']} mounts {lost}, which the pod has not"


def _namespaces(objects) -> Iterator[str]:
    kinds = {(o["kind"], o["metadata"].get("namespace")) for o in objects}
    for thing in objects:
        if thing["kind"] == "Namespace":
            for mode in ("enforce", "audit", "warn"):
                if thing["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                    yield f"{_said(thing)} does not {mode} pod security `restricted`"
            for kind in ("ResourceQuota", "LimitRange"):
                if (kind, thing["metadata"]["name"]) not in kinds:
                    yield f"{_said(thing)} has no {kind}"
        if thing["kind"] == "ResourceQuota" and "requests.nvidia.com/gpu" not in thing["spec"]["hard"]:
            yield f"{_said(thing)} sets no bound on GPUs"


def _plain_secrets(objects) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] == "Secret":
            yield f"{_said(thing)} is a secret, written down"
        if re.search(r"://[^/\s:@]+:[^/\s@]+@", yaml.safe_dump(thing)):
            yield f"{_said(thing)} has a password in a URL"
        if thing["kind"] == "ConfigMap":
            for key in thing["data"]:
                if SECRET_WORD.search(key):
                    yield f"{_said(thing)} keeps {key} in the open"
        for one, _ in containers(made["spec"]) if (made := template(thing)) else ():
            for variable in one.get("env", []):
                if "value" in variable and SECRET_WORD.search(variable["name"]):
                    yield f"{_said(thing)} keeps {variable['name']} in the open"


def _ends(objects) -> Iterator[str]:
    for thing in objects:
        spec = thing["spec"]["jobTemplate"]["spec"] if thing["kind"] == "CronJob" else thing.get("spec", {})
        if thing["kind"] in ("Job", "CronJob") and not spec.get("activeDeadlineSeconds"):
            yield f"{_said(thing)} may run for ever"
