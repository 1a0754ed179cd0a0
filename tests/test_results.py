"""The pages show the committed measurements, and the generators of their tables work on small results made here."""

import json
from pathlib import Path

import pytest

from benchmarks import (
    attention,
    cache_pareto,
    cache_rules,
    caching,
    cifar10,
    command_line,
    dcdit,
    markdown,
    preset_times,
    sampling,
    scaling,
    stacking,
    tuning,
    upcycling,
)
from benchmarks.trajectories import flux_calls
from tokdyn.presets import families

ROOT = Path(__file__).parents[1]


def committed(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def page(name):
    return (ROOT / f"docs/{name}.md").read_text()


def cells(table):
    """Return the rows of a Markdown table below its head, each as a list of cells."""
    head, rule, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    assert set(rule) == {"---"}
    assert all(len(row) == len(head) for row in rows)
    return rows


def test_cifar10_table_is_the_measured_one():
    result = committed("cifar10")
    assert cifar10.table(result) in page("results")
    assert {row["run"] for row in result["rows"]} == set(cifar10.RUNS)
    assert all(row["training"]["images"] >= 250_000 and row["images"] == 5000 for row in result["rows"])


def test_upcycling_table_is_the_measured_one():
    result = committed("upcycling")
    assert upcycling.table(result["rows"]) in page("results")
    measured = {(row["run"], row["share"]) for row in result["rows"]}
    for kind in ("scratch", "upcycled", "distilled"):
        assert measured >= {(f"{kind}-0", share) for share in upcycling.SHARES} | {(f"{kind}-1", 0.125)}
    assert all(row["held_out"]["0"]["images"] == 5000 for row in result["rows"])


def test_speed_tables_are_the_measured_ones_with_known_misses():
    missed = {
        "dcdit-cpu": {"training step S fp32", "training step S bf16"},
        "dcdit-amx-cpu": {"against the blocks on all tokens bf16"},
    }
    for name, known in missed.items():
        result = committed(name)
        assert dcdit.table(result["rows"]) in page("performance")
        assert set(result["missed"]) <= known  # as the page says
        forward = {(row["size"], row["precision"]) for row in result["rows"] if row["what"] == "forward"}
        assert forward == set(dcdit.FORWARD)


def test_packed_blocks_on_the_page_are_the_measured_ones_with_known_misses():
    for name, missed in {"flagship-cpu": [], "flagship-amx-cpu": ["packed blocks fp32", "packed blocks bf16"]}.items():
        result = committed(name)
        assert result["missed"] == missed
        packed = (result["packed_fp32"], result["packed_bf16"])
        for each in ("realised", "realised_over_plain"):
            if each in packed[0]:
                assert all(f"{row[each]:.1%}" in page("performance") for row in packed)


def test_attention_tables_are_the_measured_ones():
    rows = committed("attention-cpu")["rows"]
    for samples in ("ragged", "equal"):
        assert attention.table(rows, samples) in page("performance")


def test_sampling_table_is_the_measured_one_and_meets_its_targets():
    result = committed("sampling-cpu")
    assert sampling.table(result["stacks"]) in page("results")
    assert [row["stack"] for row in result["stacks"]] == sampling.NAMES
    assert result["met"]
    assert result["inside"]["share"] >= sampling.SHARE


def test_tuning_table_is_the_measured_one_and_tuned_schedules_win_at_three_budgets():
    result = committed("tuning")
    assert tuning.table(result["budgets"]) in page("results")
    assert len({each["budget"] for each in result["budgets"]}) >= 3
    for each in result["budgets"]:
        assert tuning.beats(each["tuned"][0], each["uniform"], each["plain"])
        assert each["images"] >= 256


def test_cache_rules_on_the_page_are_the_measured_ones():
    result = committed("cache-rules-cpu")
    assert cache_rules.table(result) in page("performance")
    assert cache_rules.ratios(result) in page("performance")
    assert result["missed"] == []
    for name, case in result["cases"].items():
        assert {*cache_rules.OWN, "plain"} <= case["rows"].keys(), name
        assert len(case["over"]) >= 6


def test_times_of_presets_on_the_page_are_the_measured_ones():
    result = committed("preset-times-cpu")
    assert preset_times.table(result) in page("performance")
    for name, rows in result["models"].items():
        (entry,) = (entry for family in families() for entry in family.models if entry.name == name)
        assert {row["preset"] for row in rows} == set(entry.settings)


def test_tables_of_many_gpus_are_those_that_are_worked_out():
    result = committed("scaling")
    assert scaling.page(result) in page("scaling")
    assert {row["gpus"] for row in result["rows"]} == set(scaling.GPUS)
    assert {row["model"] for row in result["rows"]} == {*scaling.RECIPES, scaling.FLUX}


@pytest.mark.slow
def test_what_is_worked_out_for_many_gpus_has_not_changed():
    assert json.loads(json.dumps(scaling.measure())) == committed("scaling")


def test_table_of_caching_rules_is_the_measured_one():
    content = committed("cache-pareto")
    assert cache_pareto.table(content) in page("results")
    rules = {row["rule"] for row in content["rows"]}
    assert rules == {cache_pareto.NO_CACHE, *cache_pareto.LISTED, *cache_pareto.DECIDED}
    assert {row["companion"] for row in content["rows"]} == set(cache_pareto.COMPANIONS)


def test_cifar10_table_of_a_small_result():
    plain = {
        "model": "DiT", "parameters": 1_234_567, "tail_drop": 0.0, "kept": None, "gflops_per_image": 12.34,
        "values": {"frechet_distance[judge]": 3.456, "class_score[judge]": 7.891}, "extractor": {"name": "judge"},
    }  # fmt: skip
    dropped = {**plain, "model": "DC-DiT", "tail_drop": 0.3, "kept": 0.175}
    assert cells(cifar10.table({"rows": [plain, dropped]})) == [
        ["DiT", "1.23 M", "", "", "12.3", "3.46", "7.89"],
        ["DC-DiT", "1.23 M", "0.3", "17.5%", "12.3", "3.46", "7.89"],
    ]


def test_cifar10_training_summary_of_a_small_log(tmp_path):
    rows = [
        {"images": 50 * n, "step": n, "seconds": 2.0 * n, "loss": float(n), "natural_kept": 0.1 * n}
        for n in range(1, 13)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cifar10.training(tmp_path) == {
        "images": 600, "steps": 12, "seconds": 24.0, "loss_last_500_steps": pytest.approx(7.5),
        "natural_kept_last_500_steps": pytest.approx(0.75),
    }  # fmt: skip


def test_sampling_table_of_a_small_result():
    first = {
        "stack": "DiT",
        "kept": None,
        "gflops": 100.4,
        "milliseconds": 200.4,
        "flops_saved": 0.0,
        "time_saved": 0.0,
    }
    second = {**first, "stack": "+ cache", "kept": 0.25, "gflops": 60.0, "flops_saved": 0.4, "time_saved": 0.35}
    assert cells(sampling.table([first, second])) == [
        ["DiT", "", "100", "", "200", ""],
        ["+ cache", "25.0%", "60", "40%", "200", "35%"],
    ]


def quality_row(name, tflops, distance, psnr=20.0):
    return {
        "name": name, "methods": [], "kept": 0.2, "tflops_per_image": tflops, "flops_saved": 0.5, "psnr": psnr,
        "ssim": 0.9, "feature_distance": distance, "front": False,
    }  # fmt: skip


def test_tuning_is_collected_from_its_folder_into_a_table(tmp_path):
    rows = [
        quality_row("unmodified", 1.0, None), quality_row("uniform", 0.5, 0.4), quality_row("tuned 1", 0.5, 0.3, 21.0),
        quality_row("tuned 2", 0.5, 0.2, 22.0),
    ]  # fmt: skip
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows, "machine": {}, "settings": {"count": 8}}))
    (tmp_path / "tuned.json").write_text(json.dumps({"winner": {"name": "tuned", "tail_drop": 0.3}}))
    collected = tuning.collect(tmp_path, 0.5)
    assert [row["name"] for row in collected["tuned"]] == ["tuned 2", "tuned 1"]
    assert collected["schedule"] == {"methods": None, "tail_drop": 0.3, "uncond_tail_drop": None}
    assert collected["met"]
    assert cells(tuning.table([collected])) == [
        ["50%", "uniform", "500.0", "20.0%", "20.0", "0.900", "0.400"],
        ["50%", "tuned", "500.0", "20.0%", "22.0", "0.900", "0.200"],
    ]


