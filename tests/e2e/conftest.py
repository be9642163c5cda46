"""One guest for all end-to-end tests, made from nothing with the README's command and destroyed afterwards."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from airflow_under_test import Airflow
from platform_under_test import ADDRESS, Platform

if TYPE_CHECKING:
    from collections.abc import Iterator

FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The platform after `make up`. CLICKSTREAM_E2E_KEEP=1 keeps its guest, to look around or to run tests again."""
    keep = os.environ.get("CLICKSTREAM_E2E_KEEP") == "1"
    under_test = Platform(scratch=tmp_path_factory.mktemp("e2e"))
    # What follows takes minutes: it is shown as it comes. What a test runs is shown when it fails.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if not keep:
            under_test.make("destroy")
        under_test.up_output = under_test.make("up").stdout
    # The clock starts no job here: what runs is what a test started.
    Airflow(ADDRESS).pause()
    yield under_test
    times = [f"{name:<30}{seconds:>7.1f} s" for name, seconds in under_test.phases.items()]
    request.config.stash[FIGURES] = [*under_test.figures, "Time of the verbs:", *times]
    if not keep:
        under_test.make("destroy")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def shop_is_open(platform: Platform) -> Iterator[None]:
    """A test that failed while the topic was quiet must not make those after it fail."""
    yield
    platform.resume()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test carries the state of every service, and the journals of the unhealthy ones."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    under_test = getattr(item, "funcargs", {}).get("platform")
    if report.when == "call" and report.failed and under_test is not None:
        report.sections.append(("services", under_test.make("status", check=False).stdout))
        report.sections.append(("journals", under_test.journals()))
        for service in ("ecom-streams", "kafka"):
            text = under_test.run(f"sudo nodectl logs {service} -n 60", check=False)
            report.sections.append((f"journal of {service}", text))
