"""Backends: who is chosen, why others are not, what may be registered, and what it costs to choose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymoe
from polymoe import reference
from polymoe.backends import triton
from polymoe.formats import Int8, Mxfp8
from polymoe.hal.problem import OPS, Backend, Problem
from polymoe.hal.registry import all_backends, register_backend, unregister_backend
from polymoe.hal.select import select, serving

EXPERTS_ON_CPU = OPS["experts"].problem("cpu", torch.float32)


class ToyBackend:
    """Serves float32 combine only, and adds `mark`, so that its results show who computed them."""

    device_types: tuple[str, ...] = ("cpu",)
    deterministic = False
    batch_invariant = False

    def __init__(self, name: str = "toy", mark: float = 100.0) -> None:
        self.name = name
        self.mark = mark

    def supports(self, op: str, problem: Problem) -> str | None:
        if op != "combine":
            return f"it has no {op}"
        return None if problem.dtype == torch.float32 else f"it has no {problem.dtype} kernels"

    def implementation(self, op: str) -> Callable[..., Any]:
        def combine(*args: Any) -> Tensor:
            return reference.combine(*args) + self.mark

        return combine


@pytest.fixture
def toy() -> Iterator[ToyBackend]:
    backend = ToyBackend()
    register_backend(backend)
    yield backend
    unregister_backend(backend.name)


PLAN = polymoe.plan(torch.tensor([[0, 1], [1, 0]]), 2)
Y = torch.ones(4, 3)


def combine(y: Tensor = Y, **kwargs: Any) -> float:
    """2 from every backend, 102 from the toy."""
    return polymoe.combine(y, PLAN, **kwargs)[0, 0].item()


def test_built_in_backends_are_backends() -> None:
    assert polymoe.backends()[:2] == ["cpu", "triton"]
    assert polymoe.backends()[-1] == "reference"
    assert all(isinstance(backend, Backend) for backend in all_backends())


def test_precedence(toy: ToyBackend) -> None:
    assert combine() == 2
    with polymoe.use_backend("toy"):
        assert combine() == 102
        assert combine(backend="reference") == 2
        with polymoe.use_backend("reference"):
            assert combine() == 2
        assert combine() == 102
        with polymoe.use_backend(None):
            assert combine() == 2
    assert combine() == 2
    assert combine(backend="toy") == 102


def test_scope_ends_with_an_exception(toy: ToyBackend) -> None:
    with pytest.raises(RuntimeError, match="in between"), polymoe.use_backend("toy"):
        raise RuntimeError("in between")
    assert combine() == 2


def test_scope_is_reentrant(toy: ToyBackend) -> None:
    scope = polymoe.use_backend("toy")
    with scope:
        with scope:
            assert combine() == 102
        assert combine() == 102
    assert combine() == 2


def test_scope_is_of_its_thread(toy: ToyBackend) -> None:
    results: list[float] = []
    with polymoe.use_backend("toy"):
        thread = threading.Thread(target=lambda: results.append(combine()))
        thread.start()
        thread.join()
    assert results == [2]


def test_the_best_comes_first(toy: ToyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in backends of a device, then those from outside, then the reference."""
    names = serving(OPS["combine"].problem("cpu", torch.float32))
    assert names[-2:] == ["toy", "reference"]
    assert names[:-2] in ([], ["cpu"])
    for installed in (True, False):  # whether or not Triton is
        monkeypatch.setattr(triton, "find_spec", lambda name, installed=installed: installed or None)
        names = ["triton", "reference"] if installed else ["reference"]
        assert serving(OPS["combine"].problem("xpu", torch.float32)) == names


