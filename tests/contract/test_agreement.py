"""Processes that wait for each other decide alike which steps FeatureCache caches.

By default the processes are two threads of this one with gloo between them. The slow tests start two processes:
diffusers splits the tokens of models between them, and fully_shard splits their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokdyn
from tests.contract.agreement_worker import CACHES, SPLIT, run
from tests.contract.models import TINY
from tests.processes import launch
from tokdyn import DepthSkip, FeatureCache, TokenMerge
from tokdyn.errors import InputError
from tokdyn.ops.caching import relative_change
from tokdyn.trace.agreement import Ranks

CPU = torch.device("cpu")
WORKER = Path(__file__).parent / "agreement_worker.py"


def on_two_ranks(work: Callable[[int, Any], Any]) -> list[Any]:
    """What `work(rank, group)` returns in each of two threads."""
    store = dist.HashStore()

    def start(rank: int) -> Any:
        return work(rank, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60)))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, range(2)))


def test_branches_on_two_ranks_cache_the_same_steps() -> None:
    """Each rank has a class of its own, and the latents of both move by other amounts in every step."""

    def decide(rank: int, group: Any, agreed: bool) -> list[list[int]]:
        model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)])
        if agreed:
            tokdyn.agree(model, group)
        return run(model, "DiT", rank, batch=2)

    apart = on_two_ranks(lambda rank, group: decide(rank, group, agreed=False))
    assert apart[0] != apart[1]  # where the blocks of both exchange something, one would wait forever
    first, second = on_two_ranks(lambda rank, group: decide(rank, group, agreed=True))
    assert first == second
    assert any(first)
    for step, samples in enumerate(apart[0]):
        if samples != apart[1][step]:  # the first difference: what only one would have reused is computed
            assert set(first[step]) == set(samples) & set(apart[1][step])
            break


@pytest.mark.parametrize("batches", [(1, 2), (63, 64), (100, 3)])
def test_ranks_whose_batches_differ_are_all_told_so(batches: tuple[int, int]) -> None:
    """None waits for the other, none goes on, and with equal batches both do."""

    def call(rank: int, group: Any) -> list[Any]:
        found: list[Any] = []
        for batch in (batches[rank], max(batches)):
            try:
                found.append(Ranks(others=group).all_of([(rank + place) % 3 > 0 for place in range(batch)], CPU))
            except InputError as error:
                found.append(str(error))
        return found

    first, second = on_two_ranks(call)
    assert first == second
    assert f"{min(batches)} to {max(batches)} samples" in first[0]
    assert first[1] == [place % 3 == 1 for place in range(max(batches))]


def test_a_model_refuses_a_batch_that_the_other_rank_has_not() -> None:
    def call(rank: int, group: Any) -> str:
        model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)])
        tokdyn.agree(model, group)
        with pytest.raises(InputError, match=r"tokdyn\.agree.* 1 to 2 samples") as raised:
            run(model, "DiT", rank, batch=1 + rank)
        return str(raised.value)

    assert len(set(on_two_ranks(call))) == 1


def test_the_change_of_split_tokens_is_that_of_all() -> None:
    before, now = torch.randn(3, 10, 4), torch.randn(3, 10, 4)

    halves = [(now[:, :5], before[:, :5]), (now[:, 5:], before[:, 5:])]
    found = on_two_ranks(lambda rank, group: relative_change(*halves[rank], Ranks(tokens=group).total))
    for each in found:
        torch.testing.assert_close(each, relative_change(now, before), rtol=1e-6, atol=0)  # the order of fp32 sums
    assert torch.equal(*found)
    assert not torch.allclose(relative_change(*halves[0]), relative_change(*halves[1]), rtol=1e-3)


def test_agreement_belongs_to_copies_and_can_be_ended() -> None:
    def decide(rank: int, group: Any) -> list[list[list[int]]]:
        model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)])
        tokdyn.agree(model, group)
        copied = run(deepcopy(model), "DiT", rank, batch=2)
        tokdyn.agree(model, None)
        return [copied, run(model, "DiT", rank, batch=2)]

    first, second = on_two_ranks(decide)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_agreement_needs_a_cache_and_a_group() -> None:
    with pytest.raises(InputError, match=r"DiT .*FeatureCache"):
        tokdyn.agree(tokdyn.wrap(TINY["DiT"].build(), [DepthSkip(blocks=(1,))]), object())
    with pytest.raises(InputError, match="FeatureCache"):  # matchings of earlier steps are no cached steps
        tokdyn.agree(tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(reuse_steps=2)]), object())
    with pytest.raises(InputError, match="group is 3"):
        tokdyn.agree(tokdyn.wrap(TINY["DiT"].build(), [FeatureCache()]), 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("agreement")
    launch(WORKER, str(folder), timeout=900)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("batch", [1, 2])
def test_split_tokens_are_cached_as_in_one_process(
    name: str, cache: str, batch: int, found: list[dict[str, Any]]
) -> None:
    """diffusers' context parallelism: both processes reuse what one process would, and their outputs are its outputs.

    Samples of models that split their tokens in the first block are only reused together.
    """
    split, other = (each[f"{name} {cache} {batch}"] for each in found)
    assert split["reused"] == other["reused"]
    assert torch.equal(split["outputs"], other["outputs"])
    assert 0 < len([samples for samples in split["reused"] if samples]) < len(split["reused"])
    if (name, cache, batch) in ((SPLIT[1], "input", 2), (SPLIT[2], "input", 2)):
        assert all(samples in ([], [0, 1]) for samples in split["reused"])
        return
    model, outputs = tokdyn.wrap(TINY[name].build(), [CACHES[cache]]), []
    assert run(model, name, 0, batch=batch, outputs=outputs) == split["reused"]
    torch.testing.assert_close(split["outputs"], torch.stack(outputs), rtol=0, atol=2e-6)  # fp32, about 1 in size


@pytest.mark.slow
def test_processes_that_do_not_agree_wait_for_each_other(found: list[dict[str, Any]]) -> None:
    assert {each["alone"] for each in found} != {"finished"}
    assert [each["agreed"] for each in found] == ["finished"] * 2


@pytest.mark.slow
def test_sharded_weights_take_a_cache_that_agrees(found: list[dict[str, Any]]) -> None:
    first, second = (each["sharded"] for each in found)
    assert first["refused"].startswith("FeatureCache ")
    assert first["reused"] == second["reused"]
    assert any(first["reused"])
