"""The tests' own helpers: each has to catch what it is there to catch."""

import numpy as np
import pytest
import torch
from helpers.errors import assert_within, exact
from helpers.fresh import run_fresh
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize(
    "empty",
    [torch.empty_like, lambda x: x.new_empty(x.shape), lambda x: torch.empty_strided(x.shape, (1, 3), dtype=x.dtype)],
)
def test_poison_shows_gaps(empty, dtype):
    x = torch.ones(3, 7, dtype=dtype)
    with poison():
        result = empty(x)
        result[:, :6] = x[:, :6]  # a kernel that forgets the tail
    assert not torch.equal(result, x)
    assert torch.equal(result[:, :6], x[:, :6])
    assert not torch.are_deterministic_algorithms_enabled()


def test_error_bound_catches_one_rounding_too_many():
    x = torch.tensor([1.0, 2.0, 3.0])
    values = exact(x)
    assert assert_within(x, values, values, 1) == 0
    wrong = torch.nextafter(x, torch.tensor(9.0))
    assert assert_within(wrong, values, values, 2) > 0.5
    with pytest.raises(AssertionError, match=r"times the bound at flat element 0"):
        assert_within(wrong, values, values, 1)
    half = x.half()
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within(torch.nextafter(half, half + 1), values, values, 1)


def test_error_bound_on_nan_and_overflow():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert_within(x, exact(x), np.ones(3), 1)
    with pytest.raises(AssertionError, match="NaN in different places"):
        assert_within(x.nan_to_num(0.0), exact(x), np.ones(3), 1)
    with pytest.raises(AssertionError, match="overflow"):
        assert_within(torch.tensor([-float("inf")]), np.array([float("inf")]), np.ones(1), 1)
    assert_within(torch.tensor([float("inf")], dtype=torch.float16), np.array([1e6]), np.ones(1), 1)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4, 5)])
def test_layouts_hold_the_same_values(shape):
    x = torch.randn(shape)
    found = dict(layouts(x))
    assert all(torch.equal(tensor, x) for tensor in found.values())
    assert len({tensor.stride() for tensor in found.values()}) >= len(shape)
    assert found["unaligned"].data_ptr() % 16
    assert expanded(x).stride(0) == 0


def test_far_apart_is_beyond_32_bits():
    try:
        x = far_apart(2, 3)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the address space: {error}")
    assert x[1].storage_offset() > 2**31 - 1
    assert x.sum() == 0


def two():
    return 2


def fails():
    raise RuntimeError("on purpose")


def test_fresh_process():
    assert run_fresh(two) == 2
    with pytest.raises(AssertionError, match="on purpose"):
        run_fresh(fails)


def narrow_launch():
    import triton
    import triton.language as tl

    @triton.jit
    def narrow(x, y, stride):
        block = tl.program_id(0) * stride + tl.arange(0, 128)
        tl.store(y + block, tl.load(x + block))

    @triton.jit
    def widened_late(x, y, stride):
        block = (tl.program_id(0) * stride).to(tl.int64) + tl.arange(0, 128)
        tl.store(y + block, tl.load(x + block))

    @triton.jit
    def wide(x, y, stride):
        block = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, 128)
        tl.store(y + block, tl.load(x + block))

    @triton.jit
    def spilling(x, y, stride):
        block = tl.arange(0, 8192)
        value = tl.load(x + block * 2)
        tl.store(y + block * 2, value - tl.sum(value))  # 64 values a thread, all needed after the sum

    x = torch.zeros(128 * 128)
    for kernel in (narrow, widened_late, wide):
        kernel[(1,)](x, x, 128)
    spilling[(1,)](x, x, 128, maxnreg=32)


def test_ahead_of_time_checks_catch_narrow_addresses_and_spills():
    pytest.importorskip("triton")
    from helpers.aot import assert_no_spills, assert_wide_addresses, builds

    found = {build.kernel: build for build in builds(narrow_launch, [90])}
    assert_wide_addresses(found["wide"])
    for name in ("narrow", "widened_late"):
        with pytest.raises(AssertionError, match="computes addresses in 32 bits"):
            assert_wide_addresses(found[name])
    assert_no_spills(found["wide"])
    with pytest.raises(AssertionError, match=r"spills \d+ bytes on sm_90"):
        assert_no_spills(found["spilling"])
    assert found["spilling"].shared > 0