def test_an_unsupported_request_says_why(toy: ToyBackend) -> None:
    with pytest.raises(ValueError, match=r"^polymoe.combine: backend: expected .+, got 'toy': it has no torch.float64"):
        combine(Y.double(), backend="toy")
    with polymoe.use_backend("toy"), pytest.raises(ValueError, match=r"^polymoe.plan: backend: .*: it has no plan"):
        polymoe.plan(torch.zeros(1, 1, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match=r"^polymoe.combine: backend: expected one of .*cpu.*, got 'gpu'"):
        combine(backend="gpu")
    with pytest.raises(ValueError, match="got ''"):
        combine(backend="")


def test_the_op_itself_takes_the_device_default_or_a_name(toy: ToyBackend) -> None:
    op = torch.ops.polymoe.combine
    with polymoe.use_backend("toy"):
        assert op(Y, PLAN.slot_row)[0, 0] == 2
    assert op(Y, PLAN.slot_row, backend="toy")[0, 0] == 102
    with pytest.raises(ValueError, match="got 'nobody'"):
        op(Y, PLAN.slot_row, backend="nobody")


@pytest.fixture
def register() -> Iterator[Callable[[ToyBackend], None]]:
    names: list[str] = []

    def add(backend: ToyBackend) -> None:
        register_backend(backend)
        names.append(backend.name)

    yield add
    for name in names:
        unregister_backend(name)


def test_a_backend_of_another_device(register: Callable[[ToyBackend], None]) -> None:
    foreign = ToyBackend("foreign")
    foreign.device_types = ("npu", "xla")
    register(foreign)
    assert serving(OPS["combine"].problem("npu", torch.float32)) == ["foreign", "reference"]
    with pytest.raises(ValueError, match=r"'foreign': it serves npu, xla tensors, not cpu"):
        combine(backend="foreign")


@pytest.mark.parametrize(
    ("supports", "reason"),
    [
        (lambda op, problem: 1 / 0, r"its supports\(\) failed: ZeroDivisionError: division by zero"),
        (lambda op, problem: True, r"its supports\(\) returned True, neither None nor a reason"),
        (lambda op, problem: "", r"its supports\(\) returned '', neither None nor a reason"),
    ],
    ids=["raises", "True", "empty"],
)
def test_an_answer_that_is_none_declines(
    supports: Callable[[str, Problem], Any], reason: str, register: Callable[[ToyBackend], None]
) -> None:
    """A stranger's fault breaks nobody else's calls, and shows where it is asked for."""
    faulty = ToyBackend("faulty")
    faulty.supports = supports  # type: ignore[method-assign]
    register(faulty)
    assert combine() == 2
    with pytest.raises(ValueError, match=rf"got 'faulty': {reason}"):
        combine(backend="faulty")
    assert re.fullmatch(reason, polymoe.explain("combine", Y).not_chosen["faulty"])


def test_a_backend_may_quantise(toy: ToyBackend) -> None:
    """Where it does not, or is not asked for, polymoe.formats does."""

    def quantize(weight: Tensor, weight_format: str, scale_dtype: torch.dtype, zero_points: bool) -> tuple[Any, ...]:
        assert (weight_format, scale_dtype, zero_points) == ("int8", torch.float32, False)
        return torch.full(weight.shape, 100, dtype=torch.int8), torch.ones(weight.shape[:-1]), None

    def supports(op: str, problem: Problem) -> str | None:
        return None if op == "quantize" and problem.option["weight_format"] == "int8" else f"it has no {op}"

    toy.supports, toy.implementation = supports, lambda op: quantize  # type: ignore[method-assign]
    with polymoe.use_backend("toy"):
        assert (Int8().quantize(Y).data == 100).all()
        assert Mxfp8().quantize(Y).data.float().unique() == 256  # 1 by the scale 2^-8
    assert (Int8().quantize(Y).data == 127).all()


def test_decisions_follow_registration() -> None:
    with pytest.raises(ValueError, match="got 'late'"):
        combine(backend="late")
    register_backend(ToyBackend("late", mark=1000))
    try:
        assert combine(backend="late") == 1002
    finally:
        unregister_backend("late")
    with pytest.raises(ValueError, match="got 'late'"):
        combine(backend="late")


def test_registration_refuses_what_is_no_backend(toy: ToyBackend) -> None:
    for wrong in (ToyBackend, object(), "toy"):
        with pytest.raises(ValueError, match=r"expected a polymoe\.hal Backend"):
            register_backend(wrong)  # type: ignore[arg-type]
    wrong_types, nameless = ToyBackend("late"), ToyBackend("")
    wrong_types.device_types = "npu"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"backend\.device_types: expected a tuple of names, got 'npu'"):
        register_backend(wrong_types)
    with pytest.raises(ValueError, match=r"backend\.name: expected a name, got ''"):
        register_backend(nameless)
    for taken in ("toy", "cpu", "reference"):
        with pytest.raises(ValueError, match=f"expected a new name, got '{taken}'"):
            register_backend(ToyBackend(taken))
    with pytest.raises(ValueError, match="got 'cpu'"):
        unregister_backend("cpu")


def test_use_backend_under_compile(toy: ToyBackend) -> None:
    def inside(y: Tensor) -> Tensor:
        with polymoe.use_backend("toy"):
            marked = polymoe.combine(y, PLAN)
        return marked + polymoe.combine(y, PLAN)

    def outside(y: Tensor) -> Tensor:
        return polymoe.combine(y, PLAN)

    torch._dynamo.reset()
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert compiled(Y)[0, 0] == 104
    compiled = torch.compile(outside, fullgraph=True, backend="aot_eager")
    assert compiled(Y)[0, 0] == 2
    with polymoe.use_backend("toy"):
        assert compiled(Y)[0, 0] == 102
    assert compiled(Y)[0, 0] == 2
    results: list[Tensor] = []

    def in_a_new_thread() -> None:
        results.append(compiled(Y))
        with polymoe.use_backend("toy"):
            results.append(compiled(Y))

    thread = threading.Thread(target=in_a_new_thread)
    thread.start()
    thread.join()
    assert [result[0, 0].item() for result in results] == [2, 102]


def test_selection_takes_less_than_5_us() -> None:
    x = torch.ones(1, 8)
    calls = 2000
    seconds = min(timeit.repeat(lambda: select("experts", x, ("swiglu", "output"), None), number=calls, repeat=20))
    assert seconds / calls < 5e-6


