"""Where calls are in a trajectory: what a pipeline says counts, what is guessed errs on the side of computing."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokdyn.trace import trajectory as room
from tokdyn.trace.comparison import SAME, Comparison, InputSeen, Prediction, products, resemblance
from tokdyn.trace.conditioning import conditioning
from tokdyn.trace.observation import main_input
from tokdyn.trace.trajectory import MOST_BRANCHES, Position, Tracker, Trajectory


@pytest.fixture(autouse=True, params=[True, False], ids=["host", "accelerator"])
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every law holds for both ways to compare inputs; that of accelerators runs on the CPU here."""
    monkeypatch.setattr(room, "reads_freely", lambda _: request.param)
    return bool(request.param)


def noise(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def compared(x: torch.Tensor, before: torch.Tensor, predicted: list[torch.Tensor], elements: int = 10**9) -> Comparison:
    """Compare inputs with those before and what was predicted from them."""
    earlier = InputSeen.of(before, elements, on_host=True)
    earlier.predictions += [Prediction.of(each, earlier) for each in predicted]
    return Comparison(InputSeen.of(x, elements, on_host=True), earlier)


def alike(x: torch.Tensor, before: torch.Tensor, predicted: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """(B,) how well inputs are explained, as an accelerator says it."""
    inner = products(x.flatten(1), [before.flatten(1), *(each.flatten(1) for each in predicted)])
    return torch.tensor([resemblance(row)[0] for row in inner[:, 1:].tolist()])


def call(
    trajectory: Trajectory, x: torch.Tensor, *levels: float, text: torch.Tensor | None = None, branch: str | None = None
) -> Position:
    """Observe one call and place it."""
    before, trajectory.branch = trajectory.branch, branch
    arguments = {"hidden_states": x, "timestep": torch.tensor(levels)}
    if text is not None:
        arguments["encoder_hidden_states"] = text
    seen = trajectory.observe(arguments, torch.tensor(levels))
    trajectory.branch = before
    return trajectory.position(seen, len(x))


def test_falling_levels_on_latents_that_resemble_each_other_are_steps_of_one_image() -> None:
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, x, 0.9)
    second = call(trajectory, 0.9 * x + 0.1 * noise(1), 0.8)
    assert second.images == first.images
    assert (first.steps, second.steps) == ((0,), (1,))
    assert first.trajectory == second.trajectory
    assert first.place == second.place == 0


def test_other_latents_begin_another_image_although_the_level_falls() -> None:
    trajectory = Trajectory()
    first = call(trajectory, noise(0), 0.9)
    second = call(trajectory, noise(1), 0.8)
    assert second.images != first.images
    assert second.steps == (0,)
    assert second.trajectory != first.trajectory


def test_a_rising_level_begins_another_image_although_the_latents_are_the_same() -> None:
    trajectory, x = Trajectory(), noise(0)
    first, second = call(trajectory, x, 0.5), call(trajectory, x.clone(), 0.9)
    assert second.images != first.images
    assert second.trajectory != first.trajectory


def test_one_sample_of_a_batch_begins_another_image() -> None:
    trajectory, x = Trajectory(), noise(0, 2)
    first = call(trajectory, x, 0.9, 0.9)
    changed = torch.stack([0.95 * x[0], noise(5)[0]])
    second = call(trajectory, changed, 0.8, 1.0)
    assert second.images[0] == first.images[0]
    assert second.images[1] != first.images[1]
    assert second.steps == (1, 0)
    assert second.trajectory == first.trajectory


def test_branches_are_told_apart_by_what_they_are_conditioned_on() -> None:
    trajectory, x, cond, uncond = Trajectory(), noise(0), noise(1), noise(2)
    seen = []
    for level in (0.9, 0.8, 0.7):
        x = 0.95 * x
        seen.append((call(trajectory, x, level, text=cond), call(trajectory, x, level, text=uncond)))
    conditional, unconditional = zip(*seen, strict=True)
    assert (
        len({position.branch for position in conditional}) == len({position.branch for position in unconditional}) == 1
    )
    assert conditional[0].branch != unconditional[0].branch
    assert [position.place for pair in seen for position in pair] == [0, 1] * 3
    assert [position.steps for position in unconditional] == [(0,), (1,), (2,)]
    assert not any(position.unconditional for position in conditional)
    assert all(position.unconditional for position in unconditional)


def test_another_prompt_on_the_same_latents_takes_nothing_over() -> None:
    """A run is cancelled and begun again with the same seed and another prompt, at the same noise level."""
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, x, 0.6, text=noise(1))
    again = call(trajectory, x.clone(), 0.6, text=noise(2))
    later = call(trajectory, 0.95 * x, 0.5, text=noise(2))
    assert first.branch not in (again.branch, later.branch)
    assert later.branch == again.branch


