"""Hooks that move weights, attached before and after wrapping: the outputs are those without hooks, bit for bit.

Every adapter is offloaded in two ways with a stack of methods whose blocks are skipped and cached; all methods are
tried on PixArt, whose blocks have weights of every kind, and all ways on one stack. Offloading to a disk leaves nothing
of the weights in memory, and deterministic mode fills what is left with NaN, so that a weight that is used while it is
away cannot go untraced on a machine without an accelerator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from torch import nn

import tokdyn
from tests.contract.ecosystem import FEW, LEVELS, MODELS, SAMPLING, equip, predict, stack_of, trajectory
from tests.contract.models import TINY
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, DepthSkip, FeatureCache

CPU = torch.device("cpu")
PIXART = "PixArtTransformer2DModel"
EVERYWHERE = [
    (name, stack_of(name), ("two", "cpu_offload")[:: 1 if place % 2 else -1])
    for place, name in enumerate(MODELS)
    if not name.startswith("Aura")
]
CASES = [
    *EVERYWHERE,
    *((PIXART, stack, ("two", "leaf", "cpu_offload")) for stack in SAMPLING if stack != "stack"),
    (PIXART, "levels", ("align", "model_offload", "one")),
    ("DiT", "stack", ("align", "model_offload", "one", "leaf")),
]
Attach = Callable[[nn.Module, Any], None]


def align(model: nn.Module, folder: Any) -> None:
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook(CPU, io_same_device=True))


def group_offload(kind: str, blocks: int | None) -> Attach:
    def attach(model: nn.Module, folder: Any) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model,
            onload_device=CPU,
            offload_device=CPU,
            offload_type=kind,
            num_blocks_per_group=blocks,
            offload_to_disk_path=str(folder),
            low_cpu_mem_usage=True,
        )

    return attach


WAYS: dict[str, Attach] = {
    "align": align,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "model_offload": lambda model, folder: cpu_offload_with_hook(model, execution_device=CPU) and None,
    "one": group_offload("block_level", 1),
    "two": group_offload("block_level", 2),
    "leaf": group_offload("leaf_level", None),
}


@pytest.fixture(autouse=True)
def nothing_stale() -> Iterator[None]:
    """New tensors hold NaN until something is written into them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def works_alone(name: str, way: str) -> bool:
    """The output stage of diffusers' DiT uses the weights of a block when that block is over and they are gone."""
    return not (name == "DiTTransformer2DModel" and way in ("one", "two"))


@pytest.mark.parametrize(("name", "stack", "ways"), CASES)
def test_hooks_change_nothing_whether_they_come_before_or_after(
    name: str, stack: str, ways: tuple[str, ...], tmp_path: Any
) -> None:
    """One way comes before and the next after; on PixArt and DiT each comes as both."""
    plain = predict(TINY[name].build(), name)
    expected = trajectory(equip(TINY[name].build(), stack), name)
    for place, way in enumerate(ways):
        if not works_alone(name, way):
            continue
        for early in (True, False) if name in (PIXART, "DiT") else (place % 2 == 0,):
            model = TINY[name].build()
            if not early:
                equip(model, stack)
            WAYS[way](model, tmp_path / f"{way} {early}")
            if early:
                equip(model, stack)
            assert torch.equal(trajectory(model, name), expected), way
            assert torch.equal(predict(tokdyn.unwrap(model), name), plain), way


@pytest.mark.parametrize("name", FEW)
def test_hooks_are_removed_in_either_order(name: str) -> None:
    plain = trajectory(TINY[name].build(), name)
    for hooks_first, unwrap_first in product((True, False), repeat=2):
        model = TINY[name].build()
        if hooks_first:
            align(model, None)
        equip(model, "stack")
        if not hooks_first:
            align(model, None)
        with tokdyn.disabled(model):
            assert torch.equal(trajectory(model, name), plain)
        if unwrap_first:
            tokdyn.unwrap(model)
        remove_hook_from_submodules(model)
        if not unwrap_first:
            assert torch.equal(trajectory(model, name), trajectory(equip(TINY[name].build(), "stack"), name))
            tokdyn.unwrap(model)
        assert torch.equal(trajectory(model, name), plain)
        assert torch.equal(trajectory(equip(model, "skip"), name), trajectory(equip(TINY[name].build(), "skip"), name))


