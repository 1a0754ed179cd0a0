"""Recipes: YAML, `extends:`, key=value settings, and errors that name the key and what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokdyn import recipe
from tokdyn.errors import RecipeError
from tokdyn.recipe import Recipe, files, shipped, yaml_text
from tokdyn.recipe.build import build_model, total_steps

MINIMAL: dict[str, Any] = {"model": {"name": "tiny"}, "data": {}, "training": {"steps": 1}}

# Parameters in millions with the frozen position table, as published (arXiv 2603.06351; DiT: facebook's code).
PUBLISHED = {
    "dc-dit-s-256": 34.76,
    "dc-dit-b-256": 137.13,
    "dc-dit-l-256": 469.61,
    "dc-dit-xl-256": 689.59,
    "dc-dit-b-512": 139,
    "dc-dit-xl-512": 693,
    "dit-s-2-256": 33,
    "dit-b-2-256": 131,
    "dit-l-2-256": 458,
    "dit-xl-2-256": 675,
}


def build(*settings: str, **sections: Any) -> Recipe:
    return recipe.resolve(files.deep_merge({**MINIMAL, **sections}, files.parse_overrides(settings)))


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    # the base of upcycle/cifar10 is a run of the user's, so a base of the same shape takes its place
    checked = recipe.check(name, ["upcycle.base=shapes"] if name.startswith("upcycle/cifar10") else [])
    assert checked.name == name
    assert checked.description.endswith(".")
    assert total_steps(checked) > 0


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_models_have_their_published_size(name: str, millions: float) -> None:
    model = build_model(recipe.load(f"imagenet/{name}"), device="meta")
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    digits = len(str(millions).partition(".")[2])
    assert round(count, digits) == pytest.approx(millions, abs=0.5 if digits == 0 else 1e-9)


def test_a_flow_takes_a_base_that_has_learned_a_variance() -> None:
    """SiT has a second half of output channels, which its objective ignores."""
    words = ["upcycle.base=SiT-XL/2", "objective={kind: flow}", "data.path=latents"]
    assert recipe.check("upcycle/dc", words).objective.learn_sigma is False


def test_the_cifar10_recipes_match_in_cost() -> None:
    """Parameters, or FLOPs per image, are within 1% of those of the DC-DiT, and runs are equally long."""
    from tokdyn.cost import flops_per_image

    def cost(name: str) -> tuple[float, float]:
        model = build_model(recipe.load(f"cifar10/{name}"), device="meta")
        return sum(parameter.numel() for parameter in model.parameters()), flops_per_image(model)

    parameters, flops = cost("dcdit-learned")
    assert cost("dit-params")[0] == pytest.approx(parameters, rel=0.01)
    assert cost("dit-flops")[1] == pytest.approx(flops, rel=0.01)
    assert 4e6 < parameters < 8e6
    lengths = {total_steps(recipe.load(name)) * 64 for name in recipe.names() if name.startswith("cifar10/")}
    assert lengths == {256_000}


def test_a_resolved_recipe_loads_as_itself(tmp_path: Path) -> None:
    for name in recipe.names():
        found = recipe.load(name, ["out=x", "preview.tail_drops=[0, 0.3]"] if "dc" in name else [])
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe.dump(found))
        assert recipe.load(path) == found
        assert recipe.load(tmp_path) == found


def test_defaults_depend_on_the_kind() -> None:
    assert build().chunking == recipe.ChunkingSettings()
    dit = build("model.kind=dit", "model.name=S/2")
    assert dit.chunking is None
    assert dit.model.target == 1.0
    assert (build().folder, build("name=a/b").folder, build("out=c").folder) == ("runs/run", "runs/a/b", "c")
    assert build().model.target == 4.0
    assert build("model.target=16").model.target == 16.0


def test_settings_are_yaml_and_the_last_one_wins() -> None:
    found = build("optimizer.lr=4e-4", "chunking.tail_drops=[0, 0.3]", "training.ema=0.9", "training.ema=0.99")
    assert found.optimizer.lr == 4e-4
    assert found.chunking is not None
    assert found.chunking.tail_drops == (0.0, 0.3)
    assert found.training.ema == 0.99
    assert build("data={size: 16x24}").data.size == (16, 24)
    assert build("training.steps=null", "training.images=7").training.images == 7
    assert build("out=2024", "data.path=7").folder == "2024"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("trainng.steps=2", r"'trainng' .*'training'"),
        ("training.batchsize=2", r"'training\.batchsize' .*'batch_size'"),
        ("preview.sampler.step=2", r"'preview\.sampler\.step' .*'steps'"),
        ("optimizer.zzz=2", r"'optimizer\.zzz' .*betas, clip, decay, eps, "),
        ("optimizer.lr=fast", r"'optimizer\.lr': .*'fast'"),
        ("optimizer.lr=0", r"'optimizer\.lr': .* 0\b"),
        ("optimizer.lr=.inf", r"'optimizer\.lr': .*inf"),
        ("training.precision=bf17", r"'training\.precision' .*'bf16' or 'fp32'.*'bf17'"),
        ("training.steps=1.5", r"'training\.steps': .*1\.5"),
        ("training.images=5", r"'training': images and steps"),
        ("training.steps=null", r"training\.images, training\.steps and compute_match"),
        ("chunking.tail_drops=[0, 1]", r"'chunking\.tail_drops\.1': .* 1\b"),
        ("chunking.curriculum=[[5, 2], [5, 4]]", r"'chunking': .* curriculum"),
        ("chunking.curriculum=[[0, 2], [5, 8]]", r"curriculum .* 8.* model\.target is 4"),
        ("model.kind=dit", r"DiT .*'tiny'"),
        ("model.name=XXL", r"'model': .*'XXL'"),
        ("model.heads=3", r"'model': 'heads' .*dcdit.*'num_heads'"),
        ("model.depth=deep", r"'model': 'depth': .*'deep'"),
        ("model.router=oracle", r"'model': 'router': .*'spatial_predictability', 'cosine' or 'random'"),
        ("model.in_channels=3", r"'in_channels' .*data\.channels"),
        ("objective.kind=sound", r"'objective\.kind' .*'noise' or 'flow'"),
        ("objective={kind: flow, learn_sigma: true}", r"'objective': .*flow"),
        ("name=../up", r"'name': .*\.\./up"),
        ("data=null", r"'data': .*None"),
    ],
)
def test_errors_name_the_key_and_what_is_valid(setting: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named) as caught:
        build(setting)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_sections_that_do_not_agree_are_rejected() -> None:
    with pytest.raises(RecipeError, match=r"'model' .* model=VALUE"):
        recipe.resolve({"data": {}, "training": {"steps": 1}})
    with pytest.raises(RecipeError, match=r"'chunking' .* chunking=null"):
        build("model.kind=dit", "model.name=S/2", "chunking.calibrate=false")
    with pytest.raises(RecipeError, match=r"random .* chunking\.curriculum=\[\]"):
        build("model.router=random", "chunking.curriculum=[[0, 2], [5, 4]]")
    with pytest.raises(RecipeError, match="2 more"):
        build(*(f"k{index}=1" for index in range(6)))


def test_words_that_are_not_settings_are_rejected() -> None:
    for word in ("lr", "=3", "a..b=3", ".a=3"):
        with pytest.raises(RecipeError, match=f"'{word}' .* key=value"):
            files.parse_overrides([word])
    with pytest.raises(RecipeError, match="'a', line 1"):
        files.parse_overrides(["a=[1"])


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="model: {name: tiny, depth: 3}\ndata: {}\ntraining: {steps: 5, trackers: [a, b]}\n",
        middle="extends: base.yaml\ntraining: {trackers: [c]}\n",
        top="extends: middle.yaml\nmodel: {depth: 1}\n",
        mine="extends: demo\nname: mine\ntraining: {steps: 3}\n",
    )
    found = recipe.load(tmp_path / "top.yaml", ["training.log_every=9"])
    assert found.model.overrides == {"depth": 1}
    assert found.training.trackers == ("c",)
    assert (found.training.steps, found.training.log_every) == (5, 9)
    assert recipe.load(tmp_path / "mine.yaml").model == recipe.load("demo").model


def test_extends_without_target_or_in_a_circle_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, a="extends: b.yaml\n", b="extends: c.yaml\n", c="extends: a.yaml\n", self="extends: self.yaml\n")
    with pytest.raises(RecipeError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        recipe.load(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"self\.yaml -> self\.yaml"):
        recipe.load(tmp_path / "self.yaml")
    write(tmp_path, lost="extends: demmo\n", many="extends: [a, b]\n", number="3\n", twice="seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"'demmo'.*'demo'"):
        recipe.load(tmp_path / "lost.yaml")
    with pytest.raises(RecipeError, match=r"'extends' .*'a', 'b'"):
        recipe.load(tmp_path / "many.yaml")
    with pytest.raises(RecipeError, match=r"number\.yaml .*\bint\b"):
        recipe.load(tmp_path / "number.yaml")
    with pytest.raises(RecipeError, match=r"twice\.yaml, line 2, column 1 .*'seed'"):
        recipe.load(tmp_path / "twice.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        recipe.load(tmp_path / "binary.yaml")


def test_plain_yaml_values_have_the_type_they_look_like() -> None:
    found = yaml_text.parse(
        "{a: 1e-4, b: no, c: on, d: true, e: 1., f: .5, g: 010, h: 2026-01-01, i: ~, j: 1:30, k: -7}", "x"
    )
    assert found == {
        "a": 1e-4, "b": "no", "c": "on", "d": True, "e": 1.0, "f": 0.5, "g": "010", "h": "2026-01-01",
        "i": None, "j": "1:30", "k": -7,
    }  # fmt: skip
    with pytest.raises(RecipeError, match="YAML"):
        yaml_text.parse("!!python/object/apply:os.system [ls]", "x")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@given(values)
@example({"a\x85b": "c\u2028 d\u2029"})
def test_yaml_round_trip(value: Any) -> None:
    assert yaml_text.parse(yaml_text.dump(value), "x") == value


@pytest.mark.parametrize("text", ["photos #1", "a: b", "a: b: c", "- a", "*", "&x", "%d", "@home", "!tag", "x:", "x "])
def test_text_is_kept_as_typed(text: str) -> None:
    assert files.parse_overrides([f"data.path={text}"]) == {"data": {"path": text.strip()}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("3", 3), ("true", True), ("null", None), ("~", None), ("", None)],
        *[("[1, a]", [1, "a"]), ("{kind: flow}", {"kind": "flow"}), ("'3'", "3"), ('"a #b"', "a #b")],
    ],
)
def test_values_that_are_not_text_are_yaml(text: str, value: Any) -> None:
    assert files.parse_overrides([f"x={text}"]) == {"x": value}


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand the tilde in `out=~/run`."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert recipe.load("demo", ["out=~/run"]).folder == "/home/someone/run"


keys = st.from_regex(r"[a-z]{1,3}", fullmatch=True)


@given(st.lists(st.tuples(st.lists(keys, min_size=1, max_size=3), scalars), max_size=5))
def test_settings_round_trip(settings: list[tuple[list[str], Any]]) -> None:
    """A value written as a setting is read back as the same value, and a later setting wins."""
    words = [f"{'.'.join(path)}={yaml_text.dump(value).removesuffix('...' + chr(10))}" for path, value in settings]
    found = files.parse_overrides(words)
    if settings:
        path, value = settings[-1]
        here: Any = found
        for key in path:
            here = here[key]
        assert here == value


@given(
    lr=st.floats(1e-9, 1.0),
    drops=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=5),
    batch=st.integers(1, 10**6),
    decay=st.sampled_from(["none", "linear", "cosine"]),
)
def test_any_recipe_loads_as_itself(lr: float, drops: list[float], batch: int, decay: str) -> None:
    found = recipe.resolve(
        {
            **MINIMAL,
            "optimizer": {"lr": lr, "decay": decay},
            "chunking": {"tail_drops": drops},
            "training": {"steps": 1, "batch_size": batch},
        }
    )
    assert recipe.resolve(yaml_text.parse(recipe.dump(found), "x")) == found


def test_recipes_can_be_listed_shown_and_copied(tmp_path: Path) -> None:
    assert "cifar10/dcdit-random" in recipe.names()
    assert not any("_base" in name for name in recipe.names())
    assert all(recipe.summaries().values())
    assert recipe.show("demo") == shipped.path("demo").read_text()
    copied = recipe.copy("demo", tmp_path)
    assert copied == tmp_path / "demo.yaml"
    assert copied.read_text() == recipe.show("demo")  # comments included
    merged = recipe.copy("cifar10/dcdit-random", tmp_path / "new" / "mine.yaml")
    assert recipe.load(merged) == recipe.load("cifar10/dcdit-random")
    with pytest.raises(RecipeError, match=r"demo\.yaml"):
        recipe.copy("demo", tmp_path)
    with pytest.raises(RecipeError, match=r"'dmo' .*'demo'"):
        recipe.copy("dmo", tmp_path)
