"""Expert shapes of real models, and a few others that show something.

Where all experts of a layer do not fit the memory several times over (contenders that repack hold copies of their own),
the shape is a slice: E of the model's E_model experts, every token choosing K among those. An expert is as large as in
the model; at the same number of tokens it gets more rows than there. `--experts` takes another slice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One routed layer.

    H, I, E, K   hidden width, expert width, experts held here, experts a token
    E_model      experts of the whole model, which its gate sees
    scoring, groups
                 as polymoe.gate names them; groups: (n_group, topk_group)
    activation, limit, interleaved
                 as polymoe.activate names them
    bias         of both projections
    """

    name: str
    H: int
    I: int
    E: int
    K: int
    E_model: int
    scoring: str = "softmax"
    groups: tuple[int, int] | None = None
    activation: str = "swiglu"
    limit: float | None = None
    interleaved: bool = False
    bias: bool = False

    @property
    def expert_elements(self) -> int:
        return 3 * self.H * self.I

    @property
    def slice(self) -> str:
        return "all" if self.E == self.E_model else f"{self.E} of {self.E_model}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", H=2048, I=768, E=128, K=8, E_model=128),
        # Half of Mixtral-8x7B in both widths, so that all eight experts fit.
        Shape("mixtral-half", H=2048, I=7168, E=8, K=2, E_model=8),
        Shape("v4-flash", 4096, 2048, 32, 6, 256, "sqrtsoftplus", activation="swiglu_clamped", limit=10.0),
        Shape("deepseek-v3", 7168, 2048, 16, 8, 256, "sigmoid", groups=(8, 4)),
        Shape("v4-pro", 7168, 3072, 12, 6, 384, "sqrtsoftplus", activation="swiglu_clamped", limit=10.0),
        Shape("qwen3-235b-a22b", H=4096, I=1536, E=40, K=8, E_model=128),
        Shape("qwen3-next", H=2048, I=512, E=256, K=10, E_model=512),
        Shape("mixtral", H=4096, I=14336, E=4, K=2, E_model=8),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4, 32, "softmax_topk", None, "swiglu_oai", 7.0, True, True),
        Shape("olmoe", H=2048, I=1024, E=64, K=8, E_model=64),
        Shape("glm-4.5-air", 4096, 1408, 48, 8, 128, "sigmoid"),
        Shape("kimi-k2", 7168, 2048, 16, 8, 384, "sigmoid"),
        # One or two rows an expert at 512 experts, and many rows at 8: the same bytes of weights.
        Shape("many-experts", H=2048, I=256, E=512, K=8, E_model=512),
        Shape("few-experts", H=4096, I=8192, E=8, K=2, E_model=8),
        # Says nothing about speed: it shows in a second that everything runs.
        Shape("tiny", H=64, I=32, E=8, K=2, E_model=8),
    )
}
ALIASES = {"w1": "qwen3-30b-a3b", "w2": "mixtral-half", "w3": "v4-flash"}
MODELS = tuple(ALIASES.values())  # unless the command line says otherwise

# 1, 2, 3, 4, 6, 8, 12 ... 8192: are time and share of the bound smooth in the number of tokens?
SWEEP = tuple(sorted({2**n for n in range(14)} | {3 * 2**n for n in range(12)}))


def shape_of(name: str) -> Shape:
    return SHAPES[ALIASES.get(name, name)]