def test_steps_whose_levels_round_to_one_number_are_steps() -> None:
    trajectory, x = Trajectory(), noise(0)
    positions = [call(trajectory, x + 0.002 * step * noise(step + 1), 0.996) for step in range(4)]
    assert [position.place for position in positions] == [0, 0, 0, 0]
    assert [position.steps for position in positions] == [(0,), (1,), (2,), (3,)]
    assert len({position.branch for position in positions}) == 1


def test_branches_with_latents_of_their_own_are_branches_but_not_the_unconditional_one() -> None:
    """At one level, latents that moved further than rounding explains; in doubt the larger budget is taken."""
    trajectory, x = Trajectory(), noise(0)
    first, second = call(trajectory, x, 0.9), call(trajectory, x + 0.1, 0.9)
    later = call(trajectory, 0.9 * x, 0.8), call(trajectory, 0.9 * x + 0.2, 0.8)
    assert (first.place, second.place) == (0, 1)
    assert first.branch == later[0].branch != second.branch == later[1].branch
    assert not second.unconditional


def test_a_loop_over_one_call_is_no_growing_number_of_branches() -> None:
    trajectory, x = Trajectory(), noise(0)
    branches = {call(trajectory, x, 0.5).branch for _ in range(40)}
    assert len(branches) <= MOST_BRANCHES


def test_names_win_over_guesses() -> None:
    trajectory, x = Trajectory(), noise(0)
    names = [call(trajectory, x, 0.9, branch=name).branch for name in ("uncond", "cond")]
    names += [call(trajectory, 0.9 * x, 0.8, branch=name).branch for name in ("uncond", "cond")]
    assert names == ["uncond", "cond", "uncond", "cond"]


def test_a_pipeline_tells_the_step() -> None:
    """Then neither levels that rise nor latents that are mixed with new noise begin another image."""
    trajectory = Trajectory()
    trajectory.begin()
    trajectory.step = 0
    first = call(trajectory, noise(0), 0.5)
    trajectory.step = 1
    second = call(trajectory, noise(1), 0.9)
    assert second.images == first.images
    assert second.steps == (1,)
    trajectory.begin()
    assert call(trajectory, noise(1), 0.8).images != first.images


def test_a_call_that_nobody_placed_makes_the_next_one_begin_anew() -> None:
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, x, 0.9)
    trajectory.observe({"hidden_states": x, "timestep": torch.tensor([0.8])}, torch.tensor([0.8]))
    assert call(trajectory, x, 0.7).images != first.images


def test_latents_that_are_written_over_are_still_compared() -> None:
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, x, 0.9)
    x.copy_(noise(1))
    assert call(trajectory, x, 0.8).images != first.images


def test_a_sampler_that_writes_over_its_latents_stays_on_one_image() -> None:
    """Between steps the correlation is 0.7."""
    trajectory, x = Trajectory(), noise(0)
    seen = []
    for step, level in enumerate((0.9, 0.8, 0.7, 0.6)):
        seen.append(call(trajectory, x, level))
        x.mul_(0.7).add_(0.7 * noise(step + 1))
    assert len({position.images for position in seen}) == 1
    x.copy_(noise(9))
    assert call(trajectory, x, 0.5).images != seen[-1].images


def test_one_sample_that_is_written_over_leaves_the_others_on_their_images() -> None:
    trajectory, x = Trajectory(), noise(0, 3)
    first = call(trajectory, x, 0.9)
    x.mul_(0.95)[1] = noise(5)[0]
    second = call(trajectory, x, 0.8)
    assert [now == before for now, before in zip(second.images, first.images, strict=True)] == [True, False, True]