def test_hooks_of_users_are_called_in_the_order_of_the_blocks() -> None:
    class Note(ModelHook):
        def __init__(self, block: int) -> None:
            self.block = block

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.block)
            return args, kwargs

    seen: list[int] = []
    model = equip(TINY["DiT"].build(), [DepthSkip(blocks=(1,))])
    for number, block in enumerate(model.blocks):
        add_hook_to_module(block, Note(number))
    predict(model, "DiT")
    assert seen == [0, 2, 3]
    for block in model.blocks:
        remove_hook_from_module(block)
    predict(tokdyn.unwrap(model), "DiT")
    assert seen == [0, 2, 3]


@pytest.mark.parametrize("name", FEW)
def test_a_group_of_blocks_is_there_again_for_the_next_samples(name: str, tmp_path: Any) -> None:
    """Samples with other budgets are computed apart, so the last block of a group runs twice."""
    model = equip(TINY[name].build(), "chunk")
    tokdyn.set_tail_drop(model, torch.tensor([0.0, 0.6]))
    expected = trajectory(model, name)
    group_offload("block_level", 2)(model, tmp_path)
    assert torch.equal(trajectory(model, name), expected)


def test_weights_that_were_brought_ahead_for_a_skipped_block_are_taken_away(tmp_path: Any) -> None:
    """With streams a block brings the weights of the next one; set by hand here, since streams need an accelerator."""
    name = "DiT"
    model = equip(TINY[name].build(), "skip")
    expected = trajectory(model, name)
    group_offload("block_level", 1)(model, tmp_path)
    hooks = [block._diffusers_hook.get_hook("group_offloading") for block in model.blocks]
    for hook, following in pairwise(hooks):
        hook.next_group, following.group.onload_self = following.group, False
    assert torch.equal(trajectory(model, name), expected)
    assert all(parameter.isnan().all() for block in model.blocks for parameter in block.parameters())


def test_skipped_blocks_are_not_brought(tmp_path: Any) -> None:
    model = equip(TINY["DiT"].build(), [FeatureCache(steps=(0,))])
    group_offload("block_level", 1)(model, tmp_path)
    brought = []
    for number, block in enumerate(model.blocks):
        group = block._diffusers_hook.get_hook("group_offloading").group
        group.onload_ = lambda number=number, load=group.onload_: brought.append(number) or load()
    trajectory(model, "DiT")
    assert brought == [0, 1, 2, 3]  # the first of three steps


def test_casting_of_weights_in_storage_leaves_the_parts_of_methods_alone() -> None:
    """Weights of the model lose what fp8 cannot hold, before or after wrapping; routers decide in full precision."""
    name, outputs = "FluxTransformer2DModel", []
    for first in (True, False):
        model = TINY[name].build()
        if not first:
            equip(model, "stack")
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        if first:
            equip(model, "stack")
        outputs.append(trajectory(model, name))
        assert {parameter.dtype for parameter in model.tokdyn.parameters()} == {torch.float32}
        assert torch.float8_e4m3fn in {parameter.dtype for parameter in model.parameters()}
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], trajectory(equip(TINY[name].build(), "stack"), name))


def test_what_cannot_be_done_while_weights_are_away_is_named(tmp_path: Any) -> None:
    for way in ("cpu_offload", "leaf"):
        model = equip(TINY["DiT"].build(), [Chunking(target=2)])
        WAYS[way](model, tmp_path / way)
        with pytest.raises(InputError, match="calibrate_router"):
            tokdyn.calibrate_router(model, **TINY["DiT"].inputs(2))
        with pytest.raises(InputError, match=r"tokdyn\.save"):
            tokdyn.save(model, tmp_path / "methods")
    model = TINY["DiT"].build()
    cpu_offload(model, execution_device=CPU)
    equip(model, [Chunking(target=2)])  # attached later, its parts stay where they are
    tokdyn.calibrate_router(model, **TINY["DiT"].inputs(2))
    tokdyn.save(model, tmp_path / "methods")


def test_a_copy_of_an_offloaded_model_computes_alone() -> None:
    """accelerate's hooks copy with the model; the copy has the same outputs and its own weights."""
    model = equip(TINY["DiT"].build(), "stack")
    align(model, None)
    expected = trajectory(model, "DiT")
    twin = copy.deepcopy(model)
    remove_hook_from_submodules(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(trajectory(twin, "DiT"), expected)
    assert len(LEVELS) == len(expected)
