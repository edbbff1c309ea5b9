"""Expert shapes of real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One routed layer.

    H, I, E, K   hidden width, expert width, experts held here, experts a token
    E_model      experts of the whole model, which its gate sees; more than E where only a slice fits the memory
    scoring, activation, limit
                 as polymoe.gate and polymoe.activate name them
    """

    name: str
    H: int
    I: int
    E: int
    K: int
    E_model: int
    scoring: str = "softmax"
    activation: str = "swiglu"
    limit: float | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", H=2048, I=768, E=128, K=8, E_model=128),
        # Half of Mixtral-8x7B in both widths.
        Shape("mixtral", H=2048, I=7168, E=8, K=2, E_model=8),
        Shape(
            "v4-flash-slice", 4096, 2048, 32, 6, 256, scoring="sqrtsoftplus", activation="swiglu_clamped", limit=10.0
        ),
        # Says nothing about speed: it shows in a second that everything runs.
        Shape("tiny", H=64, I=32, E=8, K=2, E_model=8),
    )
}
MODELS = ("qwen3-30b-a3b", "mixtral", "v4-flash-slice")
