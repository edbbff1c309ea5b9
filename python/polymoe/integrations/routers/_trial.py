"""A router against its recipe on a few random rows, so that one whose code is not what it was is noticed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polymoe.integrations.routers._recipes import Recipe, RouterModule

_ROWS = 16
_SPREAD = 2.0  # of the logits: scores that are neither alike nor saturated


@torch.no_grad()
def disagreement(recipe: Recipe, router: RouterModule) -> str | None:
    """Why the recipe cannot be this router's; None if they agree, or if the weights are not here to try."""
    tensors = [*router.parameters(), *router.buffers()]
    if any(tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    with torch.autocast(recipe.matrix(router).device.type, enabled=False):
        try:
            inputs = _inputs(recipe, router)
            if inputs is None:
                return None
            own = type(router).forward(router, *inputs)
            ours = recipe.route(router, *inputs)
        except Exception as error:
            return f"a trial of it failed: {type(error).__name__}: {error}"
    if [(x.shape, x.dtype) for x in own] != [(x.shape, x.dtype) for x in ours]:
        return "on trial it gave other shapes or dtypes than its recipe"
    return None if _agree(own, ours) else "on trial it gave other experts or weights than its recipe"


def _agree(own: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> bool:
    """Rows whose last expert is within rounding of the next best may differ, but hardly half of all random rows.

    Weights that are rounded to bfloat16 differ by 1 / 256 at most; other formulas are further apart.
    """
    (_, weights, ids), (_, our_weights, our_ids) = own[:3], ours[:3]
    ids, order = ids.sort(dim=-1)
    our_ids, our_order = our_ids.sort(dim=-1)
    same = (ids == our_ids).all(dim=-1)
    off = (weights.gather(-1, order) - our_weights.gather(-1, our_order))[same].float().abs()
    bound = 1e-5 if weights.dtype == torch.float32 else 1e-2
    return bool(same.sum() >= _ROWS // 2 and (off <= bound * weights.float().abs().max()).all())


def _inputs(recipe: Recipe, router: RouterModule) -> list[Tensor] | None:
    """Hidden states [1,T,H] or [T,H], as the family has them, and what else forward takes; None if all experts of the
    router are alike, as before its weights are loaded."""
    weight, random = recipe.matrix(router), torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[1], generator=random).to(weight)
    x = x[None] if recipe.batched else x
    spread = recipe.project(router, x).float().std()
    if not spread > 0:
        return None
    inputs = [(x.float() * (_SPREAD / spread)).to(x.dtype)]
    if recipe.hashed:
        inputs.append(torch.randint(router.tid2eid.shape[0], (_ROWS,), generator=random).to(weight.device))
    if recipe.bias == "*":
        inputs.append(torch.rand(weight.shape[0], generator=random).to(weight.device))
    return inputs
