"""A stand-in for Kubeflow's API server: real HTTP, the published description, and the state that a client can see.

Which operations there are, with which parameters and bodies, is read from the generated classes of kfp-server-api;
where the published Swagger file lies beside the repository, it is asked, too. Each request, and each answer, is
checked: what the description does not know is refused with 400 and kept in `wrong`, which the fixture asserts to be
empty. What a real server does beyond its description (statuses, unique names, authorization, five fields of cron that
mean another thing) is taken from its source. Failures are injected by `weather`, which is told of each request before
it is done.
"""

import base64
import email
import inspect
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml
from kfp_server_api import api, models

from slimline.cluster import Cluster, Place

SWAGGER = Path(__file__).parent.parent / "../shared/kfp/kfp_api_v2beta1.swagger.json"
LOGS = re.compile(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log")

UNDESCRIBED = {"commit_sha", "tag_name", "pipeline_store"}
"""What a real server says of its health beyond the description."""

FILTERED = {
    "runs": {"run_id", "display_name", "name", "description", "state", "created_at", "experiment_id", "storage_state"},
    "experiments": {"experiment_id", "display_name", "name"},
    "pipelines": {"pipeline_id", "display_name", "name", "description"},
    "pipeline_versions": {"pipeline_version_id", "display_name", "name", "description"},
    "recurringRuns": {"recurring_run_id", "display_name", "name", "description"},
}


class Operation(NamedTuple):
    """What the description says of one operation."""

    name: str
    method: str
    template: str
    query: dict[str, str]
    body: str
    files: tuple[str, ...]
    response: str

    def match(self, path: str) -> dict[str, str] | None:
        parts = re.split(r"\{([\w.]+)\}", self.template)
        pattern = "".join(
            re.escape(p) if i % 2 == 0 else f"(?P<{p.replace('.', '_')}>[^/:]+)" for i, p in enumerate(parts)
        )
        found = re.fullmatch(pattern, path)
        return found and {key: unquote(value) for key, value in found.groupdict().items()}


def described() -> list[Operation]:
    """All operations of the generated client."""
    found = []
    for service in vars(api).values():
        if not inspect.isclass(service):
            continue
        for name, method in inspect.getmembers(service, inspect.isfunction):
            if not name.endswith("_with_http_info"):
                continue
            source, types = inspect.getsource(method), dict(re.findall(r":type (\w+): (.+)", method.__doc__))
            verb = re.search(r"call_api\(\s*'([^']+)', '(\w+)'", source)
            body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
            found.append(
                Operation(
                    name.removesuffix("_with_http_info"), verb[2], verb[1],
                    {q: types[q] for q in re.findall(r"query_params\.append\(\('(\w+)'", source)},
                    types[body[1]] if body else "",
                    tuple(re.findall(r"local_var_files\['(\w+)'\] =", source)),
                    (re.search(r"response_type='([^']+)'", source) or [None, "object"])[1],
                )
            )  # fmt: skip
    # A fixed part of a path wins over a variable one.
    return sorted(found, key=lambda o: o.template.count("{"))


def faults(value, kind: str, where: str):
    """Where a value is not of a kind, by the generated models."""
    if kind in ("object", "file") or value is None:
        return
    if kind in PLAIN:
        if not PLAIN[kind](value):
            yield f"{where} is no {kind}: {value!r}"
        return
    if nested := re.fullmatch(r"(list)\[(.+)\]|(dict)\(str, (.+)\)", kind):
        wanted, inner = (list, nested[2]) if nested[1] else (dict, nested[4])
        if not isinstance(value, wanted):
            yield f"{where} is no {kind}: {value!r}"
            return
        parts = value.items() if wanted is dict else enumerate(value)
        for key, item in parts:
            yield from faults(item, inner, f"{where}.{key}")
        return
    yield from model_faults(value, getattr(models, kind), where)


PLAIN = {
    "str": lambda v: isinstance(v, str),
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "datetime": lambda v: isinstance(v, str) and datetime.fromisoformat(v).tzinfo is not None,
}


def model_faults(value, model, where: str):
    if hasattr(model, "allowable_values"):
        if value not in model.allowable_values:
            yield f"{where} is none of {model.allowable_values}: {value!r}"
    elif not isinstance(value, dict):
        yield f"{where} is no {model.__name__}: {value!r}"
    else:
        kinds = {model.attribute_map[key]: model.openapi_types[key] for key in model.openapi_types}
        yield from (f"{where} has no {key}" for key in value if key not in kinds)
        for key in kinds.keys() & value.keys():
            yield from faults(value[key], kinds[key], f"{where}.{key}")


class Swagger:
    """The published description itself."""

    def __init__(self, text: str) -> None:
        import jsonschema

        self.whole = json.loads(text)
        for definition in self.whole["definitions"].values():
            if "properties" in definition:
                definition.setdefault("additionalProperties", False)
        self.validator = jsonschema.Draft4Validator
        self.formats = jsonschema.FormatChecker(formats=())
        self.formats.checks("int64")(lambda v: isinstance(v, str) and re.fullmatch(r"-?\d+", v) is not None)
        self.formats.checks("date-time", raises=ValueError)(lambda v: datetime.fromisoformat(v).tzinfo is not None)

    def faults(self, operation: Operation, query: dict, body):
        plain = re.sub(r"\{[\w.]+\}", "{}", operation.template)
        paths = {re.sub(r"\{[\w.]+\}", "{}", path): methods for path, methods in self.whole["paths"].items()}
        known = paths.get(plain, {}).get(operation.method.lower())
        if known is None:
            yield f"the published description has no {operation.method} {operation.template}"
            return
        given = {p["name"]: p for p in known["parameters"]} if "parameters" in known else {}
        yield from (
            f"the published description has no ?{name}" for name in query if given.get(name, {}).get("in") != "query"
        )
        wanted = next((p["schema"] for p in given.values() if p["in"] == "body"), None)
        if wanted is not None:
            schema = {**wanted, "definitions": self.whole["definitions"]}
            for error in self.validator(schema, format_checker=self.formats).iter_errors(body):
                yield f"the published description: {'.'.join(map(str, error.path))}: {error.message}"


class Refused(Exception):
    """An answer that is not fine."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Request(NamedTuple):
    """A request as `weather` sees it."""

    number: int
    method: str
    path: str
    operation: str


class Kubeflow:
    """The state of an installation, and the server in front of it."""

    def __init__(self, tokens: dict[str, set[str]] | None = None, multi_user: bool = False, version: str = "2.17.0"):
        self.operations = described()
        self.swagger = Swagger(SWAGGER.read_text()) if SWAGGER.is_file() else None
        self.tokens, self.multi_user, self.version = tokens, multi_user, version
        self.pipelines, self.versions, self.experiments, self.runs, self.schedules = {}, {}, {}, {}, {}
        self.logs: dict[tuple[str, str], str] = {}
        self.weather: Callable[[Request], str | None] = lambda request: None
        self.watch: Callable[[Kubeflow], None] = lambda kubeflow: None
        self.slow_s, self.page = 1.5, 200
        self.requests, self.wrong, self.bodies, self.ticks = [], [], [], 0
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"kubeflow": self}))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def made(self, **fields) -> dict:
        """What an output has beyond what was given: a moment later than all before."""
        self.ticks += 1
        return {key: value for key, value in fields.items() if value is not None} | {
            "created_at": datetime.fromtimestamp(1_800_000_000 + self.ticks).astimezone().isoformat()
        }

    def answer(self, method: str, target: str, headers, raw: bytes):
        """The status and body for a request; checked both ways."""
        place = urlsplit(target)
        query = dict(parse_qsl(place.query))
        if found := LOGS.fullmatch(place.path):
            return self.log(headers, *map(unquote, found.groups()))
        for operation in self.operations:
            if operation.method == method and (path := operation.match(place.path)) is not None:
                break
        else:
            self.wrong.append(f"{method} {place.path} is not described")
            return 404, {"message": "Not Found"}
        body, form = {}, {}
        if operation.files:
            form = multipart(headers["Content-Type"], raw)
        elif raw:
            body = json.loads(raw)
        found = list(self.check(operation, query, body, form))
        self.wrong += found
        if found:
            return 400, {"message": "; ".join(found)}
        try:
            self.authorize(operation, headers, query, body, path)
            reply = getattr(self, operation.name)(query=query, body=body, form=form, **path)
        except Refused as refusal:
            kind = "error_message" if operation.files else "message"
            return refusal.status, {kind: str(refusal), "code": refusal.status}
        self.watch(self)
        shown = without(reply, UNDESCRIBED) if operation.name.endswith("healthz") else reply
        bad = list(faults(shown, operation.response, f"answer of {operation.name}"))
        self.wrong += bad
        return 200, reply

    def check(self, operation: Operation, query: dict, body, form: dict):
        self.bodies.append((operation.name, query, body))
        for name, value in query.items():
            if name not in operation.query:
                yield f"{operation.name} has no ?{name}"
            elif operation.query[name] == "int" and not value.isdigit():
                yield f"{operation.name}?{name} is no int: {value!r}"
        if operation.body:
            yield from faults(body, operation.body, operation.name)
        elif body:
            yield f"{operation.name} takes no body"
        yield from (f"{operation.name} lacks {name}" for name in operation.files if name not in form)
        if "filter" in query:
            yield from faults(json.loads(query["filter"]), "V2beta1Filter", f"{operation.name}?filter")
        if self.swagger:
            yield from self.swagger.faults(operation, query, body)

    def authorize(self, operation: Operation, headers, query: dict, body, path: dict) -> None:
        if self.tokens is None or operation.name == "healthz_service_get_healthz":
            return
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.tokens:
            raise Refused(401, "Request header error: there is no valid token")
        of = {**self.runs, **self.schedules, **self.pipelines, **self.experiments}
        named = next((of[value].get("namespace") for value in path.values() if value in of), None)
        holder = self.experiments.get(body.get("experiment_id", "")) if isinstance(body, dict) else None
        pipeline = self.pipelines.get(query.get("pipelineid", ""))
        namespace = (
            named or (holder or pipeline or {}).get("namespace") or query.get("namespace") or body.get("namespace")
        )
        if namespace not in self.tokens[token]:
            said = f"User is not authorized in namespace {namespace!r}"
            raise Refused(400, f"pipeline upload denied: {said}") if operation.files else Refused(403, said)

    def log(self, headers, run_id: str, pod: str):
        if (run_id, pod) not in self.logs:
            return 500, {"error_message": f'Failed to read logs: pods "{pod}" not found'}
        return 200, self.logs[run_id, pod]

    def healthz_service_get_healthz(self, **_):
        return {"commit_sha": "0", "tag_name": self.version, "multi_user": self.multi_user}

    def pipeline_service_get_pipeline_by_name(self, name, query, **_):
        for pipeline in self.pipelines.values():
            if pipeline["name"] == name and pipeline.get("namespace", "") == query.get("namespace", ""):
                return pipeline
        raise Refused(404, f"Pipeline with name {name} not found")

    def pipeline_service_create_pipeline(self, body, **_):
        body = {key: value for key, value in body.items() if value}
        space = body.get("namespace", "")
        if any(p["name"] == body["name"] and p.get("namespace", "") == space for p in self.pipelines.values()):
            raise Refused(409, f"Pipeline {body['name']} already exists")
        return self.keep(self.pipelines, "pipeline_id", body)

    def pipeline_service_list_pipeline_versions(self, pipeline_id, query, **_):
        mine = [v for v in self.versions.values() if v["pipeline_id"] == pipeline_id]
        return self.listed("pipeline_versions", mine, query)

    def upload_pipeline_version(self, query, form, **_):
        if query["pipelineid"] not in self.pipelines:
            raise Refused(400, "Failed to create a pipeline version")
        mine = [v for v in self.versions.values() if v["pipeline_id"] == query["pipelineid"]]
        if any(v["name"] == query["name"] for v in mine):
            raise Refused(409, "Failed to create a pipeline version")
        documents = list(yaml.safe_load_all(form["uploadfile"]))
        spec = {"pipeline_spec": documents[0], "platform_spec": documents[1]} if len(documents) > 1 else documents[0]
        given = {key: query[key] for key in ("name", "display_name", "description") if key in query}
        return self.keep(
            self.versions, "pipeline_version_id", {**given, "pipeline_id": query["pipelineid"], "pipeline_spec": spec}
        )

    def experiment_service_list_experiments(self, query, **_):
        return self.listed("experiments", self.within(self.experiments, query), query)

    def experiment_service_create_experiment(self, body, **_):
        space = body.get("namespace", "")
        for known in self.experiments.values():
            if known["display_name"] == body["display_name"] and known.get("namespace", "") == space:
                raise Refused(409, f"Experiment {body['display_name']} already exists")
        return self.keep(self.experiments, "experiment_id", body)

    def run_service_create_run(self, body, **_):
        self.require(body)
        space = self.experiments[body["experiment_id"]].get("namespace")
        return self.keep(self.runs, "run_id", {**body, "state": "PENDING", "namespace": space}, hidden={"namespace"})

    def run_service_get_run(self, run_id, **_):
        if run_id not in self.runs:
            raise Refused(404, f"Run {run_id} not found")
        return without(self.runs[run_id], {"namespace"})

    def run_service_list_runs(self, query, **_):
        mine = self.within(self.runs, query)
        if "experiment_id" in query:
            mine = [run for run in mine if run["experiment_id"] == query["experiment_id"]]
        return self.listed("runs", [without(run, {"namespace"}) for run in mine], query)

    def run_service_terminate_run(self, run_id, **_):
        self.runs[run_id]["state"] = "CANCELED"
        return {}

    def recurring_run_service_create_recurring_run(self, body, **_):
        self.require(body)
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise Refused(400, "Max concurrency of a recurring run must be at least 1 and at most 10")
        if "cron_schedule" in body["trigger"]:
            robfig(body["trigger"]["cron_schedule"]["cron"])
        elif int(body["trigger"]["periodic_schedule"]["interval_second"]) < 1:
            raise Refused(400, "Found invalid period schedule interval")
        status = "ENABLED" if body.get("mode") == "ENABLE" else "DISABLED"
        space = self.experiments[body["experiment_id"]].get("namespace")
        return self.keep(self.schedules, "recurring_run_id", {**body, "status": status, "namespace": space})

    def recurring_run_service_list_recurring_runs(self, query, **_):
        return self.listed("recurringRuns", self.within(self.schedules, query), query)

    def recurring_run_service_enable_recurring_run(self, recurring_run_id, **_):
        return self.switch(recurring_run_id, "ENABLED")

    def recurring_run_service_disable_recurring_run(self, recurring_run_id, **_):
        return self.switch(recurring_run_id, "DISABLED")

    def recurring_run_service_delete_recurring_run(self, recurring_run_id, **_):
        if self.schedules.pop(recurring_run_id, None) is None:
            raise Refused(404, f"Recurring run {recurring_run_id} not found")
        return {}

    def switch(self, recurring_run_id: str, status: str) -> dict:
        if recurring_run_id not in self.schedules:
            raise Refused(404, f"Recurring run {recurring_run_id} not found")
        self.schedules[recurring_run_id]["status"] = status
        return {}

    def require(self, body: dict) -> None:
        reference = body["pipeline_version_reference"]
        if reference.get("pipeline_version_id") not in self.versions:
            raise Refused(404, "The pipeline version was not found")
        if body.get("experiment_id") not in self.experiments:
            raise Refused(400, "The experiment was not found")
        known = spec_of(self.versions[reference["pipeline_version_id"]])["root"]["inputDefinitions"]["parameters"]
        kinds = {"STRING": str, "NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float), "BOOLEAN": bool,
                 "LIST": list, "STRUCT": dict}  # fmt: skip
        for name, value in body["runtime_config"]["parameters"].items():
            if name not in known or not isinstance(value, kinds[known[name]["parameterType"]]):
                raise Refused(400, f"The input parameter {name} is {value!r}")

    def keep(self, into: dict, key: str, fields: dict, hidden=frozenset()) -> dict:
        one = {key: str(uuid.uuid4()), **self.made(**fields)}
        into[one[key]] = one
        return without(one, hidden)

    def within(self, things: dict, query: dict) -> list[dict]:
        if self.multi_user and not query.get("namespace") and not query.get("experiment_id"):
            raise Refused(400, "A namespace is required in multi-user mode")
        space = query.get("namespace")
        return [thing for thing in things.values() if not space or thing.get("namespace") == space]

    def listed(self, field: str, things: list[dict], query: dict) -> dict:
        """A page of things that a filter lets through, in order."""
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", ()):
            if predicate["key"] not in FILTERED[field]:
                raise Refused(400, f"Invalid filter key {predicate['key']}")
            same = predicate["operation"] == "EQUALS"
            wanted = predicate["string_value"]
            has = [str(thing.get(predicate["key"], "")) for thing in things]
            things = [
                t for t, v in zip(things, has, strict=True) if (v == wanted if same else wanted.lower() in v.lower())
            ]
        key, _, way = query.get("sort_by", "created_at asc").partition(" ")
        things = sorted(things, key=lambda thing: str(thing.get(key, "")), reverse=way == "desc")
        asked = {name: query.get(name) for name in ("filter", "sort_by", "namespace", "experiment_id")}
        offset = 0
        if "page_token" in query:
            token = json.loads(base64.b64decode(query["page_token"]))
            if token["asked"] != asked:
                raise Refused(400, "The page token does not match the request")
            offset = token["offset"]
        size = min(int(query.get("page_size", 20)), self.page)
        answer = {field: things[offset : offset + size], "total_size": len(things)}
        if offset + size < len(things):
            token = json.dumps({"offset": offset + size, "asked": asked}).encode()
            answer["next_page_token"] = base64.b64encode(token).decode()
        return answer

    def active(self, name: str) -> list[dict]:
        """The schedules of a name that would start runs now."""
        return [s for s in self.schedules.values() if s["display_name"] == name and s["status"] == "ENABLED"]


def spec_of(version: dict) -> dict:
    return version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])


def without(thing: dict, keys) -> dict:
    return {key: value for key, value in thing.items() if key not in keys}


def multipart(kind: str, raw: bytes) -> dict[str, bytes]:
    whole = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + raw)
    parts = [part for part in whole.walk() if not part.is_multipart()]
    return {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}


def robfig(line: str) -> tuple[list[set[int]], bool]:
    """What robfig/cron 1 reads in a line: the numbers of six fields, and whether both days must match.

    Five fields are read as six without the last: seconds come first. That is what catches people.
    """
    fields = line.split()
    if not 5 <= len(fields) <= 6:
        raise Refused(400, f"Expected 5 to 6 fields, found {len(fields)}: {line}")
    fields += ["*"] * (6 - len(fields))
    bounds = [(0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]
    found = []
    for field, (low, high) in zip(fields, bounds, strict=True):
        numbers = set()
        for part in field.split(","):
            match = re.fullmatch(r"(\*|\?|\d+)(?:-(\d+))?(?:/(\d+))?", part)
            if not match:
                raise Refused(400, f"Failed to parse int from {part}")
            start = low if match[1] in "*?" else int(match[1])
            end = high if match[1] in "*?" or (match[3] and not match[2]) else int(match[2] or start)
            if start < low or end > high or start > end:
                raise Refused(400, f"End of range ({end}) above maximum ({high}): {part}")
            numbers |= set(range(start, end + 1, int(match[3] or 1)))
        found.append(numbers)
    return found, any("*" in field or "?" in field for field in (fields[3], fields[5]))


class Handler(BaseHTTPRequestHandler):
    """HTTP around Kubeflow.answer, with the weather."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    kubeflow: Kubeflow

    def serve(self):
        kubeflow = self.kubeflow
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with kubeflow.lock:
            path = urlsplit(self.path).path
            known = (o.name for o in kubeflow.operations if o.method == self.command and o.match(path) is not None)
            kubeflow.requests.append(Request(len(kubeflow.requests), self.command, path, next(known, "log")))
            weather = kubeflow.weather(kubeflow.requests[-1])
        if weather == "cut":
            return self.hang_up()
        if weather in STORMS:
            return self.reply(*STORMS[weather])
        if weather == "slow":
            time.sleep(kubeflow.slow_s)
        with kubeflow.lock:
            status, answer = kubeflow.answer(self.command, self.path, self.headers, raw)
        if weather in ("lost", "slow"):
            return self.hang_up()
        text, kind = (answer, "text/plain") if isinstance(answer, str) else (json.dumps(answer), "application/json")
        return self.reply(status, text, kind, half=weather == "half")

    def reply(self, status, text, kind="application/json", half=False, **headers):
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        if status == 302:
            self.send_header("Location", "/dex/auth")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass

    do_GET = do_POST = do_DELETE = do_PATCH = serve


STORMS = {
    "500": (500, '{"message": "the database is away"}'),
    "503": (503, '{"message": "the database is away"}'),
    "429": (429, '{"message": "too many requests"}'),
    "page": (200, "<html>Log in to your account</html>", "text/html"),
    "redirect": (302, "", "text/html"),
}
"""Answers of whatever stands in front of the server, before anything is done."""


def client(
    kubeflow: Kubeflow, namespace: str = "", token_file: str = "", patience_s: float = 5.0, timeout_s: float = 5.0
):
    place = Place(kubeflow.host, namespace, token_file, patience_s=patience_s)
    return Cluster(place, timeout_s=timeout_s, pause_s=0.01)


IMAGE = "registry.example.com/ml/slimline-cpu:0.1.0"


def small(folder: Path, name: str = "small", image: str = IMAGE, sdk: str = "kfp-2.17.0", said: str = "hello") -> Path:
    """A compiled pipeline of one step, which takes a parameter of every kind."""
    kinds = {
        "text": ("STRING", "said"), "count": ("NUMBER_INTEGER", 1.0), "rate": ("NUMBER_DOUBLE", 0.5),
        "sure": ("BOOLEAN", False), "several": ("LIST", []), "options": ("STRUCT", {}),
    }  # fmt: skip
    inputs = {
        key: {"parameterType": kind, "defaultValue": value, "isOptional": True} for key, (kind, value) in kinds.items()
    }
    command = ["sh", "-ec", "python3 -m kfp.dsl.executor_main", f"def say(text): print({said!r})"]
    spec = {
        "pipelineInfo": {"name": name, "description": "Says something."},
        "sdkVersion": sdk,
        "components": {"comp-say": {"executorLabel": "exec-say", "inputDefinitions": {"parameters": inputs}}},
        "deploymentSpec": {"executors": {"exec-say": {"container": {
            "image": image, "command": command, "args": ["--executor_input", "{{$}}", "--function_to_execute", "say"],
        }}}},
        "root": {
            "inputDefinitions": {"parameters": inputs},
            "dag": {"tasks": {"say": {"componentRef": {"name": "comp-say"}, "taskInfo": {"name": "say"}, "inputs": {
                "parameters": {key: {"componentInputParameter": key} for key in kinds},
            }}}},
        },
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file
