"""The playground of a class-conditional model: its pictures, maps and costs are those of `tokdyn sample`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.sampling import FACTS, QUICK, tiny
from tokdyn import DiT
from tokdyn.diffusion.sampling import generate
from tokdyn.errors import InputError, RecipeError, TokdynError
from tokdyn.playground.classes import ClassStudio
from tokdyn.playground.scene import Drawn, Sketch
from tokdyn.playground.settings import PlaygroundConfig, Wanted
from tokdyn.playground.studio import scenes
from tokdyn.report.pixels import to_pixels
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.train.snapshot import save_model

ASKED = {"subject": "bear", "seed": 5, "steps": 3, "guidance": 2.0}
CACHE = "[{method: FeatureCache, steps: [0, 2]}]"


@pytest.fixture
def dense(tmp_path):
    """A DiT, which computes every token."""
    save_model(tiny(0, DiT, depth=2), tmp_path / "dit", FACTS)
    return tmp_path / "dit"


def opened(folder: Any, **settings: Any) -> ClassStudio:
    return ClassStudio(PlaygroundConfig(model=str(folder), **{**QUICK, **settings}))


def last(studio: ClassStudio, **asked: Any) -> Any:
    *_, scene = scenes(studio, Wanted(**{**ASKED, **asked}))
    return scene


def test_picture_and_costs_are_those_of_tokdyn_sample(saved, tmp_path):
    scene = last(opened(saved), tail_drop=0.5, uncond_tail_drop=0.9)
    same = SampleConfig(
        model=str(saved), out=tmp_path / "o", format="npz", count=1, classes=("bear",), seed=5, guidance=2.0,
        tail_drop=(0.5,), uncond_tail_drop=0.9, **QUICK,
    )  # fmt: skip
    (budget,) = sample(same).budgets
    assert np.array_equal(scene.drawn.picture, np.load(tmp_path / "o" / "samples.npz")["arr_0"][0])
    assert scene.drawn.gflops == pytest.approx(1e3 * budget.tflops_per_image)
    assert scene.drawn.kept == pytest.approx(budget.kept)
    assert scene.drawn.seconds > 0
    full = last(opened(saved))
    assert np.array_equal(scene.beside.picture, full.drawn.picture)
    assert scene.beside.gflops > scene.drawn.gflops
    assert full.beside is full.drawn  # nothing is drawn twice


def test_every_step_is_shown_with_what_the_router_keeps(saved):
    wanted = Wanted(**ASKED, tail_drop=0.5)
    sketches = [scene.drawn for scene in scenes(opened(saved), wanted) if isinstance(scene.drawn, Sketch)]
    model, objective, _ = load_model(saved)
    steps: list[Any] = []
    sampler = SampleConfig(model="", guidance=2.0, **QUICK).sampler(0.5, clip=True)
    generate(model, sampler, objective, [1], [5], callback=steps.append)
    assert [sketch.step for sketch in sketches] == [1, 2, 3]
    for sketch, step in zip(sketches, steps, strict=True):
        assert sketch.level == step.level
        assert np.array_equal(sketch.picture, to_pixels(step.x0())[0])
        assert np.array_equal(sketch.keep.ravel(), step.keep()[0].numpy())
    assert not np.array_equal(sketches[0].picture, sketches[-1].picture)


def test_fewer_steps_are_shown_if_asked_for(saved):
    studio = opened(saved, shown=2)
    sketches = [s.drawn for s in scenes(studio, Wanted(**{**ASKED, "steps": 9})) if isinstance(s.drawn, Sketch)]
    assert [sketch.step for sketch in sketches] == [1, 9]


def test_methods_act_and_are_gone_afterwards(dense):
    studio, plain = opened(dense), last(opened(dense)).drawn
    scene = last(studio, methods=CACHE)
    assert scene.drawn.cached == 1
    assert scene.drawn.gflops < scene.beside.gflops == pytest.approx(plain.gflops)
    assert np.array_equal(scene.beside.picture, plain.picture)
    assert not np.array_equal(scene.drawn.picture, plain.picture)
    merged = last(studio, methods="merge")
    assert merged.drawn.keep.shape == (6, 8)
    assert 0 < merged.drawn.keep.sum() < 48
    assert np.array_equal(last(studio).drawn.picture, plain.picture)


def test_a_cancelled_picture_leaves_the_model_as_it_was(saved):
    studio, expected = opened(saved), last(opened(saved), methods=CACHE)
    for place in (1, 2):
        drawing = scenes(studio, Wanted(**ASKED, tail_drop=0.7, methods=CACHE))
        for _ in range(place):
            next(drawing)
        drawing.close()
        again = last(studio, methods=CACHE)  # waits until the model is as before
        assert np.array_equal(again.drawn.picture, expected.drawn.picture)
        assert np.array_equal(again.beside.picture, expected.beside.picture)
        assert (again.drawn.cached, again.drawn.gflops) == (expected.drawn.cached, expected.drawn.gflops)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"subject": "wolf"}, "wolf"),
        ({"methods": "[{method: TokenMrge}]"}, "TokenMerge"),
        ({"methods": "[{method: TokenMerge, ratoi: 0.3}]"}, "ratoi"),
        ({"methods": "[{method: TokenMerge"}, "YAML"),
        ({"methods": "nowhere"}, "preset"),
        ({"methods": "{transformer: [{method: skip}]}"}, "pipelines"),
        ({"tail_drop": 0.5}, "tail_drop"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_leaves_the_model_as_it_was(dense, asked, named):
    studio = opened(dense)
    with pytest.raises(TokdynError, match=named) as raised:
        last(studio, **asked)
    assert str(raised.value).count("\n") == 0
    assert np.array_equal(last(studio).drawn.picture, last(opened(dense)).drawn.picture)


def test_trained_methods_stay_and_take_a_budget(tmp_path):
    import tokdyn
    from tokdyn import Chunking
    from tokdyn.train.snapshot import METHODS

    model = tiny(0, DiT, depth=2)
    save_model(model, tmp_path / "run" / "model", FACTS)
    tokdyn.save(tokdyn.wrap(model, [Chunking(target=2)]), tmp_path / "run" / "model" / METHODS)
    studio = opened(tmp_path / "run")
    assert studio.offer.budgets
    scene = last(studio, tail_drop=0.5, methods="[{method: merge, bucket: 6}]")
    lean = last(studio, tail_drop=0.5)
    assert (lean.drawn.keep.sum(), lean.beside.keep.sum()) == (12, 24)  # the budget of one is not that of the next
    full = last(studio)
    assert full.drawn.keep.sum() == 24
    assert scene.drawn.keep.sum() < 12
    assert np.array_equal(scene.beside.picture, full.drawn.picture)
    assert np.array_equal(full.drawn.picture, last(opened(tmp_path / "run")).drawn.picture)


def test_a_page_begins_with_the_settings(saved):
    offer = opened(saved, seed=3, guidance=1.5, tail_drop=0.25, methods="merge").offer
    assert offer.subjects[:4] == ("apple", "bear", "car", "dog")
    begin = offer.begin
    assert (begin.subject, begin.seed, begin.steps, begin.guidance) == ("apple", 3, 3, 1.5)
    assert (begin.tail_drop, begin.methods) == (0.25, "merge")
    assert not Wanted(subject="x", uncond_tail_drop=0.5).reduces  # there is no such branch without guidance
    assert isinstance(last(opened(saved), subject="none").drawn, Drawn)


def test_a_model_is_refused_as_by_tokdyn_sample(saved):
    with pytest.raises(InputError):
        opened(saved, device="cuda:99")
    with pytest.raises(RecipeError):
        opened(saved, vae="somewhere")
