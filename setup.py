"""Builds the extension polymoe._C; all metadata is in pyproject.toml.

One shared library from two groups of sources: csrc/*.cpp compiled once, and csrc/micro/*.cpp compiled once per
instruction-set level with that level's flags. setuptools knows only one set of flags per extension, so the compile
loop is here. It recompiles what changed, headers included, and keeps objects under build/.

    python setup.py build_ext --inplace                 # development; --verbose prints every command
    python setup.py build_ext --sanitize=address|thread  # instrumented, objects in a folder of their own
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.py"

# Each level may use exactly the CPUID flags that csrc/isa.cpp lists for it.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprfchw"],
}
# GCC reports its own _mm512_undefined_ps() and the like as used uninitialised; the portable level keeps the warning.
VECTOR_WARNINGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Results must not depend on what the compiler chose to contract or reassociate.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
COMMON_FLAGS += ["-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-DTORCH_EXTENSION_NAME=_C"]
# libgomp is not instrumented for ThreadSanitizer, so that variant brings threads of its own.
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"],
    "thread": ["-fsanitize=thread", "-O1", "-g1", "-DPOLYMOE_STD_THREADS"],
}


def isa_levels() -> list[str]:
    return list(ISA_FLAGS) if IS_X86 else ["portable"]


def torch_dir() -> Path:
    """Torch's package folder, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CompileError(
            "polymoe builds against an installed torch: install torch first, then use --no-build-isolation"
        )
    return Path(spec.origin).parent


