"""Data-parallel training on two processes: the steps of one process that sees both halves of the batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from polymoe.testing.tolerances import relative_frobenius

PROGRAM = textwrap.dedent(
    """
    import os, sys
    import torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    import polymoe.nn, polymoe.training

    rank, ranks, folder, seed = int(sys.argv[1]), 2, sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            router = polymoe.nn.Router(16, 8, 2, scoring="sigmoid", selection_bias=True, track_load=True)
            self.moe = polymoe.nn.MoE(router, polymoe.nn.Experts(8, 16, 12), shared_intermediate_size=8)

        def forward(self, x):
            return x + self.moe(x)

    def train(wrap, parts):
        torch.manual_seed(seed)
        model, whole = torch.nn.Sequential(Block(), Block()), torch.randn(24, 16)
        model = wrap(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimiser.zero_grad()
            part = whole.roll(step, 0).chunk(parts)[rank if parts > 1 else 0]
            model(part).square().mean().backward()
            optimiser.step()
            loads = polymoe.training.balance(model, 0.01)
        found = {
            name.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
        return found | {"loads": torch.stack(list(loads.values()))}

    def shard(model):
        for block in model:
            fully_shard(block)
        return fully_shard(model)

    found = {"alone": train(lambda model: model, 1)}
    meet = "file://" + os.path.join(folder, "meet")
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    found |= {"ddp": train(DistributedDataParallel, ranks), "fsdp2": train(shard, ranks)}
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()
    """
)


# A whole model from Transformers: its gradients, since optimisers hide small ones beside the parameters.
TRANSFORMERS = textwrap.dedent(
    """
    import os, sys
    import torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    sys.path.insert(0, "tests")
    import zoo
    import polymoe.integrations.transformers

    rank, ranks, folder, seed = int(sys.argv[1]), 2, sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)

    def gradients(family, wrap, parts):
        torch.manual_seed(seed)
        model = zoo.tiny_model(family).requires_grad_(True)
        model.set_experts_implementation("polymoe")
        tokens = torch.randint(model.config.vocab_size, (4, 12)).chunk(parts)[rank if parts > 1 else 0]
        model = wrap(model)
        model(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}

    def data_parallel(model):  # DeepSeek-V4 has parameters that not every batch uses
        return DistributedDataParallel(model, find_unused_parameters=True)

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    families = sys.argv[4:]
    found = {"alone": {family: gradients(family, lambda model: model, 1) for family in families}}
    meet = "file://" + os.path.join(folder, "meet")
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    found["ddp"] = {family: gradients(family, data_parallel, ranks) for family in families}
    found["fsdp2"] = {family: gradients(family, shard, ranks) for family in families}
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()
    """
)


def run_two(program: str, folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    return torch.load(folder / "found.pt")


def test_two_processes_train_as_one(tmp_path: Path, seed: int) -> None:
    found = run_two(PROGRAM, tmp_path, str(seed))
    for way in ("ddp", "fsdp2"):
        assert found[way].keys() == found["alone"].keys()
        assert torch.equal(found[way]["loads"], found["alone"]["loads"]), way
        for name, value in found["alone"].items():
            if value.is_floating_point():
                assert relative_frobenius(found[way][name], value) <= 1e-5, f"{way}: {name}"


def test_transformers_models(tmp_path: Path, seed: int) -> None:
    families = ("qwen3_moe", "mixtral", "deepseek_v4")
    found = run_two(TRANSFORMERS, tmp_path, str(seed), *families)
    for family in families:
        alone = found["alone"][family]
        assert any("experts" in name for name in alone)
        largest = max(float(grad.norm()) for grad in alone.values())
        for way in ("ddp", "fsdp2"):
            assert found[way][family].keys() == alone.keys()
            for name, grad in alone.items():  # some hundred float32 roundings; single numbers may nearly cancel
                error = float((found[way][family][name] - grad).norm())
                assert error <= 1e-5 * max(float(grad.norm()), 0.01 * largest), f"{family}, {way}: {name}"
