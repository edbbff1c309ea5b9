"""One of two processes that train models of the zoo in data-parallel ways and alone: `python -m zoo.distributed RANK
FOLDER SEED FAMILY...`, with this folder's parent on the path. Rank 0 leaves what it found in FOLDER/found.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import polymoe.integrations.transformers  # noqa: F401 (registers "polymoe")
from zoo.shrink import PARTS, experts_modules
from zoo.training import assert_gradients_agree, collected, gradients, loss, rounding_of, trainable

RANKS = 2
Inputs = dict[str, Tensor]
Gradients = dict[str, Tensor]


def data_parallel(model: PreTrainedModel) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)  # not every batch uses every parameter


def sharded(model: PreTrainedModel) -> nn.Module:
    layers = model.base_model.layers
    assert all(any(experts in layer.modules() for layer in layers) for experts in experts_modules(model))
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def accumulated(model: nn.Module, parts: list[Inputs]) -> Gradients:
    """One process, one part of the batch after the other."""
    for part in parts:
        (loss(model, part) / len(parts)).backward()
    return collected(model)


def in_parallel(model: nn.Module, part: Inputs) -> Gradients:
    loss(model, part).backward()
    found = {name.removeprefix("module."): grad for name, grad in collected(model).items()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def train(family: str, model_class: type[PreTrainedModel], rank: int) -> dict[str, Gradients]:
    """The gradients of every way, each close to those of the whole batch with float64 experts."""
    model, inputs = trainable(family, model_class)
    truth = gradients(model, inputs, "float64")
    rounding = rounding_of(model, inputs, truth)
    model.set_experts_implementation("polymoe")
    parts = [{name: value.chunk(RANKS)[i] for name, value in inputs.items()} for i in range(RANKS)]
    found = {}
    for way in ("alone", "ddp", "fsdp2"):  # the last one leaves a sharded model
        model.zero_grad()
        if way == "alone":
            found[way] = accumulated(model, parts)
        else:
            found[way] = in_parallel((data_parallel if way == "ddp" else sharded)(model), parts[rank])
        assert_gradients_agree(found[way], truth, rounding)
    return found


def main(rank: int, folder: Path, seed: int, families: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = {}
    for family, model_class in PARTS:
        if family in families:
            torch.manual_seed(seed)
            found[model_class.__name__] = train(family, model_class, rank)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
