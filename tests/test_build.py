"""What the build promises: clean per-level objects, threads that are really used, levels that cannot be forced too
high, and an import that survives a missing or foreign extension."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import polymoe
from polymoe import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "polymoe"
TORCH = Path(torch.__file__).parent
LEVELS = _C.isa_levels()


def run(*command: str, **kwargs: object) -> str:
    """The command's standard output; what it wrote is in the failure message."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, **env: str) -> str:
    return run(sys.executable, "-c", code, env={**os.environ, **env})


def objects(level: str) -> list[Path]:
    found = sorted(ROOT.glob(f"build/temp.*/release/{level}/*.o"))
    sources = sorted((ROOT / "csrc" / "micro").glob("*.cpp"))
    assert [path.stem for path in found] == [path.stem for path in sources], "run `make build` first"
    return found


# --- objects of the ISA levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_isa_objects_define_only_their_tables(level: str) -> None:
    # A weak symbol, such as an inline function of the standard library, could be chosen by the linker for the whole
    # library and then run on a machine without this level.
    for path in objects(level):
        for line in run("nm", "--defined-only", "--demangle", str(path)).splitlines():
            _, kind, name = line.split(maxsplit=2)
            is_own = name.startswith(f"polymoe::{level}::")
            assert (kind.islower() and kind not in "uvw") or (kind in "BDR" and is_own), f"{path.name}: {line}"


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Mnemonic and operands of every instruction of an object."""
    for line in run("objdump", "-d", "--no-show-raw-insn", str(path)).splitlines():
        match = re.match(r"\s*[0-9a-f]+:\s+([a-z][a-z0-9]*)\s*(.*)", line)
        if match:
            yield match[1], match[2].partition("#")[0]


def lowest_level(mnemonic: str, operands: str) -> str:
    """The lowest level that has this instruction."""
    if (mnemonic.startswith("t") and "tmm" in operands) or mnemonic in ("ldtilecfg", "tilerelease"):
        return "amx"
    if re.search("bf16", mnemonic) or re.match("vpdp(bus|wss)ds?$", mnemonic):
        return "avx512_bf16"
    if re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b", operands):
        return "avx512"
    return "avx2" if mnemonic.startswith("v") else "portable"


@pytest.mark.parametrize("level", LEVELS)
def test_isa_objects_hold_their_instructions_and_none_above(level: str) -> None:
    needed = set()
    for path in objects(level):
        for mnemonic, operands in instructions(path):
            lowest = lowest_level(mnemonic, operands)
            assert LEVELS.index(lowest) <= LEVELS.index(level), f"{path.name}: {mnemonic} {operands}"
            needed.add(lowest)
    assert level in needed


def test_ordinary_objects_are_portable() -> None:
    for path in ROOT.glob("build/temp.*/release/common/*.o"):
        above = {m for m, operands in instructions(path) if lowest_level(m, operands) != "portable"}
        assert above <= {"vzeroupper"} if path.stem == "isa" else not above, path.name


# --- forcing a level -------------------------------------------------------------------------------------------------


def test_supported_levels_can_be_forced() -> None:
    before = polymoe.isa_level()
    for level in _C.isa_supported():
        with polymoe.force_isa_level(level):
            assert polymoe.isa_level() == level
    assert polymoe.isa_level() == before


def test_unknown_level_is_refused() -> None:
    expected = r"^polymoe.set_isa_level: level: expected one of portable, avx2, avx512, avx512_bf16, amx, got 'sse'$"
    before = polymoe.isa_level()
    with pytest.raises(ValueError, match=expected):
        polymoe.set_isa_level("sse")
    assert polymoe.isa_level() == before


def test_level_above_the_machine_is_refused() -> None:
    code = """
import torch, polymoe
from polymoe import _C
for lost, best in [
    ("os_saves_tiles", "avx512_bf16"),
    ("avx512_bf16", "avx512"),
    ("os_saves_zmm", "avx2"),
    ("avx512vl", "avx2"),
    ("fma", "portable"),
]:
    if best not in _C.isa_supported():
        continue  # the machine itself is below
    _C.disable_cpu_flags([lost])
    assert _C.cpu_flags()[lost] is False
    assert polymoe.isa_level() == _C.isa_supported()[-1] == best, (lost, polymoe.isa_level())
    for level in _C.isa_levels():
        if level in _C.isa_supported():
            polymoe.set_isa_level(level)
            assert polymoe.isa_level() == level
            continue
        try:
            polymoe.set_isa_level(level)
        except ValueError as error:
            expected = f"polymoe.set_isa_level: level: expected at most {best} on this machine, got {level}, which "
            expected += "needs "
            assert str(error).startswith(expected), error
            assert str(error).removeprefix(expected).split(", ") == _C.isa_missing(level), error
        else:
            raise AssertionError(level + " was accepted")
        assert lost in _C.isa_missing(level)
        assert polymoe.isa_level() == best
