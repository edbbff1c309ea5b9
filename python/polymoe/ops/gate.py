from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS
from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, public
from polymoe.reference._arithmetic import arithmetic_dtype

SCORINGS = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
RENORMALIZE = ("none", "max", "add")


def check(
    logits: Tensor,
    k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
    indices: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> None:
    op = "gate"
    check_that.dtype(op, "logits", logits, check_that.FLOATS)
    check_that.shape(op, "logits", logits, {"T": None, "E": None})
    T, E = logits.shape
    if not 1 <= k <= E:
        check_that.fail(op, "k", f"1 <= k <= E = {E}", k)
    check_that.choice(op, "scoring", scoring, SCORINGS)
    check_that.choice(op, "renormalize", renormalize, RENORMALIZE)
    check_groups(op, "k", k, E, n_group, topk_group, group_top)
    if bias is not None:
        check_that.dtype(op, "bias", bias, _bias_dtypes(logits))
        check_that.shape(op, "bias", bias, {"E": E})
        check_that.device(op, "bias", bias, logits)
    if indices is not None:
        check_that.dtype(op, "indices", indices, check_that.IDS)
        check_that.shape(op, "indices", indices, {"T": T, "K": k})
        check_that.device(op, "indices", indices, logits)
        if n_group > 1:
            check_that.fail(op, "indices", "nothing where n_group > 1", check_that.describe(indices))
        if bias is not None:
            check_that.fail(op, "indices", "nothing where a bias is given", check_that.describe(indices))
    if token_mask is not None:
        check_that.dtype(op, "token_mask", token_mask, (torch.bool,))
        check_that.shape(op, "token_mask", token_mask, {"T": T})
        check_that.device(op, "token_mask", token_mask, logits)


def _bias_dtypes(logits: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if logits.dtype == torch.float64 else (torch.float32,)


def check_groups(op: str, k_name: str, k: int, E: int, n_group: int, topk_group: int, group_top: int) -> None:
    if n_group < 1 or E % n_group != 0:
        check_that.fail(op, "n_group", f"a divisor of E = {E}", n_group)
    if not 1 <= topk_group <= n_group:
        check_that.fail(op, "topk_group", f"1 <= topk_group <= n_group = {n_group}", topk_group)
    if n_group == 1:
        return  # group_top, whose default is more than one expert, has no groups to score
    size = E // n_group
    if not 1 <= group_top <= size:
        check_that.fail(op, "group_top", f"1 <= group_top <= E / n_group = {size}", group_top)
    if k > topk_group * size:
        check_that.fail(op, k_name, f"at most the {topk_group * size} experts of the topk_group groups kept", k)


def fake(logits: Tensor, k: int, *options: object) -> tuple[Tensor, Tensor]:
    weights_dtype = arithmetic_dtype(logits.dtype)
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=weights_dtype), logits.new_empty(shape, dtype=torch.int32)


def check_backward(
    logits: Tensor,
    grad: Tensor,
    ids: Tensor,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
) -> None:
    op = "gate_backward"
    check_that.dtype(op, "ids", ids, check_that.INT32)
    check_that.shape(op, "ids", ids, {"T": None, "K": None})
    check(logits, ids.shape[1], scoring, bias, renormalize=renormalize)
    check_that.shape(op, "ids", ids, {"T": logits.shape[0], "K": ids.shape[1]})
    check_that.device(op, "ids", ids, logits)
    check_that.dtype(op, "grad", grad, (arithmetic_dtype(logits.dtype),))
    check_that.shape(op, "grad", grad, {"T": logits.shape[0], "K": ids.shape[1]})
    check_that.device(op, "grad", grad, logits)


def fake_backward(logits: Tensor, grad: Tensor, ids: Tensor, *options: object) -> Tensor:
    return logits.new_empty(logits.shape)


# The gradient of the logits, of their dtype, from that of the weights of the experts `ids` that gate chose; zero in
# rows without an expert and where a logit of +inf was bounded.
gate_backward = define_op(
    "gate_backward",
    '(Tensor logits, Tensor grad, Tensor ids, str scoring="softmax", Tensor? bias=None, str renormalize="none", '
    'float eps=1e-20, float scale=1.0, *, str backend="") -> Tensor',
    check_backward,
    fake_backward,
    options={"scoring": "softmax"},
    specs=GRADIENT_OPS,
)


def setup(ctx: Any, args: Any, results: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(args.logits, results[1], args.bias)
    ctx.scoring, ctx.normaliser = args.scoring, (args.renormalize, args.eps, args.scale)


def gradients(ctx: Any, grad: Tensor, grad_of_ids: None) -> dict[str, Tensor]:
    logits, ids, bias = ctx.saved_tensors
    found: Tensor = gate_backward(logits, grad, ids, ctx.scoring, bias, *ctx.normaliser, backend=ctx.backend)
    return {"logits": found}


_gate = define_op(
    "gate",
    '(Tensor logits, int k, str scoring="softmax", Tensor? bias=None, int n_group=1, int topk_group=1, '
    'int group_top=2, str renormalize="none", float eps=1e-20, float scale=1.0, Tensor? indices=None, '
    'Tensor? token_mask=None, *, str backend="") -> (Tensor weights, Tensor ids)',
    check,
    fake,
    options={"scoring": "softmax"},
    gradient=Gradient(setup, gradients),
)


@public
def gate(
    logits: Tensor,
    k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
    renormalize: str | bool = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
    indices: Tensor | None = None,
    token_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses k experts per token and their routing weights.

    Args:
        logits: [T, E], float32, bfloat16, float16 or float64. All arithmetic is float32 (float64 for float64 logits).
        k: experts per token, 1 <= k <= E.
        scoring: how a logit z becomes a score.
            "softmax": softmax over the usable experts (Mixtral, Qwen, OLMoE).
            "softmax_topk": selection by the logit; weights = softmax over the k chosen logits (gpt-oss).
            "sigmoid": 1 / (1 + exp(-z)) (DeepSeek-V3, arXiv 2412.19437 eq. 15; GLM, Kimi, Llama-4).
            "sqrtsoftplus": sqrt(log(1 + exp(z))) (DeepSeek-V4).
        bias: [E] float32 (float64 is accepted with float64 logits), added to the score for the selection only
            (auxiliary-loss-free balancing, arXiv 2412.19437 eq. 16).
        n_group, topk_group, group_top: with n_group > 1 the experts form n_group equal consecutive groups; the score of
            a group is the sum of its group_top best biased scores (2: DeepSeek-V3; 1: DeepSeek-V2), and only the
            topk_group best groups take part.
        renormalize: "none"; "max": weights / max(sum, eps); "add": weights / (sum + eps), sum in slot order. True is
            "max", False is "none".
        eps: see renormalize.
        scale: factor on the weights, applied last.
        indices: [T, K] int32 or int64: the experts are given (hash routing, replay), only the weights are computed.
            Not together with bias or n_group > 1.
        token_mask: [T] bool; a False row gets ids -1 and weights 0.

    Returns:
        weights [T, K] float32 (float64 for float64 logits) and ids [T, K] int32, in descending order of the selection
        score; ties go to the smaller index (of groups too).

        An expert is usable for a token unless its logit or its biased score is NaN or -inf; +inf counts as the largest
        finite value of the arithmetic. Experts that are not usable are never selected and are absent from the softmax.
        Where fewer than k experts are usable, the remaining slots have id -1 and weight 0; so has a slot whose given
        index is out of range or not usable.

    Raises:
        ValueError: any other shape, dtype, device or option.
    """
    if isinstance(renormalize, bool):
        renormalize = "max" if renormalize else "none"
    chosen = select("gate", logits, (scoring,), backend)
    weights, ids = _gate(
        logits,
        k,
        scoring,
        bias,
        n_group,
        topk_group,
        group_top,
        renormalize,
        eps,
        scale,
        indices,
        token_mask,
        backend=chosen,
    )
    return weights, ids
