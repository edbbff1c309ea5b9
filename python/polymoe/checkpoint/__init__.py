"""Published checkpoints of Mixture-of-Experts models, read expert by expert.

    from polymoe.checkpoint import Checkpoint

    checkpoint = Checkpoint("DeepSeek-V4-Flash")
    for layer in checkpoint.layers:
        expert = checkpoint.expert(layer, 0)  # memory-mapped, as stored
        print(layer, checkpoint.storage(layer), expert.down.shape)

`quantize` rewrites one that is dense with quantised experts.

DeepSeek-V3 and V4, gpt-oss, Qwen3-MoE, Mixtral, and models whose experts have the same names; safetensors only.
"""

from polymoe.checkpoint.layouts import Storage
from polymoe.checkpoint.quantize import quantize
from polymoe.checkpoint.reader import Checkpoint, ExpertWeights
from polymoe.checkpoint.shards import CheckpointError, Entry

__all__ = ["Checkpoint", "CheckpointError", "Entry", "ExpertWeights", "Storage", "quantize"]
