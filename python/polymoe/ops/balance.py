"""Balancing the load of the experts: counts, the sequence-wise loss and the step of the selection bias.

Plain PyTorch around polymoe.plan. The formulas are those of the DeepSeek-V3 report (arXiv 2412.19437, section 2.1.2),
beside them the losses of Switch Transformers (arXiv 2101.03961) and of ST-MoE (arXiv 2202.08906).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.ops import _check as check_that
from polymoe.ops.plan import check_ids, plan
from polymoe.reference._arithmetic import arithmetic_dtype


def expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    """How many slots went to each expert.

    Args:
        ids: [T, K] int32 or int64; ids < 0 or >= num_experts are not counted.
        num_experts: E, at least 1.

    Returns:
        [E] int64.

    Raises:
        ValueError: any other shape or dtype; num_experts < 1; 2^31 slots or more.
    """
    check_ids("expert_counts", ids, num_experts)
    return plan(ids, num_experts).offsets.diff().long()


def balance_loss(scores: Tensor, ids: Tensor, alpha: float = 1e-4, token_mask: Tensor | None = None) -> Tensor:
    """The sequence-wise balance loss, the mean over the sequences of alpha * sum over the experts e of f_e * P_e, with

        f_e = E / (K * T) * the number of slots of the sequence that went to e
        P_e = the mean over the tokens of the sequence of the scores normalised to sum 1

    where T tokens make the sequence (equations 17 to 20 of the report). A perfectly even load gives alpha.

    Args:
        scores: [B, T, E], or [T, E] for one sequence; not negative: softmax, sigmoid or sqrtsoftplus of the logits,
            before any bias. The loss is differentiable in the scores, through P.
        ids: [B, T, K] or [T, K] int32 or int64; ids that skip are not counted.
        alpha: the factor (1e-4 in the report).
        token_mask: [B, T] or [T] bool: tokens that are False (padding) are left out of T, f and P.

    Returns:
        A scalar, float32 (float64 for float64 scores); 0 for a sequence without tokens.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    _check_loss("balance_loss", "scores", scores, ids, token_mask)
    B = 1 if scores.dim() == 2 else scores.shape[0]
    T, E = scores.shape[-2:]
    K = ids.shape[-1]
    if token_mask is not None:
        ids = ids.where(token_mask.unsqueeze(-1), -1)
    ids = ids.reshape(B, T, K)
    # Counts per sequence are counts over B*E experts, those of sequence b starting at b*E.
    first = torch.arange(B, device=ids.device)[:, None, None] * E
    counts = expert_counts((first + ids).where((ids >= 0) & (ids < E), -1).reshape(B * T, K), max(B, 1) * E)

    s = scores.reshape(B, T, E).to(arithmetic_dtype(scores.dtype))
    share = s / s.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    if token_mask is None:
        tokens = torch.full((B, 1), T, dtype=s.dtype, device=s.device)
    else:
        mask = token_mask.reshape(B, T)
        share = share.where(mask.unsqueeze(-1), 0)
        tokens = mask.sum(dim=1, keepdim=True).to(s.dtype)
    tokens = tokens.clamp(min=1)
    f = counts[: B * E].reshape(B, E).to(s.dtype) * E / (K * tokens)
    P = share.sum(dim=1) / tokens
    return alpha * (f * P).sum() / max(B, 1)


def _check_loss(
    op: str, name: str, scores: Tensor, ids: Tensor, token_mask: Tensor | None, sequences: bool = True
) -> None:
    check_that.dtype(op, name, scores, check_that.FLOATS)
    batch: dict[str, int | None] = {}
    if sequences and scores.dim() != 2:
        batch = {"B": scores.shape[0] if scores.dim() else None}
    check_that.shape(op, name, scores, batch | {"T": None, "E": None})
    if scores.shape[-1] < 1:
        check_that.fail(op, name, "at least 1 expert", check_that.describe(scores))
    tokens = batch | {"T": scores.shape[-2]}
    check_that.dtype(op, "ids", ids, check_that.IDS)
    check_that.shape(op, "ids", ids, tokens | {"K": None})
    if ids.shape[-1] < 1:
        check_that.fail(op, "ids", "at least 1 slot per token", check_that.describe(ids))
    check_that.device(op, "ids", ids, scores)
    if token_mask is not None:
        check_that.dtype(op, "token_mask", token_mask, (torch.bool,))
        check_that.shape(op, "token_mask", token_mask, tokens)
        check_that.device(op, "token_mask", token_mask, scores)