def test_tuned_schedule_wins_if_it_is_closer_at_the_same_cost():
    plain, uniform = quality_row("unmodified", 1.0, None), quality_row("uniform", 0.5, 0.4)
    assert tuning.beats(quality_row("tuned", 0.504, 0.3, 21.0), uniform, plain)
    for worse in (
        quality_row("tuned", 0.506, 0.3, 21.0),
        quality_row("tuned", 0.5, 0.4, 21.0),
        quality_row("tuned", 0.5, 0.3),
    ):
        assert not tuning.beats(worse, uniform, plain)


def test_attention_tables_of_a_small_result():
    row = {"dtype": "float32", "train": False, "rows": 64, "spread": 0.3, "median_ms": {"split": 1.234, "padded": 2.0}}
    rows = [{**row, "samples": "ragged"}, {**row, "samples": "equal", "train": True}]
    assert cells(attention.table(rows, "ragged")) == [["float32", "no", "64", "30%", "1.23", "2.00"]]
    assert cells(attention.table(rows, "equal")) == [["float32", "yes", "64", "1.23", "2.00"]]


def test_speed_table_of_a_small_result():
    row = {
        "what": "forward", "batch": 8, "size": "S", "precision": "bf16", "computed": "fp32", "speedup": 2.0, "bar": 1.5,
        "times": {"tokdyn": {"median_ms": 1000.0}, "equations": {"median_ms": 2000.0}}, "peak_mib": None,
    }  # fmt: skip
    other = {**row, "computed": "bf16", "peak_mib": {"tokdyn": 10.0, "equations": 20.0}}
    left_out = {**row, "times": {"tokdyn": {"median_ms": 1.0}}}
    assert cells(dcdit.table([row, other, left_out])) == [
        ["forward, batch 8", "S", "bf16, tokdyn fp32", "2,000", "1,000", "2.00", "1.5", ""],
        ["forward, batch 8", "S", "bf16", "2,000", "1,000", "2.00", "1.5", "10 of 20"],
    ]


