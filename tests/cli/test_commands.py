"""The commands as users type them, on a run of two steps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokdyn.cli import frame
from tokdyn.cli.main import app
from typer.main import get_command
from typer.testing import CliRunner

import tokdyn

TINY = [
    "model.name=tiny", "model.hidden_size=32", "model.depth=1", "model.num_heads=2", "data.size=16", "data.length=64",
    "training.steps=2", "training.batch_size=4", "training.log_every=1", "training.sample_every=null",
    "training.precision=fp32",
]  # fmt: skip
LEAVES = [
    ["demo"], ["train"], ["upcycle"], ["features"], ["sample"], ["calibrate"], ["tune"], ["eval"], ["report"], ["plot"],
    ["playground"], ["convert"], ["models"], ["methods"], ["presets"], ["doctor"], ["bench", "flops"],
    ["bench", "speed"], ["bench", "quality"],
    ["recipes", "ls"], ["recipes", "show"], ["recipes", "copy"], ["recipes", "check"],
]  # fmt: skip


def run(*words: str | Path, code: int = 0) -> Any:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    shown = json.loads(run("train", "demo", *TINY, f"out={folder}", "--json").stdout)
    assert shown["step"] == shown["steps"] == 2
    assert shown["folder"] == str(folder)
    return folder


def test_version() -> None:
    assert run("--version").stdout == f"tokdyn {tokdyn.__version__}\n"


def test_this_file_lists_every_command() -> None:
    command: Any = get_command(app)
    found = [[name] for name, child in command.commands.items() if not hasattr(child, "commands")]
    found += [[name, leaf] for name, child in command.commands.items() for leaf in getattr(child, "commands", ())]
    assert sorted(found) == sorted(LEAVES)


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_help_has_usage_and_examples(words: list[str]) -> None:
    text = run(*words, "--help").stdout
    assert f" {' '.join(words)} " in text.splitlines()[0]
    assert f"tokdyn {' '.join(words)}" in text.partition("Examples:")[2]


def test_unknown_commands_and_options_are_refused() -> None:
    assert "nope" in run("nope", code=2).stderr
    assert "-n" in run("models", "-n", "3", code=2).stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train"], "RECIPE"),
        (["train", "demoo"], "'demo'"),
        (["train", "demo", "optimizer.lrr=1"], "'optimizer.lrr'"),
        (["train", "demo", "optimizer.lr=fast"], "'optimizer.lr'"),
        (["sample"], "'model'"),
        (["sample", "nowhere"], "nowhere"),
        (["report"], "RUN"),
        (["report", "nowhere"], "nowhere"),
        (["report", "runs/x", "out=page.txt"], "'out'"),
        (["plot", "nowhere"], "nowhere"),
        (["plot", "runs/x", "formats=gif"], "'formats"),
        (["calibrate", "runs/x"], "'method'"),
        (["calibrate", "runs/x", "method=skip"], "flops=0.7"),
        (["calibrate", "nowhere", "method=cache"], "nowhere"),
        (["eval", "nowhere", "nothing", "more"], "GENERATED REFERENCE"),
        (["eval", "nowhere"], "nowhere"),
        (["features", "vae=v"], "'out'"),
        (["models", "sample_size=0"], "'sample_size'"),
        (["convert", "x.pt", "y"], "'to'"),
        (["convert", "nowhere.pt", "y", "--to", "diffusers"], "'nowhere.pt'"),
        (["convert", "x.pt", "y", "--to", "onnx"], "'to'"),
        (["convert", "x.pt", "y", "z", "--to", "tokdyn"], "'z'"),
        (["demo", "seed=-1"], "'seed'"),
        (["recipes", "show", "demoo"], "'demo'"),
        (["recipes", "ls", "all=true"], "all=true"),
    ],
)
def test_invalid_arguments_end_in_one_sentence(words: list[str], named: str) -> None:
    result = run(*words, code=2)
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_errors_of_the_system_end_in_one_sentence() -> None:
    result = run("sample", "x" * 300, code=2)  # longer than a file name can be
    assert "File name too long" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_without_code(tmp_path: Path) -> None:
    for index in range(4):
        path = tmp_path / "zip" / "top" / str(index) / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(path)
    words = [*TINY, "data.kind=images", f"data.path={tmp_path / 'zip'}", f"out={tmp_path / 'run'}"]
    (line,) = run("train", "demo", *words, "--dry-run", "--json").stderr.splitlines()
    assert line.startswith("Warning: ")
    assert str(tmp_path / "zip") in line


def test_recipes_are_listed_shown_copied_and_checked(tmp_path: Path) -> None:
    assert "demo" in json.loads(run("recipes", "ls", "--json").stdout)
    assert "demo" in run("recipes", "ls").stdout
    assert "kind: dcdit" in run("recipes", "show", "demo").stdout
    copied = tmp_path / "mine.yaml"
    run("recipes", "copy", "demo", copied)
    assert "lr: 0.003" in run("recipes", "check", copied, "--optimizer.lr", "3e-3").stdout
    assert "mine.yaml" in run("recipes", "copy", "demo", copied, code=2).stderr


def test_models_are_listed() -> None:
    entries = json.loads(run("models", "--json").stdout)
    assert {"DiT-S/2", "DC-DiT-S"} <= {entry["name"] for entry in entries}
    pretrained = {entry["name"]: entry for entry in entries if entry["kind"] == "base"}
    assert {"DiT-XL/2", "SiT-XL/2", "DC-DiT-S", "DyDiT-XL/2-0.7", "facebook/DiT-XL-2-512"} <= set(pretrained)
    assert (pretrained["SiT-XL/2"]["objective"], pretrained["SiT-XL/2"]["parameters"]) == ("flow", 675_129_632)
    shown = run("models").stdout
    assert "237.24" in shown
    assert re.search(r"DC-DiT-XL +dc-dit +noise +689,589,513 +(yes|no)\n", shown)


def test_a_dry_run_works_out_what_many_gpus_take(tmp_path: Path) -> None:
    words = ["train", "demo", *TINY, "training.batch_size=8", f"out={tmp_path / 'run'}"]
    found = json.loads(run(*words, "--dry-run", "gpus=8", "gpu=a100", "sharding=full", "--json").stdout)
    plan = found["scaling"]
    assert (plan["gpus"], plan["gpu"], plan["sharding"], plan["micro_batch"]) == (8, "A100 SXM 80GB", "full", 1)
    assert plan["memory_total"] == sum(plan["memory"].values())
    assert 0 < plan["per_second"] < plan["per_second_overlapped"]
    assert found["seconds"] is None  # nothing is timed
    assert "gpus" in run(*words, "gpus=8", code=2).stderr
    assert "gpus" in run(*words, "--dry-run", "gpu=a100", code=2).stderr
    assert "b100" in run(*words, "--dry-run", "gpus=8", "gpu=b100", code=2).stderr
    assert "batch_size" in run(*words, "--dry-run", "gpus=7", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_trains_nothing(tmp_path: Path) -> None:
    words = ["train", "demo", *TINY, f"out={tmp_path / 'run'}", "--dry-run"]
    plan = json.loads(run(*words, "--json").stdout)
    assert plan["steps"] == 2
    assert plan["seconds"] > 0
    assert "GFLOP" in run(*words).stdout
    assert not (tmp_path / "run").exists()


def test_training_twice_needs_resume(trained: Path) -> None:
    assert "--resume" in run("train", "demo", *TINY, f"out={trained}", code=2).stderr
    run("train", trained, "--resume")


def test_sampling_at_two_budgets(trained: Path, tmp_path: Path) -> None:
    words = ["sample", trained, "--steps", "2", "--count=3", "tail_drop=0,0.5"]
    found = json.loads(run(*words, f"out={tmp_path}", "--maps", "--json").stdout)
    assert [budget["tail_drop"] for budget in found["budgets"]] == [0.0, 0.5]
    assert all(Path(file).is_file() for budget in found["budgets"] for file in budget["files"])
    assert "tokens kept" in run(*words, f"out={tmp_path}").stdout


def test_names_of_pretrained_models_are_names_of_models(tmp_path: Path) -> None:
    """`shapes` ships with the package; other pretrained models are opened in the same way."""
    found = json.loads(run("sample", "shapes", "steps=2", "count=1", f"out={tmp_path}", "--json").stdout)
    assert Path(found["model"]["path"]).name == "shapes"
    assert Path(found["budgets"][0]["files"][0]).is_file()
    (row,) = json.loads(run("bench", "flops", "shapes", "steps=2", "images=1", "count=false", "--json").stdout)[
        "models"
    ]
    assert row["params"] == found["model"]["parameters"]
    (timed,) = json.loads(run("bench", "speed", "shapes", "batch=1", "rounds=3", "warmup=1", "--json").stdout)["rows"]
    assert timed["stack"] == "shapes"
    shown = run("calibrate", "shapes", "method=cache", "steps=3", "count=1", f"out={tmp_path / 'found'}")
    assert f"methods={tmp_path / 'found'}" in shown.stderr.splitlines()[-1]


def test_evaluation_with_a_network_from_a_file(tmp_path: Path, trained: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    network = tmp_path / "mean.ts"
    with warnings.catch_warnings():  # torch announces the end of TorchScript
        warnings.simplefilter("ignore")
        torch.jit.script(Mean()).save(str(network))
    run("sample", trained, "steps=1", "count=12", "format=npz", f"out={tmp_path}")
    rng = np.random.default_rng(0)
    for index in range(12):
        (tmp_path / "real" / "all").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / "all" / f"{index}.png")
    words = ["eval", tmp_path / "samples.npz", tmp_path / "real", f"extractor={network}", "metrics=frechet"]
    assert list(json.loads(run(*words, "--json").stdout)["values"]) == ["frechet_distance[mean]"]
    assert "frechet_distance[mean]" in run(*words).stdout
    many = tmp_path / "many"
    run("sample", trained, "steps=1", "count=3", "format=folder", "--maps", "tail_drop=0,0.5", f"out={many}")
    words = ["eval", many / "tail_drop_0.5", tmp_path / "real", f"extractor={network}", "metrics=frechet", "--json"]
    assert json.loads(run(*words).stdout)["generated_images"] == 3  # maps are not samples


def test_features_are_written_once(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    words = ["features", f"vae={tmp_path / 'vae'}", f"out={tmp_path / 'latents'}", "kind=shapes", "size=16", "length=4"]
    assert json.loads(run(*words, "--json").stdout)["count"] == 4
    assert re.search(r"files +1, of which 1 ", run(*words).stdout)


def test_demo_trains_once(tmp_path: Path) -> None:
    words = [
        "demo",
        "--train",
        f"out={tmp_path / 'demo'}",
        "training_steps=1",
        "sampling_steps=2",
        "count=2",
        "scored=8",
    ]
    found = json.loads(run(*words, "--json").stdout)
    assert [budget["tail_drop"] for budget in found["samples"]["budgets"]] == [0.0, 0.3, 0.6]
    assert all(Path(file).is_file() for file in found["pictures"])
    again = run(*words)  # reuses the finished run
    assert "times chance" in again.stdout
    assert "step 1/1" not in again.stderr
    assert str(tmp_path / "demo") in run(*words, "seed=5", code=2).stderr


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokdyn.cli.models.read", interrupted)
    assert run("models", code=frame.EXIT_INTERRUPTED).stderr == "Interrupted.\n"


def test_program_runs_from_another_folder_and_keeps_its_exit_codes(tmp_path: Path) -> None:
    """The installed program, in a new process."""
    program = [sys.executable, "-m", "tokdyn.cli.main"]
    done = subprocess.run([*program, "recipes", "nope"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "tokdyn recipes" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_saves_and_prints_how_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "demo", *TINY, "training.steps=100000", f"out={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokdyn.cli.main", *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"tokdyn train {folder} --resume" in rest
