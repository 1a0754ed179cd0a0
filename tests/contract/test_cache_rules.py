"""FeatureCache's rules against plain loops over recorded trajectories, written from the formulas of their papers."""

import itertools
import math

import pytest
import torch

import tokdyn
from tests.contract.coverage_images import IMAGES
from tests.contract.coverage_videos import VIDEOS
from tests.contract.models import TINY, sample
from tests.contract.test_trajectories import latents_name
from tokdyn import FeatureCache
from tokdyn.adapters import adapter_for
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import TEACACHE_FLUX

STEPS = 12
RATIOS = (1.0, 1.21, 1.12, 1.06, 1.04, 1.03, 1.02, 1.01, 0.99, 0.98, 0.96, 0.91, 0.84, 0.75)
BRANCHES = ("cond", "uncond")


def levels(steps=STEPS):
    return [1 - step / (steps + 1) for step in range(steps)]


def inputs_of(name, steps=STEPS, batch=2, seed=3):
    """Arguments of a call for each step; the samples move by other distances, which change from step to step."""
    tiny = TINY[name]
    x = tiny.inputs(batch)[latents_name(name)]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step, level in enumerate(levels(steps)):
        found.append({**tiny.inputs(batch), **tiny.at(batch, level), latents_name(name): x})
        length = 0.05 * (1 + math.sin(1.7 * step)) + 0.02
        moved = [
            each + length * (1 + place) * torch.randn(each.shape, generator=generator) for place, each in enumerate(x)
        ]
        x = moved if isinstance(x, list) else torch.stack(moved)
    return found


def prompted(name, arguments, branch):
    """The arguments for a branch of guidance."""
    text = next((each for each in ("encoder_hidden_states", "class_labels") if each in arguments), None)
    if branch == "cond" or text is None:
        return arguments
    return {**arguments, text: arguments[text] + 1}


@torch.no_grad()
def cached(name, method, calls, told=STEPS, branches=("cond",), again=1):
    """Which samples are reused in each step, by the branch and by the number of the call in its step."""
    model = tokdyn.wrap(TINY[name].build(), [method])
    found = {(branch, time): [] for branch in branches for time in range(again)}
    with tokdyn.trajectory(model, steps=told) as here:
        for here.step, arguments in enumerate(calls):
            for time in range(again):
                for here.branch in branches:
                    model(**prompted(name, arguments[time] if again > 1 else arguments, here.branch))
                    reused = tokdyn.traces(model)[-1].cached
                    found[here.branch, time].append([place in reused for place in range(2)])
    return {key: list(zip(*rows, strict=True)) for key, rows in found.items()}


def by_changes(changes, threshold, computed=()):
    """TeaCache: accumulate changes since the last computed step. The first step has none, and the last is computed."""
    total, reused = 0.0, [False]
    for step, change in enumerate(changes, 1):
        total += change
        reuse = total < threshold and step not in computed and step < len(changes)
        total = total if reuse else 0.0
        reused.append(reuse)
    return reused


def by_ratios(steps, threshold, most, retention):
    """MagCache: |1 - product of ratios| accumulates; ratios are those of the nearest calibrated step."""
    reused, product, error, row = [], 1.0, 0.0, 0
    for step in range(steps):
        place = round(step * ((len(RATIOS) - 1) / (steps - 1)))
        product, row = product * RATIOS[place], row + 1
        error += abs(1 - product)
        retained = step < max(1, int(retention * steps)) or step == steps - 1
        reuse = not retained and error < threshold and row <= most
        if not reuse:
            product, error, row = 1.0, 0.0, 0
        reused.append(reuse)
    return reused


def by_rate(xs, outputs, threshold, warmup):
    """EasyCache: the rate k of the last two computed steps predicts the change of the output in each step."""
    reused, rate, error, last_x, last_output = [], None, 0.0, None, None
    for step, (x, output) in enumerate(zip(xs, outputs, strict=True)):
        reuse = False
        if step < max(1, warmup) or step == len(xs) - 1:
            error = 0.0
        elif rate is not None:
            error += float(rate * (x - xs[step - 1]).abs().mean() / last_output.abs().mean())
            reuse = error < threshold
            error = error if reuse else 0.0
        if not reuse:
            if last_x is not None:
                rate = (output - last_output).abs().mean() / (x - last_x).abs().mean()
            last_x, last_output = x, output
        reused.append(reuse)
    return reused


def sea(features, grid, level, power):
    """The filter of SeaCache by its formula, in fp64, over the whole spectrum of features (N, D) of a grid."""
    spectrum = torch.fft.fftn(features.double().view(*grid, -1), dim=tuple(range(len(grid))))
    gain = torch.ones(grid, dtype=torch.float64)
    for axis, cells in enumerate(grid):
        frequency = torch.fft.fftfreq(cells, dtype=torch.float64).abs()
        signal = 1 / (frequency**power + 1e-16)
        along = (1 - level) * signal / ((1 - level) ** 2 * signal + level**2)
        gain = gain * along.view([cells if each == axis else 1 for each in range(len(grid))])
    gain = gain / gain.mean()
    return torch.fft.ifftn(spectrum * gain[..., None], dim=tuple(range(len(grid)))).real.reshape(features.shape)


