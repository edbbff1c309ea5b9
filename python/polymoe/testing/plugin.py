"""The pytest plugin of the conformance kit: options, targets, seeds, and a summary of what a backend declined.

Fixtures: `target`, parametrised over backends and ISA levels, at whose level the test runs; `seed`, new in every run
and different for every test; `run_seed`, one for all tests.
Marker: `declares(*properties)`, for a test that only concerns backends with these properties.
"""

from __future__ import annotations

import secrets
import zlib
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

from polymoe.testing.targets import Target, targets

DEFAULT_BACKENDS = ("reference", "cpu")
_SEED = pytest.StashKey[int]()
_OUTCOMES = pytest.StashKey[dict[str, Counter[str]]]()  # by target: how often passed, failed, or why skipped


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polymoe")
    group.addoption(
        "--polymoe-backend",
        action="append",
        metavar="NAME",
        help=f"backend to test; may be given several times (default: {', '.join(DEFAULT_BACKENDS)})",
    )
    group.addoption(
        "--polymoe-device",
        metavar="TYPE",
        help="torch device type of the inputs (default: cpu if the backend serves it, else the first that it serves)",
    )
    group.addoption("--polymoe-seed", type=int, metavar="N", help="repeat the random inputs of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--polymoe-seed")
    config.addinivalue_line("markers", "declares(*properties): run on the backends that promise these properties")
    config.stash[_SEED] = secrets.randbelow(2**31) if given is None else given
    config.stash[_OUTCOMES] = {}


def _targets(config: pytest.Config) -> list[Target]:
    return targets(config.getoption("--polymoe-backend") or DEFAULT_BACKENDS, config.getoption("--polymoe-device"))


def pytest_collection(session: pytest.Session) -> None:
    """A backend that does not exist or does not load is an error, not a run without tests."""
    try:
        for target in _targets(session.config):
            assert target.properties
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str:
    return f"polymoe: random inputs from --polymoe-seed {config.stash[_SEED]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    properties = {name for marker in metafunc.definition.iter_markers("declares") for name in marker.args}
    parameters = []
    for target in _targets(metafunc.config):
        if not all(getattr(target.properties, name) for name in properties):
            continue
        reason = target.unavailable
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param(target, marks=marks, id=str(target)))
    metafunc.parametrize("target", parameters, indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    chosen: Target = request.param
    with chosen.active():
        yield chosen


@pytest.fixture(scope="session")
def run_seed(request: pytest.FixtureRequest) -> int:
    """The same for all tests of a run."""
    return request.config.stash[_SEED]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Different for every test of a run, and the same whichever other tests run."""
    return request.config.stash[_SEED] ^ zlib.crc32(request.node.nodeid.encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and {"seed", "run_seed"} & set(getattr(item, "fixturenames", ())):
        report.sections.append(("polymoe", f"same random inputs: --polymoe-seed {item.config.stash[_SEED]}"))
    _count(item, call, report)
    return report


def _count(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    callspec = getattr(item, "callspec", None)
    target = None if callspec is None else callspec.params.get("target")
    if isinstance(target, Target) and (call.when == "call" or not report.passed):
        outcome = str(call.excinfo.value) if report.skipped and call.excinfo else report.outcome
        counts = item.config.stash[_OUTCOMES].setdefault(str(target), Counter())
        counts[outcome.removeprefix(f"{target}: ")] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the backends that were asked for passed, and why they declined the rest."""
    if not config.getoption("--polymoe-backend"):
        return
    terminalreporter.section("polymoe")
    for target, outcomes in config.stash[_OUTCOMES].items():
        counts = {outcome: outcomes.pop(outcome, 0) for outcome in ("passed", "failed")}
        terminalreporter.line(
            f"{target}: {counts['passed']} passed, {counts['failed']} failed, {outcomes.total()} declined"
        )
        for reason, count in outcomes.most_common():
            terminalreporter.line(f"  {count:4} declined: {reason}")
