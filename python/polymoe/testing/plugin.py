"""The pytest plugin of the conformance kit: options, targets and seeds.

Fixtures: `target`, parametrised over backends and ISA levels, at whose level the test runs; `seed`, new in every run
and different for every test; `run_seed`, one for all tests.
Marker: `declares(*properties)`, for a test that only concerns backends with these properties.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Generator, Iterator

import pytest

from polymoe.testing.targets import Target, targets

DEFAULT_BACKENDS = ("reference", "cpu")
_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polymoe")
    group.addoption(
        "--polymoe-backend",
        action="append",
        metavar="NAME",
        help=f"backend to test; may be given several times (default: {', '.join(DEFAULT_BACKENDS)})",
    )
    group.addoption("--polymoe-seed", type=int, metavar="N", help="repeat the random inputs of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--polymoe-seed")
    config.addinivalue_line("markers", "declares(*properties): run on the backends that promise these properties")
    config.stash[_SEED] = secrets.randbelow(2**31) if given is None else given


def pytest_report_header(config: pytest.Config) -> str:
    return f"polymoe: random inputs from --polymoe-seed {config.stash[_SEED]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    properties = {name for marker in metafunc.definition.iter_markers("declares") for name in marker.args}
    parameters = []
    for target in targets(metafunc.config.getoption("--polymoe-backend") or DEFAULT_BACKENDS):
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
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and {"seed", "run_seed"} & set(getattr(item, "fixturenames", ())):
        report.sections.append(("polymoe", f"same random inputs: --polymoe-seed {item.config.stash[_SEED]}"))
    return report