def check_compiler(cxx: list[str]) -> str:
    """The compiler's version; an error unless it is g++ 11 or later (torch's pool is GNU OpenMP)."""
    try:
        macros = subprocess.run(
            [*cxx, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"polymoe needs g++ 11 or later to build; {shlex.join(cxx)!r} does not run: {error}"
        ) from None
    defined = dict(line.split(" ", 2)[1:] for line in macros.stdout.splitlines() if line.count(" ") >= 2)
    if "__clang__" in defined or int(defined.get("__GNUC__", "0")) < 11:
        version = defined.get("__VERSION__", "unknown")
        raise CompileError(f"polymoe needs g++ 11 or later to build; {shlex.join(cxx)!r} is version {version}")
    return defined["__VERSION__"]


@dataclass
class CompileJob:
    """One source to one object; its depfile and the command that made it lie beside the object."""

    source: Path
    object: Path
    command: list[str]
    identity: str  # the command and all it depends on besides files

    def is_current(self) -> bool:
        depfile, command_file = self.object.with_suffix(".d"), self.object.with_suffix(".cmd")
        if not (self.object.exists() and depfile.exists() and command_file.exists()):
            return False
        if command_file.read_text() != self.identity:
            return False
        built = self.object.stat().st_mtime_ns
        # "x.o: a.cpp b.h \" with spaces in names escaped
        names = shlex.split(depfile.read_text().replace("\\\n", " ").split(":", 1)[1])
        return all((ROOT / name).exists() and (ROOT / name).stat().st_mtime_ns <= built for name in names)

    def run(self) -> None:
        self.object.parent.mkdir(parents=True, exist_ok=True)
        started = time.time_ns()
        partial = self.object.with_suffix(".partial")
        command = [*self.command, "-MMD", "-MF", str(self.object.with_suffix(".d")), "-o", str(partial)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.stderr:
            print(done.stderr, end="", flush=True)
        if done.returncode != 0:
            raise CompileError(f"{self.source} does not compile")
        # A source saved while the compiler ran counts as newer.
        os.utime(partial, ns=(started, started))
        partial.replace(self.object)
        self.object.with_suffix(".cmd").write_text(self.identity)


def remove_leftovers(objects_dir: Path, jobs: list[CompileJob]) -> None:
    """Removes what earlier builds made of sources that are gone; who looks through the objects takes them for ours."""
    for orphan in set(objects_dir.glob("*/*.o")) - {job.object for job in jobs}:
        for suffix in (".o", ".d", ".cmd", ".partial"):
            orphan.with_suffix(suffix).unlink(missing_ok=True)


class BuildExtension(build_ext):
    """build_ext with one compile per (source, ISA level)."""

    user_options: ClassVar = [*build_ext.user_options, ("sanitize=", None, "instrument: address or thread")]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = ""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.sanitize not in SANITIZERS:
            raise CompileError(f"--sanitize: expected address or thread, got {self.sanitize!r}")

    def build_extension(self, ext: Extension) -> None:
        objects_dir = Path(self.build_temp).resolve() / (self.sanitize or "release")
        objects_dir.mkdir(parents=True, exist_ok=True)
        with open(objects_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree take turns
            self.build_library(objects_dir, Path(self.get_ext_fullpath(ext.name)))

    def build_library(self, objects_dir: Path, library: Path) -> None:
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        torch, torch_version = torch_dir(), importlib.metadata.version("torch")
        toolchain = f"{check_compiler(cxx)} torch {torch_version}"
        jobs = self.compile_jobs(cxx, torch, objects_dir, toolchain)
        remove_leftovers(objects_dir, jobs)
        outdated = [job for job in jobs if self.force or not job.is_current()]
        self.compile_all(outdated)

        link = [*cxx, "-shared", "-fopenmp", *SANITIZERS[self.sanitize], *(str(job.object) for job in jobs)]
        link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
        linked_as = objects_dir / "link.cmd"
        identity = "\n".join([shlex.join(link), *(str(job.object.stat().st_mtime_ns) for job in jobs)])
        if not (library.exists() and linked_as.exists() and linked_as.read_text() == identity):
            library.parent.mkdir(parents=True, exist_ok=True)
            library.unlink(missing_ok=True)  # a process that has it loaded keeps the old file
            subprocess.run(link, check=True)
            linked_as.write_text(identity)
        (library.parent / BUILD_INFO).write_text(
            '"""What the extension beside this file was built against; written by setup.py."""\n\n'
            f"TORCH_VERSION = {torch_version!r}\n"
        )

    def compile_jobs(self, cxx: list[str], torch: Path, objects_dir: Path, toolchain: str) -> list[CompileJob]:
        flags = [*COMMON_FLAGS, *SANITIZERS[self.sanitize], "-Icsrc"]
        includes = ["-isystem", str(torch / "include"), "-isystem", sysconfig.get_path("include")]
        groups = [("common", "*.cpp", [*flags, *includes])]
        for level in isa_levels():
            defines = [f"-DPOLYMOE_LEVEL={level}", f"-DPOLYMOE_LEVEL_{level.upper()}=1"]
            if level == "amx":  # what it has no kernels of its own for
                defines.append("-DPOLYMOE_LEVEL_AVX512_BF16=1")
            quiet = VECTOR_WARNINGS if ISA_FLAGS[level] else []
            groups.append((level, "micro/*.cpp", [*flags, *ISA_FLAGS[level], *defines, *quiet]))

        jobs = []
        for group, pattern, group_flags in groups:
            for source in sorted((ROOT / "csrc").glob(pattern)):
                name = source.relative_to(ROOT)
                command = [*cxx, *group_flags, "-c", str(name)]
                target = objects_dir / group / (source.stem + ".o")
                jobs.append(CompileJob(name, target, command, f"{toolchain}\n{shlex.join(command)}"))
        return jobs

    def compile_all(self, jobs: list[CompileJob]) -> None:
        count = 0

        def compile_one(job: CompileJob) -> None:
            nonlocal count
            if self.verbose > 1:
                print(shlex.join(job.command), flush=True)
            started = time.monotonic()
            job.run()
            count += 1
            where = f"{job.source} ({job.object.parent.name})"
            print(f"[{count}/{len(jobs)}] {where}  {time.monotonic() - started:.1f} s", flush=True)

        with ThreadPoolExecutor(int(self.parallel or len(os.sched_getaffinity(0)))) as pool:
            futures = [pool.submit(compile_one, job) for job in jobs]
            errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise CompileError("; ".join(str(error) for error in errors))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            library = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            package_dir = build_py.get_package_dir(ext.name.rpartition(".")[0])
            self.copy_file(str(library.parent / BUILD_INFO), str(Path(package_dir, BUILD_INFO)))


setup(
    ext_modules=[Extension("polymoe._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