def test_the_graph_behind_latents_is_not_kept() -> None:
    class Held:
        pass

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(context, x, held):
            context.held = held
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient, None

    trajectory, held = Trajectory(), Held()
    x = Node.apply(noise(0).requires_grad_(), held)
    alive = weakref.ref(held)
    call(trajectory, x, 0.9)
    trajectory.note(0.9 * x)
    del x, held
    assert alive() is None


def test_a_fork_goes_on_by_itself() -> None:
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, x, 0.9)
    fork = trajectory.fork()
    assert call(fork, 0.95 * x, 0.8).images == first.images
    assert call(fork, noise(3), 0.7).images != first.images
    assert call(trajectory, 0.95 * x, 0.8).images == first.images


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_begins_its_own(duplicate: object) -> None:
    trajectory, x = Trajectory(), noise(0)
    call(trajectory, x, 0.9)
    assert call(duplicate(trajectory), 0.95 * x, 0.8).steps == (0,)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.9, 0.7, 0.5]), st.integers(0, 1)), min_size=1, max_size=12)
)
def test_replaying_observations_places_calls_alike(calls: list[tuple[int, float, int]]) -> None:
    """Statistics place recorded observations anew and must say what the methods were told."""
    trajectory, observations, positions = Trajectory(), [], []
    for seed, level, prompt in calls:
        arguments = {"hidden_states": noise(seed), "timestep": torch.tensor([level]), "text": noise(90 + prompt)}
        observations.append(trajectory.observe(arguments, torch.tensor([level])))
        positions.append(trajectory.position(observations[-1], 1))
    tracker = Tracker()
    assert [tracker.place(each.samples, each.branch, each.step) for each in observations] == positions


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3), st.integers(1, 3))
def test_what_a_sampler_makes_of_latents_and_predictions_resembles_them(
    seed: int, a: float, b: float, batch: int
) -> None:
    x, predicted, other = (noise(seed + i, batch) for i in range(3))
    if abs(b) > 0.1:
        found = alike(a * x + b * predicted, x, [predicted])
        torch.testing.assert_close(found, torch.ones(batch), rtol=0, atol=1e-3)
    assert (alike(other, x, [predicted]) < 0.4).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.integers(1, 3))
def test_resemblance_is_a_correlation_of_what_changed(seed: int, share: float, batch: int) -> None:
    a, b = noise(seed, batch), noise(seed + 1, batch)
    mixed = share * a + (1 - share) * b
    expected = torch.nn.functional.cosine_similarity(mixed.flatten(1), a.flatten(1)).abs()
    torch.testing.assert_close(alike(mixed, a), expected, rtol=0, atol=1e-4)
    assert compared(a, a.clone(), []).read() == [(SAME, 0.0)] * batch
    beside = torch.ones(batch, 4, 8, 8)  # a reference image stays what it is in every step
    both = alike(torch.cat([mixed, beside], 1), torch.cat([a, beside], 1))
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_a_model_whose_predictions_turn_the_latents_away_goes_on(guided: bool) -> None:
    """A step of DDIM at pure noise can leave nothing of its latents; the prediction explains where they went."""
    trajectory, x = Trajectory(), noise(0, 2)
    first = call(trajectory, x, 0.9, 0.9)
    predicted = noise(1, 2)
    trajectory.note((torch.cat([predicted, noise(2, 2)], dim=1),))  # variances lie behind the prediction
    other = predicted.flip(0) if guided else predicted
    second = call(trajectory, x - 5 * predicted + 4 * other, 0.8, 0.8)
    assert second.images == first.images


def test_the_input_is_the_first_latent_and_not_the_level() -> None:
    x, level = noise(0, 2), torch.rand(2, 5)
    assert main_input({"timestep": level, "hidden_states": x, "text": noise(1)}) is x
    stacked = main_input({"x": [noise(0)[0], noise(1)[0]], "t": level})
    assert stacked is not None
    assert stacked.shape == (2, 4, 8, 8)
    assert main_input({"x": [noise(0)[0], torch.zeros(4, 6, 6)]}) is None
    assert main_input({"class_labels": torch.tensor([1, 2])}) is None


