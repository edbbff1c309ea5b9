"""What the matrix products have beside results: the order of tiles over chiplets, tf32, tensor descriptors; and that no
public call waits for the device."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from tests.interpreted.arithmetic import to_tf32
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import polymoe
from polymoe.kernels.devices import INTERPRETER, pretend
from polymoe.kernels.schedule import dealt
from polymoe.testing.cases import Random
from polymoe.testing.tolerances import assert_same_bits, assert_within, dot_error
from polymoe.testing.triton_checker import checked

E, D, N = 3, 48, 1104  # two tiles of columns
SIZES = (40, 0, 35)  # rows of the experts
BF16, F32 = torch.bfloat16, torch.float32


def inputs(seed, dtype=F32, along_d=True):
    random = Random(seed)
    a, b = random.normal(sum(SIZES), D, dtype=dtype), random.matrix(E, N, D, dtype=dtype).mT
    return a, b if along_d else b.contiguous(), torch.tensor(SIZES).cumsum(0).int()


def grouped_mm(*args):
    with checked() as found:
        out = polymoe.grouped_mm(*args, backend="triton")
    assert found == []
    return out


# --- the order of tiles ----------------------------------------------------------------------------------------------


@triton.jit
def _deal(out, total, CHIPLETS: tl.constexpr):
    for t in range(total):
        tl.store(out + t, dealt(t, total, CHIPLETS))


@pytest.mark.parametrize("total", [1, 7, 8, 100])
@pytest.mark.parametrize("chiplets", [1, 2, 8])
def test_every_chiplet_gets_neighbouring_tiles(total, chiplets):
    tiles = torch.empty(total, dtype=torch.int32)
    _deal[(1,)](tiles, total, CHIPLETS=chiplets)
    assert tiles.sort().values.tolist() == list(range(total))
    for chiplet in range(min(chiplets, total)):  # hardware deals programs in turn
        own = tiles[chiplet::chiplets]
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + len(own)))


@pytest.mark.parametrize("units", [2, 1000], ids=["persistent", "a program per tile"])
def test_chiplets_change_no_bit(units, seed):
    args = inputs(seed)
    expected = grouped_mm(*args)
    with pretend(replace(INTERPRETER, units=units, chiplets=8)):
        assert_same_bits(grouped_mm(*args), expected, "on eight chiplets")


# --- tf32 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def products(a, b, offs):
    out = torch.zeros(a.shape[0], b.shape[2], dtype=torch.float64)
    for start, end, weight in zip([0, *offs.tolist()], offs.tolist(), b, strict=False):
        out[start:end] = a[start:end].double() @ weight.double()
    return out


def test_float32_is_float32_unless_the_switch_says_tf32(seed):
    a, b, offs = inputs(seed)
    bound = dot_error(products(a.abs(), b.abs(), offs), D, F32)
    assert_within(grouped_mm(a, b, offs), products(a, b, offs), bound, "float32")


@pytest.mark.usefixtures("tf32")
def test_tf32_rounds_the_operands_alone(seed):
    a, b, offs = inputs(seed)
    rounded, weights = to_tf32(a), to_tf32(b.mT.contiguous()).mT
    bound = dot_error(products(a.abs(), b.abs(), offs), D, F32)
    got = grouped_mm(a, b, offs)
    assert_within(got, products(rounded, weights, offs), bound, "tf32")
    assert ((got - products(a, b, offs)).abs() > bound).any()
    low = [tensor.bfloat16() for tensor in (a, b)]  # the switch is for float32
    assert_same_bits(grouped_mm(*low, offs), _without_the_switch(*low, offs), "bfloat16")


def _without_the_switch(*args):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return grouped_mm(*args)


# --- tensor descriptors ----------------------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch):
    """Which operands of the products launched so far came through descriptors."""
    seen, run = [], InterpretedFunction.run

    def noted(self, *args, **options):
        if "DESCRIBED_A" in options:
            seen.append((options["DESCRIBED_A"], options["DESCRIBED_B"]))
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return seen


def off_by_an_element(tensor):
    """The same values and strides, in memory that bulk copies cannot read."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize(("dtype", "along_d"), [(F32, True), (BF16, False)], ids=["f32 along D", "bf16 along N"])
def test_descriptors_read_what_pointers_read(dtype, along_d, described, seed):
    a, b, offs = inputs(seed, dtype, along_d)
    expected = grouped_mm(a, b, offs)
    for some in ((off_by_an_element(a), b), (a, off_by_an_element(b)), (off_by_an_element(a), off_by_an_element(b))):
        assert_same_bits(grouped_mm(*some, offs), expected, "without descriptors")
    assert described == [(True, True), (False, True), (True, False), (False, False)]


def test_experts_describe_both_halves_of_the_weights(described, seed):
    random, T, K, H, I = Random(seed), 9, 2, 64, 32
    x, weights = random.normal(T, H), random.weights(T, K)
    gate_up, down = random.matrix(E, 2 * I, H, dtype=F32), random.matrix(E, H, I, dtype=F32)
    ids = random.integers(0, E, T, K)
    expected = polymoe.experts(x, gate_up, down, weights, ids, backend="triton")
    moved = off_by_an_element(gate_up), off_by_an_element(down)
    assert_same_bits(polymoe.experts(x, *moved, weights, ids, backend="triton"), expected, "without descriptors")
    assert described == [(False, True), (True, True), (False, False), (True, False)]


# --- the host waits for nothing --------------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Raises where the host reads what a tensor holds, or copies it to another device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select", "tolist")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in {name.strip("_") for name in self.READS}:
            raise AssertionError(f"the host reads a tensor: {func}")
        return func(*args, **(kwargs or {}))


def test_no_public_call_reads_what_a_tensor_holds(monkeypatch):
    """Forward and backward, with launches left out: what the host does beside them."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # a plan nobody wrote must be a possible one
    T, K, H, I = 7, 2, 16, 8
    x, logits = torch.randn(T, H, requires_grad=True), torch.randn(T, E, requires_grad=True)
    gate_up, down = (torch.randn(shape, requires_grad=True) for shape in ((E, 2 * I, H), (E, H, I)))
    with NoReads(), polymoe.use_backend("triton"):
        weights, ids = polymoe.gate(logits, K, renormalize=True)
        layer = polymoe.experts(x, gate_up, down, weights, ids)
        plan = polymoe.plan(ids, E)
        rows = polymoe.dispatch(x, plan, weights)
        out = polymoe.combine(polymoe.activate(rows, "silu", plan=plan), plan, weights)
        product = polymoe.grouped_mm(rows, gate_up.mT, plan.offsets[1:])
        torch.autograd.backward([layer.sum(), out.sum(), product.sum()])
    assert x.grad is not None
    assert logits.grad is not None
    with pytest.raises(AssertionError, match="the host reads"), NoReads():
        out.sum().item()