def relative(seen):
    """Relative L1 changes from step to step."""
    return [float((now - before).abs().sum() / before.abs().sum()) for before, now in itertools.pairwise(seen)]


@torch.no_grad()
def outputs_of(name, calls):
    model = TINY[name].build()
    return [sample(model(**arguments)) for arguments in calls]


@torch.no_grad()
def attended(name, calls):
    """The input of the first attention in each step."""
    model, seen = TINY[name].build(), []
    blocks = adapter_for(model).blocks[0]
    first = next(iter(model.get_submodule(blocks.path).children()))
    first.get_submodule(blocks.attention[0]).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    for arguments in calls:
        model(**arguments)
    return seen


def mixed(decisions):
    """Whether steps are reused and steps are computed, apart from the first and the last."""
    inner = [reuse for row in decisions for reuse in row[1:-1]]
    return any(inner) and not all(inner)


@pytest.mark.parametrize("steps", [STEPS, len(RATIOS), 29])
@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.12, 2, 0.2), (0.24, 5, 0.1), (0.06, 3, 0.4)])
def test_magcache_decides_as_its_paper(steps, threshold, most, retention):
    method = FeatureCache(rule="magcache", ratios=RATIOS, threshold=threshold, max_reused=most, warmup=retention)
    expected = by_ratios(steps, threshold, most, retention)
    assert mixed([expected])
    found = cached("DiT", method, inputs_of("DiT", steps), told=steps, branches=BRANCHES)
    assert {key: [list(row) for row in rows] for key, rows in found.items()} == dict.fromkeys(found, [expected] * 2)


@pytest.mark.parametrize(("name", "threshold"), [("DiT", 0.3), ("FluxTransformer2DModel", 0.3), ("DCDiT", 0.3)])
def test_easycache_decides_as_its_paper(name, threshold):
    """The rate of a branch is its own, and so is that of a sample."""
    calls = inputs_of(name)
    found = cached(name, FeatureCache(rule="easycache", threshold=threshold, warmup=3), calls, branches=BRANCHES)
    for branch in BRANCHES:
        predicted = outputs_of(name, [prompted(name, arguments, branch) for arguments in calls])
        expected = [
            by_rate([each[latents_name(name)][i] for each in calls], [each[i] for each in predicted], threshold, 3)
            for i in range(2)
        ]
        assert mixed(expected)
        assert [list(row) for row in found[branch, 0]] == expected


SEA = {
    "DiT": ((4, 4), 2.0),
    "FluxTransformer2DModel": ((4, 4), 2.0),
    "Lumina2Transformer2DModel": ((4, 6), 2.0),
    "WanTransformer3DModel": ((2, 3, 4), 3.0),
}


@pytest.mark.parametrize("name", SEA)
def test_seacache_decides_as_its_paper(name):
    calls, power = inputs_of(name), SEA[name][1]
    model = TINY[name].build()
    grid = adapter_for(model).image_tokens(model, calls[0]).grid
    cells = math.prod(grid)
    seen = [features[:, -cells:] for features in attended(name, calls)]
    changes = []
    for i in range(2):
        filtered = [
            sea(each[i], grid, level, power) for each, level in zip(seen, given_levels(name, calls), strict=True)
        ]
        changes.append(relative(filtered))
    threshold = 2.5 * sorted(changes[0])[len(changes[0]) // 2]
    expected = [by_changes(each, threshold) for each in changes]
    assert mixed(expected)
    unfiltered = [by_changes(relative([each[i] for each in seen]), threshold) for i in range(2)]
    assert expected != unfiltered
    found = cached(name, FeatureCache(rule="seacache", threshold=threshold), calls)
    assert [list(row) for row in found["cond", 0]] == expected


def given_levels(name, calls):
    model = TINY[name].build()
    return [float(torch.as_tensor(adapter_for(model).level(model, each)).flatten()[0]) for each in calls]


@torch.no_grad()
def embeddings(name, path, calls):
    """What a module returns in each step, or what the first block gets as an argument."""
    model, seen = TINY[name].build(), []
    if path.startswith("argument "):
        first = next(iter(model.get_submodule(adapter_for(model).blocks[0].path).children()))
        place = {"CogVideoXTransformer3DModel": None, "WanTransformer3DModel": 2}[name]
        first.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[place] if len(args) > 2 else kwargs[path.split()[1]]),
            with_kwargs=True,
        )
    else:
        model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out))
    for arguments in calls:
        model(**arguments)
    return seen


