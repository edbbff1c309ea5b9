"""Backends from other packages, as their authors meet polymoe: tests/toy_backend, and the package that docs/backends.md
makes from nothing, both installed by pip; and faulty ones, which the conformance kit must find."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import polymoe
from polymoe.hal.problem import OPS
from polymoe.hal.registry import register_backend, unregister_backend

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy_backend"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "backends.md").read_text(), re.MULTILINE | re.DOTALL)
LANGUAGES, (PYPROJECT, MODULE, COMMANDS, USE) = zip(*BLOCKS, strict=True)
INSTALL, INFO, KIT = COMMANDS.splitlines()

FAULTY = """
from unittest.mock import patch

import numpy as np
import torch
from polymoe_toy import ToyBackend, kernels


class Faulty(ToyBackend):
    def __init__(self, name, op=None, kernel=None):
        self.name, self.op, self.kernel = name, op, kernel

    def supports(self, op, problem):
        return super().supports(op, problem) if op == self.op else "not now"

    def implementation(self, op):
        return self.kernel


def backwards(ids, num_experts):
    offsets, row_slot, slot_row = kernels.plan(ids.flip(0, 1), num_experts)
    return offsets, torch.where(row_slot < 0, -1, ids.numel() - 1 - row_slot), slot_row.flip(0, 1)


def by_blas(*args):
    with patch.object(kernels, "_matmul", np.matmul):
        return kernels.grouped_mm(*args)


unstable = Faulty("unstable", "plan", backwards)
unskipping = Faulty("unskipping", "plan", lambda ids, E: kernels.plan(ids.clamp(0, E - 1), E))
varying = Faulty("varying", "grouped_mm", by_blas)
without_defaults = Faulty("without_defaults", "combine", lambda y, slot_row, weights, out_dtype: y)
overclaiming = Faulty("overclaiming", "dispatch", kernels.dispatch)
overclaiming.supports = lambda op, problem: None if op == "dispatch" else "not now"
agreeing, silent = Faulty("agreeing"), Faulty("silent")
agreeing.supports = lambda op, problem: True
"""
# Where the kit finds each. The promises of `varying` are those of the toy, which NumPy's own matmul does not keep.
FOUND = {
    "unstable": {"test_plan"},
    "unskipping": {"test_plan"},
    "varying": {"test_grouped_mm_bitwise"},
    "without_defaults": {"test_protocol"},
    "overclaiming": {"test_dispatch"},
    "agreeing": {"test_protocol"},
    "silent": {"test_protocol"},
}


def run(command: list[str], site: Path, returncode: int = 0) -> str:
    path = os.pathsep.join(map(str, (site, TOY, Path(polymoe.__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=site, env=environment, check=False
    )
    assert done.returncode == returncode, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the toy and the package of docs/backends.md."""
    work = tmp_path_factory.mktemp("third")
    mine, toy, site = work / "mine", work / "toy", work / "site"
    mine.mkdir()
    (mine / "pyproject.toml").write_text(PYPROJECT)
    (mine / "polymoe_mine.py").write_text(MODULE)
    shutil.copytree(TOY, toy)  # builds leave files behind
    site.mkdir()
    assert INSTALL.startswith("pip install --no-build-isolation --no-deps ")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    run(["-m", "pip", "install", *options, "--target", str(site), str(mine), str(toy)], site)
    return site