def test_decisions_are_made_once(toy: ToyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    supports = toy.supports
    monkeypatch.setattr(toy, "supports", lambda op, problem: (asked.append(op), supports(op, problem))[1])
    for _ in range(10):
        combine(backend="toy")
    assert asked == ["combine"]


def run_python(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    package = Path(polymoe.__file__).parents[1]
    path = os.pathsep.join(str(p) for p in (*paths, package))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


ENVIRONMENT = """
import os, torch, polymoe
os.environ["POLYMOE_BACKEND"] = "toy"  # too late: it was read at import
x = torch.ones(1, 2)
print(polymoe.explain("gate", x, 1).backend, "|", polymoe.explain("gate", x, 1).chosen_by)
print(polymoe.explain("gate", x, 1, backend="reference").chosen_by)
with polymoe.use_backend("reference"):
    print(polymoe.explain("gate", x, 1).chosen_by)
"""


def test_environment_variable() -> None:
    done = run_python(ENVIRONMENT, POLYMOE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "reference | environment variable POLYMOE_BACKEND",
        "explicit argument",
        "use_backend",
    ]


def test_environment_ranks_below_the_scope(toy: ToyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymoe.hal.select._environment", "toy")
    assert combine() == 102
    with polymoe.use_backend("reference"):
        assert combine() == 2
    monkeypatch.setattr("polymoe.hal.select._environment", "nonsense")
    with pytest.raises(ValueError, match=r"^polymoe\.combine: backend: expected one of .*, got 'nonsense'"):
        combine()


ENTRY_POINTS = """
import warnings, torch
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import polymoe
import sys
assert "stranger" not in sys.modules  # entry points wait until somebody asks
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(polymoe.backends())
    polymoe.backends()
print([str(w.message) for w in caught])
plan = polymoe.plan(torch.zeros(2, 1, dtype=torch.int32), 1)
print(polymoe.combine(torch.ones(2, 3), plan, backend="stranger").tolist())
try:
    polymoe.combine(torch.ones(2, 3), plan, backend="broken")
except ValueError as error:
    print(error)
"""


def test_backends_from_entry_points(tmp_path: Path) -> None:
    info = tmp_path / "strange_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-backends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polymoe.backends]\nstranger = stranger:Stranger\nbroken = broken:B\n")
    (tmp_path / "broken.py").write_text("raise OSError('no driver')\n")
    (tmp_path / "stranger.py").write_text(
        "class Stranger:\n"
        "    name, device_types, deterministic, batch_invariant = 'stranger', ('cpu',), True, True\n"
        "    def supports(self, op, problem):\n"
        "        return None if op == 'combine' else 'no'\n"
        "    def implementation(self, op):\n"
        "        return lambda y, slot_row, weights=None, out_dtype=None: y * 7\n"
    )
    done = run_python(ENTRY_POINTS, tmp_path)
    assert done.returncode == 0, done.stderr
    names, warned, result, refused = done.stdout.splitlines()
    assert names == "['cpu', 'triton', 'stranger', 'broken', 'reference']"
    reason = "its entry point failed to load: OSError: no driver"
    assert warned == f"['polymoe: backend broken: {reason}']"
    assert result == str([[7.0] * 3] * 2)
    assert refused.endswith(f"got 'broken': {reason}")


WITHOUT_EXTENSION = """
import sys, types, warnings, torch
{block}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import polymoe
    import polymoe.hal.device
    p = polymoe.plan(torch.zeros(2, 1, dtype=torch.int32), 1)
    print(polymoe.combine(torch.ones(2, 3), p).tolist())
print([str(w.message) for w in caught if "polymoe" in str(w.message)])
try:
    polymoe.isa_level()
except RuntimeError as error:
    print(error)
try:
    polymoe.combine(torch.ones(2, 3), p, backend="cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sys.modules['polymoe._C'] = None", "its C++ extension polymoe._C is not built"),
        (
            "info = sys.modules['polymoe._build_info'] = types.ModuleType('info'); info.TORCH_VERSION = '1.2.3+cpu'",
            "its C++ extension was built for torch 1.2 and this is torch "
            + ".".join(torch.__version__.split(".")[:2])
            + "; build polymoe again for this torch",
        ),
    ],
    ids=["not built", "another torch"],
)
def test_without_the_extension_the_reference_serves(block: str, reason: str) -> None:
    done = run_python(WITHOUT_EXTENSION.format(block=block))
    assert done.returncode == 0, done.stderr
    result, warned, isa, refused = done.stdout.splitlines()
    assert result == str([[1.0] * 3] * 2)
    expected = f"polymoe: the cpu backend is unavailable: {reason}. The reference, which is slow, serves instead."
    assert warned == f"['{expected}']"
    assert isa == f"polymoe.isa_level: not available: {reason}"
    assert refused.endswith(f"got 'cpu': {reason}")
