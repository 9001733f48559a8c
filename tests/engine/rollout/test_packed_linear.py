"""Linears laid out for decoding: the values of the linears themselves, whatever the layout."""

import pytest
import torch
from torch import nn

from engine.rollout.packed_linear import BlockedLinear, packed


def linears(*, bias: bool, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(48, width, bias=bias, dtype=dtype) for width in (32, 7, 65)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
def test_one_product_is_the_linears_side_by_side(bias, dtype, tolerance):
    modules = linears(bias=bias, dtype=dtype)
    together = BlockedLinear(*modules, rows=5)
    for rows in (5, 1, 70):
        x = torch.randn(rows, 48, dtype=dtype)
        wanted = torch.cat([m.double()(x.double()) for m in linears(bias=bias, dtype=dtype)], 1)
        got = together(x)
        assert got.dtype == dtype and got.shape == (rows, 104)
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


def test_fp32_weights_are_laid_out_anew_on_this_machine():
    """Else the speed that they are laid out for is not there; CI's machines are x86."""
    assert BlockedLinear(*linears(bias=True, dtype=torch.float32), rows=5)._weight.is_mkldnn


def test_a_blocked_linear_keeps_the_weights_it_was_made_from():
    modules = linears(bias=True, dtype=torch.float32)
    together = BlockedLinear(*modules, rows=5)
    x = torch.randn(5, 48)
    before = together(x)
    with torch.no_grad():
        for module in modules:
            module.weight.add_(1)
    assert torch.equal(together(x), before)
    assert not torch.allclose(BlockedLinear(*modules, rows=5)(x), before)


def test_packed_weights_follow_their_parameters():
    modules = linears(bias=True, dtype=torch.float32)
    weight, bias = packed(*modules)
    with torch.no_grad():
        for module in modules:
            module.weight.mul_(2)
            module.bias.add_(1)
    assert torch.equal(weight, torch.cat([m.weight for m in modules]))
    assert torch.equal(bias, torch.cat([m.bias for m in modules]))
    assert packed(*modules)[0].data_ptr() == weight.data_ptr()
