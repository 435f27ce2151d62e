"""Whole pipelines on MLflow with sign-in, PostgreSQL and S3; the database lost and restored; MLflow's page."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slimline import artifact, serve, store
from tests.servers import ELSEWHERE, PASSWORD, USER, Tracking
from tests.test_launch import short

pytestmark = pytest.mark.slow
TEXTS = ["a superb and moving film", "dull and clumsy", ""]
NAMES = ("left", "right")


@contextlib.contextmanager
def two_at_once(folder: Path, postgres, s3_server, *words: str):
    """Two pipelines that ran at once, from two machines as it were, into one tracking server."""
    with (
        Tracking(folder / "server", postgres, s3_server, prefix="remote") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable in [v for v in os.environ if v.startswith(ELSEWHERE)]:
            patch.delenv(variable)
        for variable, value in {**server.env, "SLIMLINE_STORE": str(folder / "reader")}.items():
            patch.setenv(variable, value)
        values, started = short(folder), []
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        for name in NAMES:
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, "name": name}))
            command = [sys.executable, "-m", "slimline.cli", "run", "optimize", "-f", f"{name}.yaml", "--json", *words]
            environment = {**os.environ, "SLIMLINE_STORE": str(folder / f"home-{name}")}
            started.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        ended = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0, 0], [said[-2000:] for pair in ended for said in pair]
        yield {"folder": folder, "server": server, "postgres": postgres}


@pytest.fixture(scope="module")
def world(tmp_path_factory, postgres, s3_server):
    with two_at_once(tmp_path_factory.mktemp("remote"), postgres, s3_server) as made:
        yield made


def champion(name: str) -> artifact.Manifest:
    return artifact.read(store.fetch(f"models:/{name}@champion"))


def test_two_pipelines_at_once_each_end_with_the_champion_that_one_alone_would_make(world):
    left, right = map(champion, NAMES)
    assert left.digest == right.digest
    assert [stage.technique for stage in left.history][-1] == "quantize.int8_dynamic"
    for name in NAMES:
        assert store.version_of(f"models:/{name}@champion").tags["slimline.verdict"] == "PASS"


def test_nothing_is_left_half_done_and_every_object_in_the_bucket_belongs_to_something(world):
    client, server = store.client(), world["server"]
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs, models = client.search_runs(experiments), client.search_logged_models(experiments)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {str(model.status) for model in models} <= {"READY", "LoggedModelStatus.READY"}
    homes = [m.artifact_location for m in models] + [r.info.artifact_uri for r in runs]
    prefixes = tuple(f"{home.removeprefix(f's3://{server.bucket}/')}/" for home in homes)
    assert [key for key in server.s3.keys(server.bucket) if not key.startswith(prefixes)] == []


def test_a_second_run_is_made_of_what_is_there(world):
    folder = world["folder"]
    command = [sys.executable, "-m", "slimline.cli", "run", "optimize", "-f", "left.yaml", "--json"]
    before = len(store.versions("left"))
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "SLIMLINE_STORE": str(folder / "third")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(store.versions("left")) == before


@pytest.fixture(scope="module")
def browser(world):
    """A real browser, signed in to the tracking server."""
    from selenium import webdriver

    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("Chromium is not on this machine: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1600"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.get(world["server"].uri.replace("//", f"//{USER}:{PASSWORD}@"))
    yield driver
    driver.quit()


def text_of(browser, address: str, *wanted: str) -> str:
    """What a person reads at an address, once everything wanted is there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address)

    def shown(driver):
        said = driver.find_element(By.TAG_NAME, "body").text
        return said if all(word in said for word in wanted) else False

    try:
        return WebDriverWait(browser, 60, 0.3).until(shown)
    finally:
        if folder := os.environ.get("SLIMLINE_SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / f"mlflow-{len(list(Path(folder).iterdir()))}.png"))


def test_mlflows_page_shows_the_champion_with_its_card_its_tags_and_the_report(world, browser):
    server, version = world["server"], store.version_of("models:/left@champion")
    title, sentence = f"left, version {version.version}", version.description.split("**")[1]
    page = f"{server.uri}/#/models/left/versions/{version.version}"
    said = text_of(
        browser, page, title, sentence[:30], "Lost and won", "quantize.int8_dynamic", "slimline.verdict", "PASS"
    )
    assert "champion" in said
    run_id = version.tags["slimline.pipeline_run"]
    experiment = store.client().get_run(run_id).info.experiment_id
    text_of(browser, f"{server.uri}/#/experiments/{experiment}/runs/{run_id}/artifacts", "report.html", "recipe.yaml")
    address = f"{server.uri}/get-artifact?path=report.html&run_uuid={run_id}"
    browser.get(f"{server.uri}/")
    fetched = browser.execute_async_script(
        "const done = arguments[arguments.length - 1]; fetch(arguments[0])"
        ".then(a => a.text()).then(done, e => done(String(e)))",
        address,
    )
    assert sentence.split(": ", 1)[1][:30] in fetched and "<html" in fetched[:500].lower()


def test_a_champion_outlives_its_database(world, postgres, tmp_path):
    server = world["server"]
    before, digest = serve.load(store.fetch("models:/left@champion")).predict(TEXTS), champion("left").digest
    databases = (server.runs, server.users)
    for database in databases:
        postgres.dump(database, tmp_path / database)
    server.stop()
    for database in databases:
        postgres.drop(database)
        postgres.create(database)
        assert postgres.query(database, "select count(*) from pg_tables where schemaname = 'public'") == [["0"]]
        postgres.restore(database, tmp_path / database)
    server.start()
    server.wait()
    shutil.rmtree(store.home() / "fetched")
    assert champion("left").digest == digest
    after = serve.load(store.fetch("models:/left@champion")).predict(TEXTS)
    assert json.dumps(after) == json.dumps(before)
    assert champion("right").digest == digest