def test_upcycling_table_of_a_small_result():
    kind = next(iter(upcycling.KINDS))
    base = {
        "kind": "base", "images": 8000, "seed": 0, "held_out": {"0": {"loss": 0.1, "kept": None}},
        "gflops_per_forward": 1.234,
    }  # fmt: skip
    held_out = {"0": {"loss": 0.2, "kept": 0.25}, "0.3": {"loss": 0.3, "kept": 0.2}, "0.6": {"loss": 0.4, "kept": 0.1}}
    distance = {"values": {"frechet_distance[judge]": 5.678}}
    other = {**base, "kind": kind, "images": 1000, "held_out": held_out, "frechet": distance}
    first, second = cells(upcycling.table([other, base]))
    assert first[1:] == ["8,000", "0", "0.1000", "", "", "", "1.23", ""]
    assert second[1:] == ["1,000", "0", "0.2000", "0.3000", "0.4000", "25.0%", "1.23", "5.68"]


def test_stacking_results_hold_names_instead_of_paths():
    content = {
        "settings": {"out": "/home/me/work", "reference": "/data/test.zip", "extractor": "/data/judge.ts", "count": 8},
        "rows": [{"model": "/home/me/runs/dit-base/ema"}, {"model": "/home/me/runs/dc/checkpoints/step_0001000/model"}],
    }
    named = stacking.by_name(content)
    assert named["settings"] == {"reference": "test.zip", "extractor": "judge.ts", "count": 8}
    assert [row["model"] for row in named["rows"]] == ["dit-base", "dc/step_0001000"]


def test_caching_misses_targets_by_name():
    own = {"empty_over_plain": 0.02, "cached_step_share": 0.01, "skipped_block_share": 0.001}
    peers = {"over_cache_dit": 0.9, "over_diffusers": 1.1}
    missed = caching.missed_targets({"dit": {"own": own, "peers": peers}, "dit-tiny": {"own": own, "peers": {}}})
    assert [text.split()[:2] for text in missed] == [["dit", "empty_over_plain"], ["dit", "over_diffusers"]]


def test_benchmarks_share_options_and_exit_codes(capsys):
    parser = command_line.parser("What it measures.\n\n    python -m it", "a.json", rounds=5, figures="docs")
    given = parser.parse_args(["--rounds", "3"])
    assert (given.out, given.rounds, given.threads, given.figures) == (Path("a.json"), 3, None, Path("docs"))
    assert "\n    python -m it" in parser.format_help()
    assert vars(command_line.parser(None).parse_args([])) == {"out": None, "threads": None}
    assert command_line.finish([]) == 0
    assert command_line.finish(["speed", "memory"]) == 1
    assert "speed; memory" in capsys.readouterr().out


def test_markdown_tables():
    assert markdown.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_times_of_caches_are_shown_beside_those_of_the_plain_model():
    def row(ms, computed=13):
        return {"median_ms": ms, "computed": computed, "gflops": 213.4, "threshold": None}

    case = {"rows": {"steps": row(500), "plain": row(1000, 25)}, "rounds_over": {"steps over mask": [0.9, 1.0, 0.95]}}
    result = {"cases": {"flux": case, "wan": case}}
    assert cells(cache_rules.table(result)) == [
        ["steps", *["13", "213", "0.50", "0.50"] * 2],
        ["plain", *["25", "213", "1.00", "1.00"] * 2],
    ]
    assert [row[:3] for row in cells(cache_rules.ratios(result))] == [
        ["flux", "steps over mask", "0.950"], ["wan", "steps over mask", "0.950"],
    ]  # fmt: skip


@pytest.mark.slow
def test_every_preset_of_a_model_is_measured_at_the_steps_it_is_published_for():
    model = caching.flux(1, 2, 1, 32)
    rows = preset_times.measured(model, lambda steps: flux_calls(2, 4, steps), "FLUX.1-dev", rounds=1)
    by_name = {row["preset"]: row for row in rows}
    assert by_name["mask-fast"]["steps"] == 28
    assert by_name["mask-fast"]["computed"] == 11
    assert all(0 < row["preset_gflops"] <= row["plain_gflops"] for row in rows)
    lines = cells(preset_times.table({"models": {"FLUX.1-dev": rows}}))
    assert [line[1] for line in lines] == list(by_name)