TIMES = [
    ("WanTransformer3DModel", "time", "condition_embedder.time_embedder"),
    ("WanTransformer3DModel", "projected_time", "argument temb"),
    ("CogVideoXTransformer3DModel", "time", "argument temb"),
    ("FluxTransformer2DModel", "time", "time_text_embed.timestep_embedder"),
    ("DiT", "time", "t_embedder"),
    ("DCDiT", "time", "t_embedder"),
]


@pytest.mark.parametrize(("name", "indicator", "path"), TIMES)
def test_teacache_compares_the_embedding_of_the_timestep(name, indicator, path):
    """With a polynomial; the decision is the same for every sample and latents."""
    calls = inputs_of(name)
    changes = relative([each[0] for each in embeddings(name, path, calls)])
    changes = [max(0.0, 2 * change**2 + 0.5 * change) for change in changes]
    threshold = 2.2 * sorted(changes)[len(changes) // 2]
    expected = by_changes(changes, threshold)
    assert mixed([expected])
    method = FeatureCache(indicator=indicator, coefficients=(2.0, 0.5, 0.0), threshold=threshold)
    found = cached(name, method, calls)
    assert [list(row) for row in found["cond", 0]] == [expected] * 2


def test_teacache_decides_as_its_paper():
    """The rule with the published polynomial, on the recorded input of attention; windows reset what accumulates."""
    name, threshold, coefficients = "FluxTransformer2DModel", 0.9, TEACACHE_FLUX
    calls = inputs_of(name)
    expected = []
    for i in range(2):
        changes = relative([each[i] for each in attended(name, calls)])
        rescaled = [max(0.0, sum(c * x ** (4 - k) for k, c in enumerate(coefficients))) for x in changes]
        expected.append(by_changes(rescaled, threshold, computed={*range(3), *range(9, STEPS)}))
    assert mixed(expected)
    method = FeatureCache(threshold=threshold, coefficients=coefficients, warmup=3, end=0.75)
    assert [list(row) for row in cached(name, method, calls)["cond", 0]] == expected


class Undeclared(torch.nn.Module):
    """A model of nobody's, whose name for the embedding of the timestep is one of those that people give it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_embed = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8))
        self.blocks = torch.nn.ModuleList([Mixing() for _ in range(3)])

    def forward(self, x, timestep):
        embedded = self.time_embed(timestep[:, None] / 1000)
        for block in self.blocks:
            x = block(x, embedded)
        return x


class Mixing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, embedded):
        return x + self.outer(torch.tanh(self.inner(x) + embedded[:, None]))


@torch.no_grad()
def test_the_embedding_of_the_timestep_is_found_in_a_model_that_nobody_declared():
    plain, seen, times = Undeclared().eval(), [], [1000 * level for level in levels()]
    plain.time_embed.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(STEPS, 2, 6, 8, generator=generator).cumsum(0)
    for x, time in zip(xs, times, strict=True):
        plain(x, torch.full((2,), time))
    changes = relative(seen)
    threshold = 2.5 * sorted(changes)[len(changes) // 2]
    model = tokdyn.wrap(Undeclared().eval(), [FeatureCache(indicator="time", threshold=threshold)])
    found = []
    with tokdyn.trajectory(model, steps=STEPS):
        for x, time in zip(xs, times, strict=True):
            model(x, torch.full((2,), time))
            found.append([place in tokdyn.traces(model)[-1].cached for place in range(2)])
    expected = by_changes(changes, threshold)
    assert mixed([expected])
    assert found == [[reuse, reuse] for reuse in expected]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
@pytest.mark.parametrize("indicator", ["time", "projected_time"])
@torch.no_grad()
def test_every_family_has_an_embedding_of_the_timestep_or_is_refused(name, indicator):
    tiny, method = {**IMAGES, **VIDEOS}[name], FeatureCache(indicator=indicator, threshold=1e9)
    model, arguments = tiny.build(), tiny.inputs(2)
    if indicator == "projected_time" and adapter_for(model).blocks[0].time_projection is None:
        with pytest.raises(UnsupportedModelError, match="time_projection="):
            tokdyn.wrap(model, [method])
        return
    tokdyn.wrap(model, [method])
    with tokdyn.trajectory(model, steps=4) as here:
        for here.step in range(4):
            model(**arguments)
    first, *rest, last = [record.reused for record in tokdyn.stats(model).calls]
    assert first == last == 0
    assert all(rest)


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("DiTTransformer2DModel", FeatureCache(indicator="time"), "time="),
        ("FluxTransformer2DModel", FeatureCache(indicator="projected_time"), "time_projection="),
    ],
)
def test_a_model_without_the_embedding_is_refused_before_it_is_changed(name, method, words):
    model = TINY[name].build()
    with pytest.raises(UnsupportedModelError, match=words):
        tokdyn.wrap(model, [method])
    assert not hasattr(model, "tokdyn")
