"""Groups of channels, masks and the FLOPs of dynamic width, against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.ops.width import flops_loss, flops_share, group_sizes, kept_channels, spread, with_text


@given(st.integers(1, 5000), st.integers(1, 40))
def test_groups_are_as_equal_as_possible(channels, groups):
    sizes = group_sizes(channels, groups)
    assert len(sizes) == groups
    assert sum(sizes) == channels
    step = 8 if channels >= 16 * groups else 1
    assert max(sizes) - min(sizes) <= 2 * step - 1
    assert sum(size % step for size in sizes[:-1]) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=8))
def test_kept_channels_and_spread_masks_equal_a_loop(groups):
    on, sizes = zip(*groups, strict=True)
    expected, start = [], 0
    for there, size in groups:
        expected += range(start, start + size) if there else []
        start += size
    assert kept_channels(on, sizes).tolist() == expected
    assert kept_channels(on, sizes).dtype == torch.int64
    mask = spread(torch.tensor([on, [not there for there in on]]).float(), sizes)
    assert mask.shape == (2, start)
    assert mask[0].nonzero().flatten().tolist() == expected
    assert torch.equal(mask.sum(0), torch.ones(start))


@pytest.mark.parametrize(("place", "expected"), [("first", [0, 0, 1]), ("last", [1, 0, 0])])
def test_text_tokens_are_always_on(place, expected):
    assert with_text(torch.zeros(2, 2), 1, place).tolist() == [expected] * 2
    image = torch.zeros(2, 2)
    assert with_text(image, 0, place) is image


def test_the_share_of_flops_equals_a_loop_and_ignores_skipped_blocks():
    generator = torch.Generator().manual_seed(0)
    heads, channels, tokens, attention, mlp = torch.rand(5, 3, 4, generator=generator, dtype=torch.float64)
    attention[1, 2] = mlp[1, 2] = 0
    attention[2], mlp[2] = 0, 0
    found = flops_share(heads, channels, tokens, attention, mlp)
    for sample in range(2):
        ran = sum(
            attention[sample, block] * heads[sample, block]
            + mlp[sample, block] * channels[sample, block] * tokens[sample, block]
            for block in range(4)
        )
        torch.testing.assert_close(found[sample], ran / (attention[sample].sum() + mlp[sample].sum()))
    assert found[2] == 0  # no block ran
    ones = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(flops_share(ones, ones, ones, attention, mlp)[:2], ones[:2, 0])


def test_the_loss_pulls_the_mean_share_to_the_target():
    share = torch.tensor([0.4, 0.8], requires_grad=True)
    flops_loss(share, 0.6).backward()
    assert share.grad.tolist() == pytest.approx([0.0, 0.0])
    share.grad = None
    loss = flops_loss(share, torch.tensor(0.5))
    loss.backward()
    assert loss.item() == pytest.approx(2 * 0.1**2)
    assert share.grad.tolist() == pytest.approx([0.2, 0.2])  # 4 (r - target) / B
