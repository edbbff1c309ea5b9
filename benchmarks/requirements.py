"""What `experts` is asked to reach, by dtype, ISA level and tokens; `--check` fails where it does not.

The names are those of benchmarks._report.Row.measured. Elsewhere only the numbers are reported.
"""

from __future__ import annotations

from benchmarks.models import Shape

ERROR = {"bf16": 0.0027}  # relative, against float64
ERROR_RATIO = 1.05  # over that of the eager loop


def required(shape: Shape, dtype: str, T: int, level: str, judge_accuracy: bool) -> dict[str, float]:
    """Nothing is asked of shapes that are not a model's, nor of levels that were not tuned."""
    if shape.name == "tiny":
        return {}
    asked = {"amx": _best_level, "avx512_bf16": _best_level, "avx2": _avx2}.get(level, _nothing)(dtype, T)
    if asked and judge_accuracy:
        asked["error_ratio"] = ERROR_RATIO
        if dtype in ERROR:
            asked["error"] = ERROR[dtype]
    return asked


def _best_level(dtype: str, T: int) -> dict[str, float]:
    if dtype == "bf16":
        share = 0.92 if T <= 16 else 0.90 if T >= 512 else 0.82
        return {"over_best_peer": 0.97, "share": share, "plain": 0.85 if T == 1 or T >= 512 else 0.75}
    floors = {"f32": {128: 0.85, 512: 0.88, 1024: 0.88}, "f16": {1: 0.85, 1024: 0.75}}
    return {"share": floors[dtype][T]} if T in floors[dtype] else {}


def _avx2(dtype: str, T: int) -> dict[str, float]:
    if dtype != "bf16":
        return {}
    asked: dict[int, dict[str, float]] = {
        1: {"share": 0.85},
        16: {"over_baseline": 1.5},
        1024: {"over_baseline": 3.0, "share": 0.75},
    }
    return dict(asked.get(T, {}))


def _nothing(dtype: str, T: int) -> dict[str, float]:
    return {}
