"""What the Triton backend says that it serves, where no GPU is needed to know. Its kernels: tests/interpreted."""

import importlib.util

import pytest
import torch

import polymoe
from polymoe.backends import triton
from polymoe.formats import FORMATS
from polymoe.hal.problem import FORMAT_OPS, OPS, Problem
from polymoe.hal.select import declined

BF16 = torch.bfloat16
backend = triton.TritonBackend()


@pytest.fixture
def installed(monkeypatch):
    """Whether or not it is."""
    monkeypatch.setattr(triton, "find_spec", lambda name: importlib.util.find_spec("torch"))


def test_every_op_has_a_kernel_file():
    assert set(triton.KERNELS) == set(OPS)
    assert set(triton.FORMAT_KERNELS) == set(FORMAT_OPS)
    for op in triton.KERNELS + triton.FORMAT_KERNELS:
        assert importlib.util.find_spec(f"polymoe.kernels.{op}") is not None


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_it_serves_gpus_in_every_dtype_but_float64(device_type, installed):
    for op in OPS.values():
        for dtype in (torch.float32, BF16, torch.float16, torch.int32):
            assert declined(backend, op.problem(device_type, dtype)) is None
        assert declined(backend, op.problem(device_type, torch.float64)) == (
            "its kernels compute in float32; float64 is for the cpu and reference backends"
        )


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_it_quantises_on_gpus(device_type, installed):
    for name in FORMATS:
        for dtype in (torch.float32, BF16, torch.float16):
            assert declined(backend, Problem("quantize", device_type, dtype, (name,))) is None


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert declined(backend, OPS["gate"].problem("cuda", BF16)) == "triton is not installed"


def test_an_op_that_it_does_not_know(installed):
    assert backend.supports("cook", Problem("cook", "cuda", BF16, ())) == "there is no Triton kernel for cook"


def test_cpu_tensors_are_for_the_interpreter(installed):
    assert declined(backend, OPS["gate"].problem("cpu", BF16)) == "it serves cuda, xpu tensors, not cpu"
    with pytest.raises(ValueError, match="'triton': it serves cuda, xpu tensors, not cpu"):
        polymoe.gate(torch.ones(2, 4), 2, backend="triton")


def test_devices_without_bfloat16_matrix_instructions(installed, monkeypatch):
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    problem = OPS["experts"].problem("cuda", BF16)
    assert declined(backend, problem) == "it needs compute capability 8.0, and device 1 has 7.5"
    capabilities[1] = (8, 0)
    assert declined(backend, problem) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's numbers mean something else
    capabilities[1] = (7, 0)
    assert declined(backend, problem) is None
