"""The ops one by one: route, sort, multiply, activate, multiply, combine; and `experts`, which is all of it at once."""

from __future__ import annotations

import torch

import polymoe


def main() -> None:
    T, H, I, E, K = 64, 256, 128, 16, 4  # tokens, hidden, expert intermediate, experts, experts per token
    dtype = torch.bfloat16
    x = torch.randn(T, H).to(dtype)
    router = torch.randn(E, H) / H**0.5
    gate_up = (torch.randn(E, 2 * I, H) / H**0.5).to(dtype)
    down = (torch.randn(E, H, I) / I**0.5).to(dtype)

    # DeepSeek-V4's gate: the weights of the 4 best of 16 scores, normalised, times 1.5.
    weights, ids = polymoe.gate(x.float() @ router.t(), K, scoring="sqrtsoftplus", renormalize=True, scale=1.5)
    print("experts of token 0:", ids[0].tolist(), "weights:", [round(w, 3) for w in weights[0].tolist()])
    print("tokens of each expert:", polymoe.expert_counts(ids, E).tolist())

    # Rows sorted by expert, two grouped matmuls with the activation between them, and the weighted sum per token.
    plan = polymoe.plan(ids, E)
    ends = plan.offsets[1:]
    h = polymoe.grouped_mm(polymoe.dispatch(x, plan), gate_up.transpose(1, 2), ends, out_dtype=torch.float32)
    a = polymoe.activate(h, "swiglu_clamped", limit=10.0, plan=plan, out_dtype=dtype)
    y = polymoe.grouped_mm(a, down.transpose(1, 2), ends, out_dtype=torch.float32)
    composed = polymoe.combine(y, plan, weights, out_dtype=dtype)

    # The same as one op: no [S, 2I] and [S, H] tensors in memory, and on one backend the same bits.
    fused = polymoe.experts(x, gate_up, down, weights, ids, activation="swiglu_clamped", limit=10.0)
    print("experts equals its parts to the bit:", torch.equal(fused, composed))
    print(polymoe.explain(polymoe.experts, x, gate_up, down, weights, ids))


if __name__ == "__main__":
    main()
