"""The API of Kubeflow Pipelines (v2beta1), through its generated classes: the only file that speaks to it.

kfp.Client is not used: it prints, writes settings below the home directory, repeats nothing, and reads a token once.
Here a call that changes nothing is repeated while the server is away, up to a limit; one that creates something is
repeated only after looking whether it was done although its answer was lost. A token is read for each request from
its file, which the kubelet renews.
"""

# Long because each way in which a server can fail to answer has its own sentence.
from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slimline.errors import ConfigError, SlimlineError, StoreError

Thing = dict[str, Any]

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"
MOUNTED_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
MOUNTED_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
HEALTH = "/apis/v2beta1/healthz"
LOGS = "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log"
"""Served by every API server up to 2.17, and in no description of the API."""

PAGE = 100


class Place(NamedTuple):
    """Where the API server is and who asks: what every command on a cluster takes."""

    host: str = ""
    namespace: str = ""
    token_file: str = ""
    ca_cert: str = ""
    patience_s: float = 60.0


class Away(StoreError):
    """The server did not answer, or not well, and may do so later. What was asked for may have been done."""


class Absent(ConfigError):
    """What was asked for is not there."""


class Taken(ConfigError):
    """A name is in use."""


class Cluster:
    """One API server, as one user and in one namespace (which is empty in an installation for a single team)."""

    def __init__(self, place: Place, timeout_s: float = 30.0, pause_s: float = 0.5) -> None:
        self.host = _host(place.host)
        self.namespace = place.namespace or _mounted(MOUNTED_NAMESPACE)
        self.patience_s, self.timeout_s, self.pause_s = place.patience_s, timeout_s, pause_s
        self.token_file = place.token_file or os.environ.get(TOKEN_PATH, "") or MOUNTED_TOKEN
        if (place.token_file or TOKEN_PATH in os.environ) and not Path(self.token_file).is_file():
            raise ConfigError(f"the token file {self.token_file} does not exist. Check --token-file or {TOKEN_PATH}.")
        self.client = self._connect(place.ca_cert or os.environ.get("SSL_CERT_FILE", ""))

    def _connect(self, ca_cert: str) -> Any:
        try:
            import kfp_server_api
            import urllib3
        except ImportError:
            raise ConfigError("a cluster needs kfp. Install it with `pip install 'slimline[launch]'`.") from None
        settings = kfp_server_api.Configuration(host=self.host)
        settings.retries = urllib3.Retry(0, redirect=0, raise_on_redirect=False)  # repeating is decided here
        settings.ssl_ca_cert = ca_cert or None
        settings.proxy = _proxy(self.host)
        settings.refresh_api_key_hook = self._sign_in
        if Path(self.token_file).is_file():
            settings.api_key["authorization"] = "read for each request"
            settings.api_key_prefix["authorization"] = "Bearer"
        return kfp_server_api.ApiClient(settings)

    def _sign_in(self, settings: Any) -> None:
        if "authorization" in settings.api_key:
            settings.api_key["authorization"] = _mounted(self.token_file)

    def about(self) -> Thing:
        """What the server says of itself: tag_name is its version, multi_user whether namespaces are kept apart."""

        def call(**given: Any) -> Any:  # the description knows multi_user alone, and its class would drop the rest
            answer = self.client.call_api(HEALTH, "GET", {}, [], {}, response_type="object", **given)[0]
            self._require_api()
            return answer

        answer = self._patiently(call, again=True)
        return answer if isinstance(answer, dict) else {}

    def pipeline(self, name: str) -> Thing | None:
        """The pipeline of this name in this namespace."""
        try:
            return self._ask(
                "PipelineServiceApi.pipeline_service_get_pipeline_by_name", name, namespace=self.namespace or None
            )
        except Absent:
            return None

    def create_pipeline(self, name: str, description: str) -> Thing:
        """A pipeline without versions. Raises Taken if its name is in use."""
        body = self.thing(
            "V2beta1Pipeline", name=name, display_name=name, description=description, namespace=self.namespace or None
        )
        return self._ask("PipelineServiceApi.pipeline_service_create_pipeline", body, again=False)

    def versions(self, pipeline_id: str, key: str, part: str) -> Iterator[Thing]:
        """Versions of a pipeline in whose field `key` a text is found."""
        where = {"operation": "IS_SUBSTRING", "key": key, "string_value": part}
        yield from self._pages(
            "PipelineServiceApi.pipeline_service_list_pipeline_versions",
            "pipeline_versions",
            pipeline_id,
            where=[where],
        )

    def upload_version(self, pipeline_id: str, file: Path, name: str, description: str) -> Thing:
        """A new version of a pipeline, from a compiled file. Raises Taken if its name is in use."""
        return self._ask(
            "PipelineUploadServiceApi.upload_pipeline_version", str(file), name=name, display_name=name,
            pipelineid=pipeline_id, description=description, again=False,
        )  # fmt: skip

    def experiment(self, name: str, make: bool = True) -> Thing | None:
        """The experiment of this name, made if it is not there and `make` says so."""
        where = [{"operation": "EQUALS", "key": "display_name", "string_value": name}]

        def find() -> Thing | None:
            listed = "ExperimentServiceApi.experiment_service_list_experiments"
            return next(self._pages(listed, "experiments", where=where, namespace=self.namespace or None), None)

        found = find()
        if found or not make:
            return found
        body = self.thing("V2beta1Experiment", display_name=name, namespace=self.namespace or None)
        create = "ExperimentServiceApi.experiment_service_create_experiment"
        return self.once(lambda: self._ask(create, body, again=False), find)

    def create_run(self, body: Thing) -> Thing:
        """Start a run, now."""
        return self._ask("RunServiceApi.run_service_create_run", self.thing("V2beta1Run", **body), again=False)

    def run(self, run_id: str) -> Thing:
        """A run, with its tasks. Raises Absent."""
        return self._ask("RunServiceApi.run_service_get_run", run_id)

    def runs(self, where: list[Thing], experiment_id: str = "", limit: int = 0) -> Iterator[Thing]:
        """Runs of this namespace, the latest first."""
        found = self._pages(
            "RunServiceApi.run_service_list_runs", "runs", where=where, namespace=self.namespace or None,
            experiment_id=experiment_id or None, sort_by="created_at desc", page_size=min(limit or PAGE, PAGE),
        )  # fmt: skip
        yield from itertools.islice(found, limit or None)

    def terminate(self, run_id: str) -> None:
        """Stop a run."""
        self._ask("RunServiceApi.run_service_terminate_run", run_id)

    def schedules(self) -> list[Thing]:
        """All recurring runs of this namespace."""
        listed = "RecurringRunServiceApi.recurring_run_service_list_recurring_runs"
        return list(self._pages(listed, "recurringRuns", namespace=self.namespace or None))

    def create_schedule(self, body: Thing) -> Thing:
        """A recurring run."""
        made = self.thing("V2beta1RecurringRun", **body)
        return self._ask("RecurringRunServiceApi.recurring_run_service_create_recurring_run", made, again=False)

    def enable_schedule(self, schedule_id: str) -> None:
        """Let it start runs."""
        self._ask("RecurringRunServiceApi.recurring_run_service_enable_recurring_run", schedule_id)

    def disable_schedule(self, schedule_id: str) -> None:
        """Let it start none."""
        self._ask("RecurringRunServiceApi.recurring_run_service_disable_recurring_run", schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """Remove it; one that is gone already is fine."""
        try:
            self._ask("RecurringRunServiceApi.recurring_run_service_delete_recurring_run", schedule_id)
        except Absent:
            return

    def log(self, run_id: str, pod: str) -> str:
        """What a step has written so far. Raises Absent where neither the pod nor an archive has it."""
        path = {"run_id": run_id, "node_id": pod}

        def call(**given: Any) -> Any:
            answer = self.client.call_api(
                LOGS, "GET", path, [], {}, auth_settings=["Bearer"], _preload_content=False, **given
            )
            return answer.data.decode("utf-8", errors="replace")

        try:
            return str(self._patiently(call, again=True, lasting=(500,)))
        except Away as error:
            if "answered 500" not in str(error):
                raise
            raise Absent(
                f"there is no log of {pod}: the pod is gone and the installation keeps no logs, or it has not started. "
                f"While it is there, `kubectl logs {pod} -c main` shows the same."
            ) from None

    def once(self, create: Callable[[], Thing], find: Callable[[], Thing | None]) -> Thing:
        """Do what must not be done twice: where an answer was lost or a name is taken, look before doing it again."""
        deadline, pause = time.monotonic() + self.patience_s, self.pause_s
        while True:
            try:
                return create()
            except Taken:
                found = find()
                if found:
                    return found
                raise
            except Away:
                found = find()
                if found:
                    return found
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 8.0)

    def thing(self, kind: str, **fields: Any) -> Any:
        """A model of the description, which checks names and kinds; fields may hold models of their own."""
        import kfp_server_api

        return getattr(kfp_server_api, kind)(**fields)

    def _pages(
        self, name: str, field: str, *args: Any, where: list[Thing] | None = None, **given: Any
    ) -> Iterator[Thing]:
        given = {"page_size": PAGE, **given}
        if where:
            given["filter"] = json.dumps({"predicates": where})
        token = None
        while True:
            answer = self._ask(name, *args, page_token=token, **given)
            yield from answer.get(field) or ()
            token = answer.get("next_page_token")
            if not token:
                return

    def _ask(self, name: str, /, *args: Any, again: bool = True, **given: Any) -> Thing:
        """Call one operation and return its answer as plain values."""
        import kfp_server_api

        service, _, operation = name.partition(".")
        method = getattr(getattr(kfp_server_api, service)(self.client), operation)
        given = {key: value for key, value in given.items() if value is not None}

        def call(**timing: Any) -> Any:
            answer = method(*args, **given, **timing)
            self._require_api()
            return answer

        answer = self.client.sanitize_for_serialization(self._patiently(call, again))
        return answer if isinstance(answer, dict) else {}

    def _require_api(self) -> None:
        """Raise StoreError for a page: the generated classes would make an empty list of it."""
        if "json" not in (self.client.last_response.getheader("content-type") or ""):
            raise StoreError(f"{self.host} answers with a page, not with the API of Kubeflow Pipelines. {SIGN_IN}")

    def _patiently(self, call: Callable[..., Any], again: bool, lasting: tuple[int, ...] = ()) -> Any:
        """The answer of a call, which is repeated while the server is away if that does no harm."""
        import kfp_server_api
        import urllib3

        deadline, pause, renewed = time.monotonic() + self.patience_s, self.pause_s, False
        while True:
            try:
                return call(_request_timeout=(min(10.0, self.timeout_s), self.timeout_s))
            except kfp_server_api.ApiException as error:
                if error.status == 401 and not renewed:
                    renewed = True  # the token is read anew for each request: it may have been renewed in between
                    continue
                failure = self._refusal(error)
                safe = again and error.status not in lasting
            except urllib3.exceptions.HTTPError as error:
                failure = self._silence(error)
                safe = again or _never_sent(error)
            if not isinstance(failure, Away) or not safe:
                raise failure from None
            if time.monotonic() + pause > deadline:
                raise failure from None
            time.sleep(pause)
            pause = min(2 * pause, 8.0)

    def _refusal(self, error: Any) -> SlimlineError:
        """What a status means, with what the server said."""
        said = _message(error.body) or str(error.reason)
        if error.status == 401 or 300 <= error.status < 400 or "authentication failed" in said:
            return StoreError(f"{self.host} does not know who asks ({error.status} {said}). {SIGN_IN}")
        if error.status == 403 or "denied" in said or "not authorized" in said:
            where = f" in namespace {self.namespace}" if self.namespace else ""
            return ConfigError(f"you may not do this{where}: {said}. Ask for the role, or give another --namespace.")
        if error.status == 404:
            return Absent(f"{said}. See `slimline runs`, or check --namespace.")
        if error.status == 409:
            return Taken(f"{said} (409).")
        if error.status == 429 or error.status >= 500:
            return Away(
                f"{self.host} answered {error.status} ({said}) and went on doing so. Look at the pod ml-pipeline; the "
                "same command goes on where it was."
            )
        return ConfigError(f"{self.host} refuses this: {said}.")

    def _silence(self, error: Exception) -> SlimlineError:
        """What it means that there was no answer."""
        import urllib3

        reason = getattr(error, "reason", None) or error
        if isinstance(reason, urllib3.exceptions.SSLError):
            return ConfigError(
                f"{self.host} shows a certificate that is not trusted ({_short(reason)}). Give its authority with "
                "--ca-cert."
            )
        return Away(
            f"{self.host} cannot be reached ({_short(reason)}). Check --host or {ENDPOINT}, and the port-forward or "
            "VPN; the same command goes on where it was."
        )


