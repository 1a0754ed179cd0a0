"""What a cache remembers of effects: sample by sample, in a bounded window, in fewer bits and on the host."""

import pytest
import torch

from tokdyn.trace.effects import WINDOW, Effect, Remembering
from tokdyn.trace.storage import Storage


def remembered(forecast, dtype=None, device=None):
    return Effect(Remembering.of(forecast, dtype, device))


def effects(batch, seed=0):
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(seed))


def played(effect, steps):
    """The effects after steps (new, levels, reused); a sample is fresh in its first."""
    for step, (new, levels, reused) in enumerate(steps):
        effect = effect.updated(new, levels, reused, [step == 0] * len(levels))
    return effect


@pytest.mark.parametrize("forecast", [0, 1, 2, "chebyshev"])
def test_each_sample_has_the_history_that_it_would_have_alone(forecast):
    generator, steps = torch.Generator().manual_seed(0), []
    for step in range(32):
        level = 1 - 0.02 * step
        reused = [step > 0 and bool(flag) for flag in torch.rand(3, generator=generator) < 0.5]
        steps.append((effects(3, step), [level, level - 0.01, level - 0.02], reused))
    together = played(remembered(forecast), steps)
    levels = [0.36, 0.35, 0.34]
    found = together.at(levels, effects(3))
    for sample in range(3):
        own = [
            (new[sample : sample + 1], level[sample : sample + 1], [False])
            for new, level, reused in steps
            if not reused[sample]
        ]
        alone = played(remembered(forecast), own).at(levels[sample : sample + 1], effects(1))
        torch.testing.assert_close(found[sample], alone[0], rtol=1e-5, atol=1e-5)  # the order of fp32 sums
    assert len(together.slots) == {0: 1, 1: 2, 2: 3, "chebyshev": WINDOW}[forecast]
    assert together.nbytes == len(together.slots) * effects(3).nbytes


def test_a_sample_that_begins_another_image_forgets_its_own_effects_only():
    steps = [(effects(2, step), [1 - 0.1 * step] * 2, [False, False]) for step in range(3)]
    before = played(remembered(2), steps)
    after = before.updated(effects(2, 9), [0.9, 0.6], [False, False], [True, False])
    torch.testing.assert_close(after.at([0.5, 0.5], effects(2))[0], effects(2, 9)[0])
    expected = before.updated(effects(2, 9), [0.6, 0.6], [False, False], [False, False]).at([0.5, 0.5], effects(2))
    torch.testing.assert_close(after.at([0.5, 0.5], effects(2))[1], expected[1])
    assert not torch.allclose(expected[1], effects(2, 9)[1])


def test_updates_leave_earlier_memories_as_they_were():
    """Memories are forked where a call is only tried."""
    first = played(remembered(0), [(effects(2, 0), [0.9, 0.9], [False, False])])
    second = first.updated(effects(2, 1), [0.8, 0.8], [True, False], [False, False])
    assert torch.equal(first.at([0.5, 0.5], effects(2)), effects(2, 0))
    assert torch.equal(second.at([0.5, 0.5], effects(2)), torch.stack([effects(2, 0)[0], effects(2, 1)[1]]))


def test_a_second_call_at_one_level_takes_the_place_of_the_first():
    steps = [(effects(1, step), [level], [False]) for step, level in enumerate((0.9, 0.7, 0.7))]
    out = played(remembered(1), steps).at([0.5], effects(1))
    torch.testing.assert_close(out, 2 * effects(1, 2) - effects(1, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "rounding", "share"),
    [("float32", 0.0, 1.0), ("float16", 2**-11, 0.5), ("bfloat16", 2**-8, 0.5), ("float8_e4m3fn", 2**-4, 0.25)],
)
def test_fewer_bits_round_effects_by_half_a_unit_of_their_type(dtype, rounding, share):
    """Elements are rounded by `rounding` of themselves, and tiny ones by that of the smallest normal number.

    Tokens of very different sizes keep that precision, also beyond the range of fp16 and fp8.
    """
    new = effects(2) * torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6])[:, None]
    effect = played(remembered(0, dtype), [(new, [0.9, 0.9], [False, False])])
    out = effect.at([0.5, 0.5], new)
    assert out.dtype == new.dtype
    largest = new.abs().amax(-1, keepdim=True)
    smallest = largest * torch.finfo(getattr(torch, dtype)).tiny / torch.finfo(getattr(torch, dtype)).max
    assert ((out - new).abs() <= 1.01 * rounding * torch.maximum(new.abs(), smallest)).all()
    assert (out == new).all() == (dtype == "float32")
    scales = 0 if dtype in ("float32", "bfloat16") else 4 * new[..., 0].numel()
    assert effect.nbytes == share * new.nbytes + scales


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float8_e4m3fn"])
def test_what_stays_of_a_batch_is_not_rounded_again(dtype):
    first = played(remembered(0, dtype), [(effects(2, 0), [0.9, 0.9], [False, False])])
    kept = first.at([0.5, 0.5], effects(2))[0]
    for step in range(1, 6):
        first = first.updated(effects(2, step), [0.8, 0.8], [True, False], [False, False])
        torch.testing.assert_close(first.at([0.5, 0.5], effects(2))[0], kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_tensors_on_the_host_are_the_same(dtype):
    """On the CPU both are one memory."""
    x = effects(2)
    kind = None if dtype is None else getattr(torch, dtype)
    assert torch.equal(Storage(kind, host=True).store(x).load(x), Storage(kind).store(x).load(x))