def switch_loss(probabilities: Tensor, ids: Tensor, alpha: float = 1e-2, token_mask: Tensor | None = None) -> Tensor:
    """The auxiliary loss of Switch Transformers (equations 4 to 6), over the whole batch: alpha * E * sum over the
    experts e of f_e * P_e, with

        f_e = the number of slots that went to e, over the number of tokens
        P_e = the mean of the probability of e over the tokens

    For one slot per token it is the paper's; for K slots, as in Transformers, f sums to K and an even load gives
    alpha * K.

    Args:
        probabilities: [T, E]: softmax of the logits. The loss is differentiable in them, through P.
        ids: [T, K] int32 or int64; ids that skip are not counted.
        alpha: the factor (1e-2 in the paper).
        token_mask: [T] bool: tokens that are False (padding) are left out of everything.

    Returns:
        A scalar, float32 (float64 for float64 probabilities); 0 without tokens.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    _check_loss("switch_loss", "probabilities", probabilities, ids, token_mask, sequences=False)
    E = probabilities.shape[1]
    p = probabilities.to(arithmetic_dtype(probabilities.dtype))
    if token_mask is not None:
        ids, p = ids.where(token_mask[:, None], -1), p.where(token_mask[:, None], 0)
    tokens = (p.new_tensor(p.shape[0]) if token_mask is None else token_mask.sum()).to(p.dtype).clamp(min=1)
    f = expert_counts(ids, E).to(p.dtype) / tokens
    return alpha * E * (f * (p.sum(dim=0) / tokens)).sum()


def z_loss(logits: Tensor, alpha: float = 1e-3, token_mask: Tensor | None = None) -> Tensor:
    """The router z-loss of ST-MoE (equation 5): alpha times the mean over the tokens of logsumexp(logits)^2. It keeps
    the logits small.

    Args:
        logits: [T, E].
        alpha: the factor (1e-3 in the paper).
        token_mask: [T] bool: tokens that are False (padding) are left out.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    op = "z_loss"
    check_that.dtype(op, "logits", logits, check_that.FLOATS)
    check_that.shape(op, "logits", logits, {"T": None, "E": None})
    if logits.shape[1] < 1:
        check_that.fail(op, "logits", "at least 1 expert", check_that.describe(logits))
    z = logits.to(arithmetic_dtype(logits.dtype))
    if token_mask is None:
        squares = torch.logsumexp(z, dim=1).square()
        return alpha * squares.sum() / max(z.shape[0], 1)
    check_that.dtype(op, "token_mask", token_mask, (torch.bool,))
    check_that.shape(op, "token_mask", token_mask, {"T": logits.shape[0]})
    check_that.device(op, "token_mask", token_mask, logits)
    # Masked before the logarithm too, so that nothing a padding row holds reaches the gradient.
    squares = torch.logsumexp(z.where(token_mask[:, None], 0), dim=1).square().where(token_mask, 0)
    return alpha * squares.sum() / token_mask.sum().clamp(min=1)


def update_bias(bias: Tensor, counts: Tensor, gamma: float = 1e-3) -> Tensor:
    """One step of auxiliary-loss-free balancing: an expert with more than the mean load loses gamma, one with less
    gains it, one at the mean keeps its bias (the report's "bias update speed", 1e-3 there).

    Args:
        bias: [E], a float dtype: the selection bias that polymoe.gate takes.
        counts: [E] integers: the load of a step, from expert_counts, summed over the ranks that share the experts.
        gamma: the step.

    Returns:
        The new bias [E]; `bias` itself is left as it is.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    op = "update_bias"
    check_that.dtype(op, "bias", bias, check_that.FLOATS)
    check_that.shape(op, "bias", bias, {"E": None})
    check_that.dtype(op, "counts", counts, check_that.IDS)
    check_that.shape(op, "counts", counts, {"E": bias.shape[0]})
    check_that.device(op, "counts", counts, bias)
    counts = counts.long()
    # Compared with the mean in integers: exact for any load.
    return bias + gamma * torch.sign(counts.sum() - counts * counts.shape[0]).to(bias.dtype)