SIGN_IN = f"Sign in again, and give a fresh token with --token-file or {TOKEN_PATH}."


def _host(host: str) -> str:
    host = host or os.environ.get(ENDPOINT, "")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER
    if not host:
        raise ConfigError(
            f"no Kubeflow is named. Give its address with --host or {ENDPOINT}, such as http://localhost:8888 after "
            "`kubectl -n kubeflow port-forward svc/ml-pipeline 8888`."
        )
    return (host if "://" in host else f"https://{host}").rstrip("/")


def _proxy(host: str) -> str | None:
    """The proxy that the environment names for this address, which the generated client does not look for."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    place = urlsplit(host)
    if not place.hostname or proxy_bypass(place.hostname) or place.hostname in ("localhost", "127.0.0.1", "::1"):
        return None
    return getproxies().get(place.scheme)


def _mounted(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _never_sent(error: Exception) -> bool:
    import urllib3

    reason = getattr(error, "reason", None) or error
    return isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError)


def _message(body: str | None) -> str:
    """What the server said, of its JSON or its text, in one line."""
    try:
        answer = json.loads(body or "")
        text = answer.get("error_message") or answer.get("message") or answer.get("error") or ""
    except (ValueError, AttributeError):
        text = "" if "<html" in (body or "").lower() else body or ""
    return " ".join(str(text).split())[:300].rstrip(".")


def _short(reason: object) -> str:
    return str(reason).rpartition(": ")[2].strip("()' ")[:120] or type(reason).__name__