def test_conditioning_tells_samples_apart_and_does_not_depend_on_the_input() -> None:
    x, device = noise(0, 2), torch.device("cpu")
    labels = {"x": x, "t": torch.rand(2), "y": torch.tensor([1, 2])}
    one, other = (
        conditioning(labels, 2, device),
        conditioning({**labels, "x": noise(7, 2), "t": torch.rand(2)}, 2, device),
    )
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert conditioning({"x": x}, 2, device).shape == (2, 0)


def test_an_observation_without_a_call_is_a_new_image() -> None:
    trajectory = Trajectory()
    positions = [trajectory.position(None, 2) for _ in range(2)]
    assert positions[0].images != positions[1].images
    assert positions[1].steps == (0, 0)


def test_placing_a_call_needs_one_transfer(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_host:
        pytest.skip("the host reads its own memory")
    trajectory, x, counted = Trajectory(), noise(0, 2), []
    call(trajectory, x, 0.5, 0.5, text=noise(1, 2))
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: counted.append(1) or tolist(self))
    call(trajectory, 0.9 * x, 0.4, 0.4, text=noise(1, 2))
    assert len(counted) == 1


def test_calls_of_a_told_step_may_differ_in_their_number_of_samples() -> None:
    """As under skip-layer guidance, where a third call has one branch: the images of both stay the same."""
    trajectory, x = Trajectory(), noise(0, 2)
    trajectory.begin(4)
    found = []
    for trajectory.step in range(1, 4):
        found.append(call(trajectory, x, 0.5, 0.5, branch="both"))
        found.append(call(trajectory, x[:1], 0.5, branch="perturbed"))
    assert [each.place for each in found] == [0, 1] * 3
    assert [each.steps for each in found] == [(1, 1), (1,), (2, 2), (2,), (3, 3), (3,)]
    assert len({each.images for each in found}) == 2
    assert len({each.trajectory for each in found}) == 1
    assert not any(each.unconditional for each in found)
    trajectory.begin(4)
    trajectory.step = 1
    assert call(trajectory, x, 0.5, 0.5, branch="both").images not in {each.images for each in found}


def test_a_call_that_leaves_something_out_is_a_perturbed_branch() -> None:
    trajectory, x = Trajectory(), noise(0)
    for more, name in (({}, None), ({"skip_layers": []}, None), ({"skip_layers": [1]}, "perturbed")):
        seen = trajectory.observe({"hidden_states": x, "timestep": torch.ones(1), **more}, torch.ones(1))
        assert (seen.branch, trajectory.name(seen)) == (name, name)


def test_parts_are_asked_for() -> None:
    trajectory, x = Trajectory(), noise(0, 2)
    trajectory.asks = lambda branch, given: ("uncond", "cond") if given is x else branch
    seen = trajectory.observe({"hidden_states": x, "timestep": torch.ones(1)}, torch.ones(1))
    assert (seen.parts, trajectory.name(seen)) == (("uncond", "cond"), None)
    assert trajectory.position(seen, 2).branch == ("uncond", "cond")
    trajectory.branch = "pred_cond"
    seen = trajectory.observe({"hidden_states": x.clone(), "timestep": torch.ones(1)}, torch.ones(1))
    assert (seen.parts, trajectory.name(seen)) == (None, "cond")


def test_a_branch_of_another_size_in_the_first_step_begins_no_trajectory() -> None:
    """LTX-2 calls for both branches in one batch, and then for one that is perturbed; its first step is not told."""
    trajectory, x = Trajectory(), noise(0)
    both = call(trajectory, torch.cat([x, x]), 1.0, 1.0, branch="cond_uncond")
    perturbed, again = (call(trajectory, x, 1.0, branch=name) for name in ("uncond_stg", "uncond_modality"))
    assert both.trajectory == perturbed.trajectory == again.trajectory
    assert [each.place for each in (both, perturbed, again)] == [0, 1, 2]
    trajectory.step = 1
    later = call(trajectory, torch.cat([x, x]), 0.8, 0.8, branch="cond_uncond")
    assert later.images == both.images
    assert later.trajectory == both.trajectory


def test_a_batch_of_another_size_with_the_name_of_a_branch_before_begins_a_trajectory() -> None:
    trajectory, x = Trajectory(), noise(0)
    first = call(trajectory, torch.cat([x, x]), 1.0, 1.0, branch="cond")
    assert call(trajectory, x, 1.0, branch="cond").trajectory != first.trajectory
