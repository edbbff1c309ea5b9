"""Load balancing against its formulas, written out as loops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import polymoe
import polymoe.nn
import polymoe.training

ALPHA, K = 0.02, 3


def loss_of_sequence(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """alpha * sum_e f_e P_e in float64, expert by expert, over the T tokens of one sequence."""
    T, E = scores.shape
    scores = scores.double()
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(E):
        f = E / (K * T) * int((ids == e).sum())
        P = sum(scores[t, e] / scores[t].sum() for t in range(T)) / T
        loss = loss + f * P
    return ALPHA * loss


@pytest.fixture
def seed() -> int:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


def routed(B: int, T: int, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(B, T, E)
    _, ids = polymoe.gate(scores.reshape(B * T, E), K)
    return scores, ids.reshape(B, T, K)


def test_counts(seed: int) -> None:
    ids = torch.randint(-2, 9, (50, K))
    expected = [int((ids == e).sum()) for e in range(7)]
    counts = polymoe.expert_counts(ids, 7)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert polymoe.expert_counts(ids[:0], 7).tolist() == [0] * 7


def test_loss_is_the_mean_over_sequences(seed: int) -> None:
    scores, ids = routed(4, 11, 6)
    ids[2, 5] = torch.tensor([-1, 6, 2])
    expected = torch.stack([loss_of_sequence(s, i) for s, i in zip(scores, ids, strict=True)]).mean()
    loss = polymoe.balance_loss(scores, ids, ALPHA)
    assert loss.dtype == torch.float32
    # A few dozen float32 operations on positive numbers.
    torch.testing.assert_close(loss.double(), expected, rtol=64 * torch.finfo(torch.float32).eps, atol=0)
    one = polymoe.balance_loss(scores[2], ids[2], ALPHA)
    torch.testing.assert_close(one.double(), loss_of_sequence(scores[2], ids[2]), rtol=1e-5, atol=0)


def test_masked_tokens_do_not_count(seed: int) -> None:
    scores, ids = routed(2, 9, 5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    scores[0, 4:] = float("nan")
    expected = (loss_of_sequence(scores[0, :4], ids[0, :4]) + loss_of_sequence(scores[1], ids[1])) / 2
    loss = polymoe.balance_loss(scores.double(), ids, ALPHA, mask)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_even_load_costs_alpha() -> None:
    ids = torch.arange(12).reshape(4, 3) % 6
    loss = polymoe.balance_loss(torch.full((4, 6), 0.25), ids, ALPHA)
    torch.testing.assert_close(loss, torch.tensor(ALPHA), rtol=1e-6, atol=0)


def test_no_tokens() -> None:
    assert polymoe.balance_loss(torch.rand(2, 0, 5), torch.zeros(2, 0, K, dtype=torch.int32)).item() == 0
    assert polymoe.balance_loss(torch.rand(0, 4, 5), torch.zeros(0, 4, K, dtype=torch.int32)).item() == 0
    assert polymoe.balance_loss(torch.rand(0, 5), torch.zeros(0, K, dtype=torch.int32)).item() == 0


def test_gradient(seed: int) -> None:
    scores, ids = routed(2, 5, 4)
    mask = torch.rand(2, 5) < 0.7
    scores = (scores.double() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: polymoe.balance_loss(s, ids, ALPHA, mask), (scores,))
    plain = scores.detach().requires_grad_()
    polymoe.balance_loss(plain, ids, ALPHA).backward()
    again = scores.detach().requires_grad_()
    (sum(loss_of_sequence(s, i) for s, i in zip(again, ids, strict=True)) / 2).backward()
    torch.testing.assert_close(plain.grad, again.grad, rtol=1e-12, atol=1e-16)


def test_update_bias_steps_towards_the_mean() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0])
    counts = torch.tensor([7, 1, 4, 4])  # the mean is 4
    step = 0.125  # exact in float32
    assert polymoe.update_bias(bias, counts, step).tolist() == [0.375, -0.125, 0.0, 1.0]
    assert bias.tolist() == [0.5, -0.25, 0.0, 1.0]


def test_update_bias_is_exact_for_large_counts() -> None:
    # The mean, 2^60 + 1/3, has no exact floating-point number; only the third expert is above it.
    counts = torch.tensor([2**60, 2**60, 2**60 + 1])
    assert polymoe.update_bias(torch.zeros(3), counts, 1.0).tolist() == [1.0, 1.0, -1.0]


def test_loss_compiles(seed: int) -> None:
    compiled = torch.compile(polymoe.balance_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (6, 13):
        scores, ids = routed(2, T, 5)
        assert torch.equal(compiled(scores, ids), polymoe.balance_loss(scores, ids))


def test_switch_loss_is_that_of_transformers(seed: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 6, requires_grad=True)
    theirs = mixtral.load_balancing_loss_func((logits,), 6, K)
    ids = logits.topk(K).indices
    ours = polymoe.switch_loss(logits.softmax(-1), ids, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    mask = torch.rand(40) < 0.6
    kept = polymoe.switch_loss(logits[mask].softmax(-1), ids[mask], 1.0)
    torch.testing.assert_close(polymoe.switch_loss(logits.softmax(-1), ids, 1.0, mask), kept, rtol=1e-5, atol=0)
    assert polymoe.switch_loss(logits[:0], ids[:0]).item() == 0


def test_z_loss(seed: int) -> None:
    logits = (3 * torch.randn(30, 6, dtype=torch.float64)).requires_grad_()
    expected = 0.5 * torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    torch.testing.assert_close(polymoe.z_loss(logits, 0.5), expected, rtol=1e-12, atol=0)
    mask = torch.rand(30) < 0.6
    torch.testing.assert_close(polymoe.z_loss(logits, 0.5, mask), polymoe.z_loss(logits[mask], 0.5))
    assert torch.autograd.gradcheck(lambda z: polymoe.z_loss(z, 0.5, mask), (logits,))
    holed = logits.detach().masked_fill(~mask[:, None], float("nan")).requires_grad_()
    assert torch.autograd.grad(polymoe.z_loss(holed, 0.5, mask), holed)[0].isfinite().all()
    assert polymoe.z_loss(logits[:0]).item() == 0


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_load_is_counted_once_and_balances(reentrant: bool | None, seed: int) -> None:
    router = polymoe.nn.Router(16, 8, 2, scoring="sigmoid", selection_bias=True, track_load=True)
    layer = polymoe.nn.MoE(router, polymoe.nn.Experts(8, 16, 12))
    x = torch.randn(30, 16, requires_grad=True)
    out = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    out.sum().backward()
    with torch.no_grad():
        ids = router(x)[1]  # counted as well: the router is in training
    counts = polymoe.expert_counts(ids, 8)
    assert torch.equal(router.load, 2 * counts)
    router.eval()
    router(x)
    assert torch.equal(router.load, 2 * counts), "evaluation does not count"
    load = polymoe.training.balance(layer, 0.25)["router"]
    assert torch.equal(load, 2 * counts)
    assert torch.equal(router.selection_bias, polymoe.update_bias(torch.zeros(8), counts, 0.25))
    assert not router.load.any()
    assert "load" not in router.state_dict()
    with pytest.raises(ValueError, match="a Router with selection_bias and track_load, got none"):
        polymoe.training.balance(layer.experts)