def register(site: Path, package: str, names: dict[str, str]) -> None:
    """What pip leaves behind of a package with these entry points."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {package}:{attribute}" for name, attribute in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[polymoe.backends]", *lines]))


def kit(site: Path, *arguments: str, returncode: int = 0) -> tuple[dict[str, dict[str, set[str]]], str]:
    """Outcomes of the conformance kit: backend -> outcome -> test functions; and what it printed."""
    command = KIT.removesuffix(" --polymoe-backend mine").split()
    out = run(["-m", *command, *arguments, "-v", "-p", "no:cacheprovider"], site, returncode)
    outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for function, backend, outcome in re.findall(r"::(test_\w+)\[(\w+)(?:-.*)?\] (PASSED|FAILED|SKIPPED)", out):
        outcomes[backend][outcome].add(function)
    return outcomes, out


def test_the_page_has_its_blocks() -> None:
    assert LANGUAGES == ("toml", "python", "sh", "python")
    assert INFO == "python -m polymoe info"
    assert KIT == "pytest -p polymoe.testing.plugin --pyargs polymoe.testing --polymoe-backend mine"


def test_the_kit_accepts_the_toy_and_the_one_of_the_page(site: Path) -> None:
    outcomes, out = kit(site, "--polymoe-backend", "toy", "--polymoe-backend", "mine")
    every = outcomes["toy"]["PASSED"]
    assert outcomes["toy"]["SKIPPED"] <= every, "no test declines all its cases"
    assert {
        f"test_{op}" for op in ("gate", "plan", "dispatch", "grouped_mm", "activate", "combine", "experts")
    } <= every
    assert {"test_experts_batch", "test_experts_threads", "test_grouped_mm_bitwise"} <= every
    assert outcomes["mine"]["PASSED"] == {"test_protocol", "test_combine", "test_combine_bitwise"}
    assert re.search(r"^toy: \d+ passed, 0 failed, \d+ declined$", out, re.MULTILINE)
    assert re.search(r"^ +\d+ declined: it has no kernel for scoring sqrtsoftplus$", out, re.MULTILINE)
    assert re.search(r"^ +\d+ declined: it has no grouped_mm yet$", out, re.MULTILINE)


def test_the_kit_runs_on_a_device_unknown_to_torch(tmp_path: Path) -> None:
    """Such as torch's PrivateUse1, the type of NPUs. Ops reach the backend by polymoe's own dispatch."""
    shutil.copy(ROOT / "tests" / "foreign_backend" / "polymoe_foreign.py", tmp_path)
    register(tmp_path, "polymoe_foreign", {"foreign": "ForeignBackend"})
    options = ["--polymoe-backend", "foreign", "--polymoe-device", "foreign"]
    outcomes, _ = kit(tmp_path, *options, "-k", "not bitwise and not threads and not experts_batch and not composition")
    ops = ("gate", "plan", "dispatch", "grouped_mm", "activate", "combine", "experts")
    assert outcomes["foreign"]["PASSED"] >= {f"test_{op}" for op in ops} | {"test_protocol"}


def test_the_kit_finds_faulty_backends(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    register(tmp_path, "faulty", {name: name for name in FOUND})
    named = [argument for name in FOUND for argument in ("--polymoe-backend", name)]
    selected = "protocol or test_plan or test_dispatch or grouped_mm_bitwise"
    outcomes, _ = kit(tmp_path, *named, "-k", selected, "--tb", "no", returncode=1)
    assert {name: outcomes[name]["FAILED"] for name in FOUND} == FOUND


LISTED = """
from polymoe.__main__ import info

print(info())
"""


def test_the_page_and_the_list(site: Path) -> None:
    """The last block of the page, and `python -m polymoe info`, where the package is installed."""
    out = run(["-W", "error", "-c", f"import torch\n{USE}\n{LISTED}"], site)
    assert "backend: mine (explicit argument); deterministic, batch-invariant" in out
    assert "its kernels take float32, not torch.bfloat16" in out
    listed = out.splitlines()
    toy = listed[listed.index("  toy (deterministic, batch-invariant)") + 1]
    assert toy.startswith("    cpu: serves ")
    assert set(toy.removeprefix("    cpu: serves ").split(", ")) == set(OPS)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(TOY)
    from polymoe_toy import ToyBackend

    register_backend(ToyBackend())
    yield
    unregister_backend("toy")


def test_declines_give_their_reasons(toy: None) -> None:
    h = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"^polymoe\.activate: .* got 'toy': it has no kernel for kind geglu$"):
        polymoe.activate(h, "geglu", backend="toy")
    with (
        polymoe.use_backend("toy"),
        pytest.raises(ValueError, match=r"'toy': its kernels compute in float32, not in torch\.float64$"),
    ):
        polymoe.activate(h.double(), "swiglu")
    declined = polymoe.explain("activate", h, "gelu").not_chosen["toy"]
    assert declined == "it has no kernel for kind gelu"
    assert polymoe.explain("activate", h, "swiglu", backend="toy").backend == "toy"


def test_a_whole_layer_also_compiled(toy: None, seed: int) -> None:
    """The toy serves experts under torch.compile, with any number of tokens, and its bits are the eager ones."""
    generator = torch.Generator().manual_seed(seed)
    E, K, H, I = 5, 2, 12, 7
    gate_up, down = torch.randn(E, 2 * I, H, generator=generator), torch.randn(E, H, I, generator=generator)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = polymoe.gate(logits, K, renormalize=True)
        return polymoe.experts(x, gate_up, down, weights, ids)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (9, 3, 0):
        x, logits = torch.randn(T, H, generator=generator), torch.randn(T, E, generator=generator)
        with polymoe.use_backend("toy"):
            assert torch.equal(compiled(x, logits), layer(x, logits))
