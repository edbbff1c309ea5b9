"""Facts about this machine and this build, from the C++ extension. It registers the CPU kernels when imported."""

def isa_levels() -> list[str]:
    """All levels by name, the lowest first."""

def isa_supported() -> list[str]:
    """The levels this machine can run."""

def isa_level() -> str:
    """The level the kernels use now."""

def set_isa_level(level: str) -> None:
    """Use a supported level from now on, "" for the best; ValueError says what an unsupported one needs."""

def isa_flags(level: str) -> list[str]:
    """The CPU flags a level uses, with `os_saves_*` for the registers that the OS must save."""

def isa_missing(level: str) -> list[str]:
    """Those of `isa_flags(level)` that this machine lacks."""

def cpu_flags() -> dict[str, bool]:
    """Every flag some level uses, and whether this machine has it."""

def disable_cpu_flags(flags: list[str]) -> None:
    """Treat these flags as absent in this process from now on."""

def cache_sizes() -> dict[str, int]:
    """Bytes of the caches `l1d`, `l2`, `l3` that one core sees."""

def num_threads() -> int:
    """Threads an op called here uses at most."""

def in_forked_child() -> bool:
    """True in a child forked after the extension was loaded, where ops run on one thread."""

def block_rows(row_bytes: int, l2_bytes: int) -> int:
    """Rows packed together for a matmul, each of `row_bytes`, with an L2 cache of `l2_bytes`."""

def decodes_once(rows: int, max_rows: int) -> bool:
    """Whether a quantised weight is decoded once for `rows` rows, where `max_rows` fill a register tile."""

def task_columns(width: int, unit: int, target: int, blocks: int, threads: int) -> int:
    """Columns of one task, when `blocks` matrices of `width` columns are shared out to `threads`."""

def sum_columns(hidden: int, unit: int, column_bytes: int, l3_bytes: int) -> int:
    """Columns of H whose sums stay in the L3 cache."""

def worthwhile_threads(threads: int, rows: int, elements: int) -> int:
    """Threads, of at most `threads`, for `rows` rows that are multiplied by `elements` weights each."""

def serve_aten_grouped_mm(on: bool) -> None:
    """Put a kernel for `aten::_grouped_mm` on the CPU in place, or take it away."""

def aten_grouped_mm_calls() -> tuple[int, int]:
    """Calls that this kernel served, and calls that it passed on to torch's."""

def torch_version() -> str:
    """The torch version this extension was compiled against."""
