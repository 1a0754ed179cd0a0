"""The shipped presets are what their sources say they are: consistent, complete and usable on the classes they name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from pydantic import ValidationError
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.coverage_images import IMAGES
from tests.contract.coverage_videos import VIDEOS
from tests.contract.models import TINY
from tokdyn import FeatureCache, InputError
from tokdyn.adapters import known_adapters
from tokdyn.attach import unsupported
from tokdyn.presets import TIERS, Entry, Setting, families, preset, read, write
from tokdyn.recipe import names as recipe_names

ENTRIES = [entry for family in families() for entry in family.models]
SETTINGS = [(entry, name, setting) for entry in ENTRIES for name, setting in entry.settings.items()]
PUBLISHED_SPEEDS = {
    ("FLUX.1-dev", "fast"): (0.6, 2.0), ("Mochi-1", "fast"): (0.09, 2.1), ("Wan2.1-T2V-14B", "fast"): (0.24, 2.8),
}  # fmt: skip


def caches(setting: Setting) -> Iterator[FeatureCache]:
    stacks = setting.methods.values() if isinstance(setting.methods, dict) else [setting.methods]
    for stack in stacks:
        for method in stack:
            assert isinstance(method, FeatureCache)
            yield method


def test_there_is_a_file_for_every_family_and_a_model_is_named_once() -> None:
    folder = Path(tokdyn.__file__).parents[1] / "recipes" / "presets"
    assert len(families()) == len(list(folder.glob("*.yaml"))) >= 18
    names = [name.casefold() for entry in ENTRIES for name in {entry.name}]
    assert len(names) == len(set(names))
    assert not any(name.startswith("presets") for name in recipe_names())  # they are no recipes


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_model_is_of_a_class_of_diffusers_and_its_configuration_has_what_tells_it_apart(entry: Entry) -> None:
    kind = getattr(diffusers, entry.kind)
    assert set(entry.config) <= set(inspect.signature(kind.__init__).parameters)
    assert all(hasattr(diffusers, pipeline) for pipeline in entry.pipelines)


def test_models_that_share_class_configuration_and_pipelines_can_only_be_told_apart_by_name() -> None:
    groups: dict[object, list[Entry]] = {}
    for entry in ENTRIES:
        key = (entry.kind, tuple(sorted(entry.config.items(), key=str)), *entry.pipelines, *entry.denoisers)
        groups.setdefault(key, []).append(entry)
    for alike in groups.values():
        hubs = [hub for entry in alike for hub in entry.hub]
        assert all(entry.hub for entry in alike)
        assert len(hubs) == len(set(hubs))


@pytest.mark.parametrize(("entry", "name", "setting"), SETTINGS, ids=lambda each: getattr(each, "name", str(each)[:40]))
def test_numbers_fit_their_rule_and_every_setting_names_its_source(entry: Entry, name: str, setting: Setting) -> None:
    assert name.rpartition("-")[2] in TIERS
    assert setting.source is not None
    assert setting.source.licence
    assert setting.source.commit or setting.source.pull_request
    assert setting.measured is None  # nothing with real weights, and the table says so
    for cache in caches(setting):
        assert cache.threshold > 0
        if cache.steps is not None:
            assert cache.num_steps == setting.steps
            assert cache.steps[-1] == setting.steps - 1
        elif cache.rule == "magcache":
            assert cache.ratios is not None
            assert cache.ratios[0] == 1.0
            assert len(cache.ratios) == setting.steps
            assert 0 < cache.start < 1
            assert cache.max_reused
            assert min(cache.ratios) > 0.4
            assert max(cache.ratios) < 1.8
        elif cache.rule == "teacache":
            assert 3 <= len(cache.coefficients) - 1 <= 5
        for adapter in known_adapters():
            if entry.kind in adapter.classes:
                assert unsupported(adapter, cache) is None


def test_faster_settings_of_a_rule_have_higher_thresholds_or_reuse_more_and_were_published_as_faster() -> None:
    for entry in ENTRIES:
        rules: dict[str, list[tuple[int, Setting]]] = {}
        for name, setting in entry.settings.items():
            prefix, _, tier = name.rpartition("-")
            rules.setdefault(prefix, []).append((TIERS.index(tier), setting))
        for ranked in rules.values():
            ordered = [setting for _, setting in sorted(ranked, key=lambda each: each[0])]
            strength = [
                (cache.threshold, cache.max_reused or 0, -len(cache.steps or ()))
                for setting in ordered
                for cache in list(caches(setting))[:1]
            ]
            assert strength == sorted(set(strength)), entry.name
            speeds = [each.published.speedup for each in ordered if each.published.speedup is not None]
            assert speeds == sorted(speeds), entry.name


def test_some_settings_are_those_that_everybody_knows() -> None:
    for (model, name), (threshold, speedup) in PUBLISHED_SPEEDS.items():
        entry = next(each for each in ENTRIES if each.name == model)
        assert next(caches(entry.settings[name])).threshold == threshold
        assert entry.settings[name].published.speedup == speedup
    (cache,) = preset("FLUX.1-dev", "quality")
    assert cache.coefficients == tokdyn.methods.TEACACHE_FLUX


def test_placeholders_are_left_out() -> None:
    """No polynomial of one model is used for another class, except where one was published for both."""
    shared = {frozenset({"LuminaNextDiT2DModel", "Lumina2Transformer2DModel"})}
    shared |= {frozenset({"CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"})}
    kinds: dict[object, set[str]] = {}
    for entry, _, setting in SETTINGS:
        for cache in caches(setting):
            if cache.steps is None and cache.rule != "seacache":
                kinds.setdefault(cache.ratios or cache.coefficients, set()).add(entry.kind)
    assert {frozenset(each) for each in kinds.values() if len(each) > 1} <= shared
    assert not any(numbers == (-450.0, 280.0, -45.0, 3.2, -0.02) for numbers in kinds)


def test_models_are_found_by_any_of_their_names() -> None:
    expected = preset("FLUX.1-dev", "fast")
    for words in (("black-forest-labs/FLUX.1-dev", "fast"), ("flux.1-DEV", "FAST"), ("FLUX.1", "fast")):
        assert preset(*words) == expected
    assert preset("black-forest-labs/FLUX.1-dev/fast") == preset("flux.1_dev/fast") == expected
    experts = preset("Wan2.2-T2V-A14B")
    assert isinstance(experts, dict)
    assert set(experts) == {"transformer", "transformer_2"}
    assert experts["transformer"] != experts["transformer_2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("FLUX.1-dve", "fast"), "FLUX.1-dev"),
        (("FLUX.1-dev", "fst"), "'fast'"),
        (("FLUX.1-dev",), "quality, balanced, fast, fastest"),
        (("Wan 2.1", "fast"), "'Wan2.1-T2V-14B'"),
        (("FLUX.1-schnell", "fast"), r"TokenMerge\(ratio"),
        (("Stable Audio Open", "fast"), "tokdyn calibrate"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        preset(*words)


def test_a_file_is_read_as_it_was_written_and_mistakes_are_named(tmp_path: Path) -> None:
    for family in families():
        assert read(write(family, tmp_path / "one.yaml")) == family
    text = (tmp_path / "one.yaml").read_text()
    for wrong, says in (
        (text.replace("threshold", "treshold").replace("num_steps", "num_stesp"), "num_stesp"),
        ("models: []", "family"),
        ("family: x\nmodels: [{name: y, class: z}]", "neither settings nor instead"),
        (": :", "no YAML"),
    ):
        (tmp_path / "wrong.yaml").write_text(wrong)
        with pytest.raises(InputError, match=says):
            read(tmp_path / "wrong.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "missing.yaml")
    with pytest.raises(ValidationError):
        families()[0].models[0].__class__(name="a", kind="b", settings={}, unknown=1)


def test_the_page_of_the_docs_holds_the_table_that_the_command_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    printed = CliRunner().invoke(app, ["presets", "--markdown"])
    assert printed.exit_code == 0
    assert page.endswith(printed.stdout)


def test_the_command_lists_what_a_word_is_part_of_and_gives_everything_as_json() -> None:
    shown = CliRunner().invoke(app, ["presets", "wan2.2"]).stdout
    for said in ("Wan2.2-T2V-A14B", "1.3x", "MagCache", "measured", "high noise"):
        assert said in shown
    assert "FLUX" not in shown
    rows = json.loads(CliRunner().invoke(app, ["presets", "wan2.2", "--json"]).stdout)
    assert {row["model"] for row in rows} >= {"Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"}
    assert all(row["measured"] is None and row["licence"] for row in rows)
    assert json.loads(CliRunner().invoke(app, ["presets", "schnell", "--json"]).stdout)[0]["setting"] == "-"
    refused = CliRunner().invoke(app, ["presets", "FLUX.1-dve"])
    assert refused.exit_code == 2
    assert "FLUX.1-dev" in refused.output


KINDS: dict[tuple[str, str, str], FeatureCache] = {
    (entry.kind, cache.rule, cache.indicator): cache
    for entry, _, setting in SETTINGS
    for cache in caches(setting)
    if cache.steps is None
}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of Mochi, which asks for fp32
@pytest.mark.slow
@pytest.mark.parametrize("key", KINDS, ids=str)
@torch.no_grad()
def test_every_rule_and_indicator_acts_on_a_tiny_model_of_the_class(key: tuple[str, str, str]) -> None:
    tiny = {**TINY, **IMAGES, **VIDEOS}.get(key[0])
    if tiny is None:
        pytest.skip("there is no tiny model of this class among the usual ones")
    plain = {"threshold": 1e9, "fingerprint": None, "warmup": 0, "start": 0, "max_reused": None}
    model = tokdyn.wrap(tiny.build(), [KINDS[key].model_copy(update=plain)])
    with tokdyn.trajectory(model, steps=4) as here:
        for step in range(4):
            here.step = step
            model(**{**tiny.inputs(1), **tiny.at(1, 1 - step / 4)})
    assert [call.reused for call in tokdyn.stats(model).calls][:3] == [0, 1, 1]


BASE = "family: x\nmodels:\n- name: tiny\n  class: DiTTransformer2DModel\n"
ONE = "{methods: [{method: FeatureCache}]"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{BASE}  settings: {{fast: {{methods: 5}}}}", "list of methods"),
        (f"{BASE}  settings: {{fast: {{methods: null}}}}", "list of methods"),
        (f"{BASE}  settings: {{fast: {{methods: []}}}}", "list of methods"),
        (f"{BASE}  settings: {{fast: {{methods: {{transformer: 3}}}}}}", "list of methods"),
        (f"{BASE}  settings: {{fast: {{methods: FeatureCache}}}}", "list of methods"),
        (f"{BASE}  settings: {{fast: {{methods: [5]}}}}", "there is no method .* TokenMerge"),
        (f"{BASE}  settings: {{Fast: {ONE}}}}}", "'Fast' in lower case"),
        (f"{BASE}  settings: {{fast: {ONE}, published: {{speedup: .inf}}}}}}", "speedup"),
        (f"{BASE}  settings: {{fast: {ONE}, note: 2020-13-45}}}}", "month"),
        ("a: " + "[" * 3000, "TOKDYN_MAX_YAML_DEPTH"),
    ],
    ids=range(10),
)
def test_files_of_other_content_are_refused_in_a_sentence(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"p\.yaml .*{says}") as raised:
        preset(tmp_path / "p.yaml")
    assert "\n" not in str(raised.value)


def test_a_setting_of_a_file_is_named_behind_its_path(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"{BASE}  settings: {{fast: {ONE}}}, slow: {ONE}}}}}")
    with pytest.raises(InputError, match="several settings; give one of fast, slow"):
        preset(tmp_path / "p.yaml")
    (method,) = preset(f"{tmp_path / 'p.yaml'}/slow")
    assert isinstance(method, FeatureCache)
    model = TINY["DiTTransformer2DModel"].build()
    tokdyn.unwrap(tokdyn.wrap(model, f"{tmp_path / 'p.yaml'}/slow"))


@pytest.mark.parametrize("names", [(5,), (None,), ([],), ("FLUX.1-dev", 5), ("",), ("/",), ("FLUX.1-dev/",)])
def test_names_that_are_none_are_refused_in_a_sentence(names: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"preset|setting"):
        preset(*names)  # type: ignore[arg-type]