"""
    python(code)


def test_disabling_an_unknown_flag_is_refused() -> None:
    before = _C.cpu_flags()
    with pytest.raises(ValueError, match=r"polymoe.disable_cpu_flags: flags: expected .*avx2.*, got 'avx3'"):
        _C.disable_cpu_flags(["fma", "avx3"])
    assert _C.cpu_flags() == before


def test_flags_agree_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    listed = set(re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)[1].split())
    listed |= {"sse3"} if "pni" in listed else set()  # Linux calls it by its first name
    for flag, present in _C.cpu_flags().items():
        if not flag.startswith("os_saves"):  # not a CPUID flag; Linux hides avx flags whose registers it does not save
            assert present == (flag in listed), flag


def test_levels_are_a_chain() -> None:
    assert _C.isa_flags("portable") == []
    for below, above in itertools.pairwise(LEVELS):
        assert set(_C.isa_flags(below)) < set(_C.isa_flags(above))


def test_cache_sizes_are_plausible() -> None:
    sizes = _C.cache_sizes()
    assert 4 << 10 <= sizes["l1d"] <= sizes["l2"] <= 1 << 30
    assert sizes["l3"] > 0


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("define", ["", "-DPOLYMOE_STD_THREADS"])
def test_parallel_region(tmp_path: Path, define: str) -> None:
    program = tmp_path / "threads"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fopenmp", *define.split(), f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(TORCH / "include"), str(ROOT / "tests/cpp/threads.cpp"), str(ROOT / "csrc/threads.cpp")]
    command += [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}", "-o", str(program)]
    run(*command)
    run(str(program))


# 64 tokens on 4 experts, wide enough that no kernel finds the work too small to share.
EXPERTS = """
import os, torch, polymoe
x, gate_up, down = (torch.randn(shape) for shape in ((64, 512), (4, 1024, 512), (4, 512, 512)))
weights, ids = torch.full((64, 2), 0.5), torch.arange(128).reshape(64, 2) % 4
def op():
    return polymoe.experts(x, gate_up, down, weights, ids, backend="cpu").numpy().tobytes()
"""


def test_ops_use_the_threads_of_torch() -> None:
    # Without -fopenmp at::parallel_for runs serially and says nothing.
    code = f"""{EXPERTS}
before = len(os.listdir("/proc/self/task"))
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    op()
    assert len(os.listdir("/proc/self/task")) - before == threads - 1, threads
"""
    python(code)


def test_forked_child_computes() -> None:
    code = f"""{EXPERTS}
import signal
from polymoe import _C
torch.set_num_threads(2)
expected = op()
assert _C.num_threads() == 2 and not _C.in_forked_child()
child = os.fork()
if child == 0:
    signal.alarm(30)  # rather than wait for ever for threads that are not there
    os._exit(0 if _C.in_forked_child() and _C.num_threads() == 1 and op() == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert op() == expected
"""
    python(code)


# --- package ---------------------------------------------------------------------------------------------------------


def test_kernels_is_no_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's `kernels`
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../../kernels"
    assert link.resolve() == ROOT / "kernels"


def package_copy(folder: Path) -> Path:
    """The package without its extension, for PYTHONPATH."""
    shutil.copytree(PACKAGE, folder / "polymoe", ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__"))
    return folder


FALLBACK = """
import sys, threading, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    caught.clear()
    import polymoe
    ids = torch.tensor([[1, 0], [1, -1]])
    for _ in range(2):
        offsets, row_slot, slot_row = polymoe.plan(ids, 2)
    import polymoe.nn
assert polymoe.__file__.startswith(sys.argv[1]), polymoe.__file__
assert "polymoe._C" not in sys.modules
assert offsets.tolist() == [0, 1, 3] and row_slot.tolist() == [1, 0, 2, -1], (offsets, row_slot)
assert slot_row.tolist() == [[1, 0], [2, -1]], slot_row
assert len(caught) == 1, [str(w.message) for w in caught]
print(caught[0].message)
"""


def test_import_without_extension_warns_once(tmp_path: Path) -> None:
    package = str(package_copy(tmp_path))
    message = run(sys.executable, "-c", FALLBACK, package, env={**os.environ, "PYTHONPATH": package})
    assert "extension" in message
    assert "not built" in message


def test_import_with_foreign_extension_says_so(tmp_path: Path) -> None:
    package = package_copy(tmp_path)
    for library in PACKAGE.glob("_C*.so"):
        shutil.copy(library, package / "polymoe")
    (package / "polymoe" / "_build_info.py").write_text('TORCH_VERSION = "2.7.1"\n')
    message = run(sys.executable, "-c", FALLBACK, str(package), env={**os.environ, "PYTHONPATH": str(package)})
    assert "built for torch 2.7" in message
    assert ".".join(torch.__version__.split(".")[:2]) in message


def test_build_records_its_torch() -> None:
    from polymoe import _build_info

    assert torch.__version__ == _build_info.TORCH_VERSION
    assert torch.__version__.startswith(_C.torch_version())
