"""Modules around the ops: `Router` picks experts, `Experts` holds and applies them, `MoE` is the whole layer.

Letters in shapes: T tokens, H hidden width, I expert intermediate width, E experts, K experts per token, V vocabulary.

Every matrix product here goes through polymoe's ops, projections of the model's width included: on a backend that
declares it, a token's output does not depend on the other tokens of its batch.
"""

from polymoe.nn.experts import Experts
from polymoe.nn.linear import Linear
from polymoe.nn.moe import MoE, SharedExpert
from polymoe.nn.quantized import QuantizedExperts, quantize_
from polymoe.nn.router import Router

__all__ = ["Experts", "Linear", "MoE", "QuantizedExperts", "Router", "SharedExpert", "quantize_"]
