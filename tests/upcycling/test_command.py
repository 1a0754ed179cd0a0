"""`tokdyn upcycle` on a text-to-image pipeline in a folder, with its text encoder and random weights."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tokdyn import Chunking
from tokdyn.errors import CheckpointError, InputError
from tokdyn.host import describe, open_device
from tokdyn.upcycling.command import PipelineResult, upcycle_pipeline
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.pipelines import METHODS

PROMPTS = ("a red square", "a blue square")
QUICK = ["steps=30", "lr=3e-3", "sampling_steps=3", "guidance=2", "seed=5", "height=16", "width=16", "target=2"]
SMALL: dict[str, Any] = {"height": 16, "width": 16, "sampling_steps": 1, "steps": 1, "target": 2}


def run(*words: Any, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@dataclass(frozen=True)
class Finished:
    """A run of the command that was finished: its arguments, its folder, and what it printed."""

    words: list[Any]
    out: Path
    report: dict[str, Any]
    notes: str

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("a red square\n\n a blue square \n")
    words = ["upcycle", "--base", pipeline, *QUICK, f"prompts={folder / 'prompts.txt'}", "device=cpu"]
    shown, notes = run(*words, "--method", "dc", f"out={folder / 'out'}", "--json")
    return Finished(words, folder / "out", json.loads(shown), notes)


def stored_methods(folder: Path) -> list[dict[str, Any]]:
    """Read the settings of the methods that a run has written."""
    with safe_open(folder / METHODS, "pt") as file:
        settings: list[dict[str, Any]] = json.loads(file.metadata()["tokdyn"])["methods"]
    return settings


def opened(folder: Path) -> Any:
    """Load a pipeline, with no bars."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, number: int) -> np.ndarray:
    """Draw the image of a prompt of the finished run, as diffusers alone draws it."""
    generator = torch.Generator().manual_seed(5 + number)
    image = pipe(
        PROMPTS[number], generator=generator, num_inference_steps=3, guidance_scale=2.0, height=16, width=16,
        use_resolution_binning=False, output_type="np",
    ).images[0]  # fmt: skip
    return np.rint(255 * image).astype(np.uint8)


def found(page: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    """Return the (top, left) corners at which an image lies in a page."""
    height, width = image.shape[:2]
    first, last = (
        (page[top : top + page.shape[0] - height + 1, left : left + page.shape[1] - width + 1] == pixel).all(axis=-1)
        for top, left, pixel in ((0, 0, image[0, 0]), (height - 1, width - 1, image[-1, -1]))
    )
    corners = np.argwhere(first & last).tolist()
    return [(y, x) for y, x in corners if np.array_equal(page[y : y + height, x : x + width], image)]


def test_the_error_falls_and_the_report_holds_means_over_a_tenth_of_the_steps(finished: Finished) -> None:
    outputs = [row["output"] for row in finished.rows()]
    assert len(outputs) == 30
    assert finished.report["error"] == pytest.approx({"first": np.mean(outputs[:3]), "last": np.mean(outputs[-3:])})
    assert finished.report["error"]["last"] < finished.report["error"]["first"]


def test_the_report_describes_the_run(finished: Finished, pipeline: Path) -> None:
    report = finished.report
    assert {"folder": str(finished.out), **json.loads((finished.out / "upcycle.json").read_text())} == report
    assert (report["tokdyn"], report["methods"]) == (tokdyn.__version__, ["dc"])
    assert report["model"] == type(opened(pipeline).transformer).__name__
    assert report["calls"] == 2 * 3
    assert report["machine"] == describe(torch.device("cpu"))
    given = {"base": str(pipeline), "prompts": list(PROMPTS), "guidance": 2.0, "out": str(finished.out), "lr": 3e-3}
    assert report["settings"].items() >= given.items()


def test_the_summary_counts_parameters_and_flops(finished: Finished, pipeline: Path) -> None:
    """Against the files of base and methods, and against a call of the model with and without Chunking."""
    summary = finished.report["before_the_first_step"]
    model = opened(pipeline).transformer
    stored = load_file(finished.out / METHODS)
    new = sum(value.numel() for value in stored.values() if value.is_floating_point())
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} " in summary["kept as is"]
    assert f"{new:,} " in summary["new"]
    assert "Chunking" in summary["new"]
    pipe = opened(pipeline)
    with tokdyn.recording(pipe.transformer) as calls:
        drawn(pipe, 0)
    before = tokdyn.flops(model, **calls[0]).total
    after = tokdyn.flops(tokdyn.wrap(model, [Chunking(target=2)]), **calls[0]).total
    images = len(calls[0]["hidden_states"])
    assert images == 2  # with guidance
    for number in (f"{before / images / 1e9:.3f}", f"{after / images / 1e9:.3f}", f"{after / before:.2f}x"):
        assert number in summary["call"]
    lines = finished.notes[finished.notes.index("kept as is") :].splitlines()
    for line, (what, text) in zip(lines, summary.items(), strict=False):
        assert line.startswith(what)
        assert line.endswith(f" {text}")


def test_the_picture_holds_the_images_before_and_after(finished: Finished, pipeline: Path) -> None:
    """One row per prompt; whoever loads the methods draws the same images, with the share of FLOPs that is reported."""
    shown = (finished.out / "upcycle.html").read_text()
    assert shown.count("<img") == 2 * shown.count('scope="row"') > 0
    with Image.open(finished.out / "images.png") as file:
        page = np.asarray(file.convert("RGB"))
    places = []
    for upcycled in (False, True):
        pipe = opened(pipeline)
        if upcycled:
            tokdyn.load(pipe.transformer, finished.out / METHODS)
            pipe.transformer.eval()
        for number in range(2):
            image = drawn(pipe, number).repeat(6, axis=0).repeat(6, axis=1)  # enlarged to 96 pixels
            assert image.std() > 0
            places.append(found(page, image))
    assert tokdyn.stats(pipe.transformer).share == pytest.approx(finished.report["share_of_block_flops"])
    assert finished.report["share_of_block_flops"] < 1
    (((top, left),), ((below, _),), ((beside, right),), ((last, end),)) = places
    assert top == beside < below == last
    assert left < right == end
    assert (page[top : top + 96, :left] != 255).any()  # the title of the row
    assert (page[:top, left : left + 96] != 255).any()  # and of the column


def test_drawing_shows_no_bars(finished: Finished) -> None:
    assert "3/3" not in finished.notes


def test_a_finished_run_is_continued_only_if_asked_for(finished: Finished) -> None:
    refused = run(*finished.words, f"out={finished.out}", code=2)[1]
    assert str(finished.out) in refused
    before = finished.rows()
    again, _ = run(*finished.words, f"out={finished.out}", "steps=31", "--resume", "--json")
    assert finished.rows()[:30] == before
    assert len(finished.rows()) == 31
    assert json.loads(again)["error"]["first"] == finished.report["error"]["first"]


def test_words_that_do_not_go_with_a_pipeline_are_named(finished: Finished, tmp_path: Path) -> None:
    for words, named in (
        (["--dry-run"], "--dry-run"),
        (["--recipe", "demo"], "--recipe"),
        (["trained=all", "precision=bf16"], "precision=fp32"),
        (["speed=3"], "'speed'"),
        (["prompts=nowhere.txt"], "nowhere.txt"),
    ):
        assert named in run(*finished.words, f"out={tmp_path / 'out'}", *words, code=2)[1]
    assert not (tmp_path / "out").exists()


class Told:
    """Notes the dtypes of the transformers that there are when the summary is told, beside those of before."""

    def __init__(self) -> None:
        self._before = self._all()  # kept, so that no new one has the id of an old one
        self.dtypes: list[torch.dtype] = []

    def _all(self) -> list[Any]:
        return [each for each in gc.get_objects() if issubclass(type(each), diffusers.PixArtTransformer2DModel)]

    def __call__(self, text: str) -> None:
        before = {id(each) for each in self._before}
        self.dtypes = [each.proj_out.weight.dtype for each in self._all() if id(each) not in before]


def test_the_whole_transformer_is_trained_by_a_copy_of_the_original(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other settings have their defaults: the folder, the prompts and the device too."""
    monkeypatch.chdir(tmp_path)
    told = Told()
    config = PipelineConfig(base=str(pipeline), trained="all", **{**SMALL, "steps": 2})
    result = upcycle_pipeline(config, ["dc"], tell=told)
    assert result.folder == Path("upcycled") / pipeline.name
    assert told.dtypes == [torch.float32] * 2
    outputs = [json.loads(line)["output"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert result.report["error"] == pytest.approx({"first": outputs[0], "last": outputs[1]})
    assert result.report["calls"] == len(config.prompts) == 1
    assert result.report["machine"] == describe(open_device("auto"))
    assert result.report["settings"]["out"] is None
    frozen = result.report["before_the_first_step"]["frozen"]
    assert frozen.startswith("none")
    base = opened(pipeline).transformer
    trained = diffusers.PixArtTransformer2DModel.from_pretrained(result.folder / "transformer")
    pairs = list(zip(base.parameters(), trained.parameters(), strict=True))
    assert sum(not torch.equal(one, other) for one, other in pairs) > len(pairs) / 2


def test_the_original_is_released_where_it_does_not_teach(pipeline: Path, tmp_path: Path) -> None:
    """With DynamicWidth alone, which has no target of its own here, in half precision."""
    told = Told()
    config = PipelineConfig(base=str(pipeline), out=tmp_path / "out", precision="bf16", device="cpu", **SMALL)
    result = upcycle_pipeline(config, ["dydit"], tell=told)
    assert told.dtypes == [torch.bfloat16]
    assert not (tmp_path / "out" / "transformer").exists()
    assert not result.report["before_the_first_step"]["frozen"].startswith("none")
    (method,) = stored_methods(tmp_path / "out")
    assert method["method"] == "DynamicWidth"


def test_runs_repeat_whatever_was_drawn_before(pipeline: Path, tmp_path: Path) -> None:
    """Two runs with the same settings write the same bytes; the methods have the target asked for."""
    written = []
    for number in range(2):
        torch.manual_seed(number)
        config = PipelineConfig(base=str(pipeline), out=tmp_path / str(number), device="cpu", **SMALL)
        result = upcycle_pipeline(config, ["dc", "dydit"])
        written.append((result.folder / METHODS).read_bytes())
    assert written[0] == written[1]
    assert "Chunking, DynamicWidth" in result.report["before_the_first_step"]["new"]
    methods = stored_methods(result.folder)
    assert [each["method"] for each in methods] == ["Chunking", "DynamicWidth"]
    assert methods[0]["target"] == 2.0


def test_settings_of_a_run_stay_but_for_those_of_its_length_and_place(pipeline: Path, tmp_path: Path) -> None:
    """The pipeline draws as many steps as it does by default; what is changed is named before anything is drawn."""
    size = {"height": 16, "width": 16}
    config = PipelineConfig(base=str(pipeline), out=tmp_path / "out", steps=1, device="cpu", **size)
    first = upcycle_pipeline(config, ["dc"])
    assert first.report["calls"] == 20  # of PixArtSigmaPipeline
    changes: list[dict[str, Any]] = [
        {"prompts": ("a",)}, {"target": 2.0}, {"sampling_steps": 2}, {"guidance": 0.0}, {"height": 8}, {"calls": 2},
        {"lr": 0.1}, {"warmup_steps": 1}, {"trained": "all"}, {"seed": 1}, {"precision": "bf16"},
        {"base": str(tmp_path)}, {"height": 8, "width": 8},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(CheckpointError, match=rf"\b{', '.join(change)}\."):
            upcycle_pipeline(config.model_copy(update=change), ["dc"], resume=True)
    with pytest.raises(CheckpointError, match=r"\bmethods\b"):
        upcycle_pipeline(config, ["dc", "dydit"], resume=True)
    moved = {"out": tmp_path / "moved", "steps": 2, "checkpoint_every": 1, "device": "auto"}
    (tmp_path / "out").rename(tmp_path / "moved")
    longer = upcycle_pipeline(config.model_copy(update=moved), ["dc"], resume=True)
    assert longer.report["error"]["first"] == first.report["error"]["first"]
    assert (tmp_path / "moved" / "upcycle.json").is_file()


def test_a_result_cannot_be_changed(tmp_path: Path) -> None:
    result: Any = PipelineResult(tmp_path, {})
    with pytest.raises(AttributeError):
        result.folder = None


def test_a_pipeline_with_two_transformers_is_refused_by_their_names(experts: Path, tmp_path: Path) -> None:
    config = PipelineConfig(base=str(experts), out=tmp_path / "out", device="cpu", steps=1)
    with pytest.raises(InputError, match="transformer and transformer_2"):
        upcycle_pipeline(config, ["dc"])
    assert not (tmp_path / "out").exists()


def test_lora_makes_a_pipeline_with_a_budget(pipeline: Path, tmp_path: Path) -> None:
    """One file holds what was trained; drawn at a smaller budget, the images differ and cost less."""
    out = tmp_path / "out"
    words = [
        "upcycle",
        "--base",
        pipeline,
        "--method",
        "dc",
        *QUICK,
        "device=cpu",
        f"out={out}",
        "prompts=a red square",
    ]
    more = ["trained=lora", "rank=4", "tail_drops=0,0.5", "calls=2", "--gradient-checkpointing"]
    shown, notes = run(*words, *more)
    assert "LoRA" in notes
    assert "MiB" in next(line for line in notes.splitlines() if line.startswith("memory"))
    report = json.loads((out / "upcycle.json").read_text())
    assert [each["tail_drop"] for each in report["budgets"]] == [0.0, 0.5]
    for each in report["budgets"]:
        assert each["error"] < each["error_before"]
        assert f"{each['error']:.4f}" in shown
    full, lean = report["budgets"]
    assert lean["gflops_per_image"] < full["gflops_per_image"]
    assert report["memory"]["worked_out"]["step"] > 0
    assert not (out / "methods").exists()
    drawing = ["prompts=a red square", "steps=3", "height=16", "width=16", "device=cpu", f"methods={out / METHODS}"]
    for drop in ("0", "0.5"):
        run("sample", pipeline, *drawing, f"tail_drop={drop}", f"out={tmp_path / drop}")
    images = [next((tmp_path / drop).glob("*.png")).read_bytes() for drop in ("0", "0.5")]
    assert images[0] != images[1]
    refused = run("sample", pipeline, "prompts=a red square", "tail_drop=0.5", f"out={tmp_path / 'no'}", code=2)[1]
    assert "methods=" in refused


@pytest.mark.slow
def test_images_are_drawn_while_it_trains_and_a_resumed_run_gets_the_same(pipeline: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "steps": 4, "steps_per_image": 2, "calls": 2, "checkpoint_every": 1}
    config = PipelineConfig(base=str(pipeline), device="cpu", trained="lora", **settings)
    found = []
    for name, lengths in (("whole", (4,)), ("half", (3, 4))):
        for steps in lengths:
            changes = {"out": tmp_path / name, "steps": steps}
            result = upcycle_pipeline(config.model_copy(update=changes), ["dc"], resume=steps != lengths[0])
        found.append((result.folder / METHODS).read_bytes())
    assert found[0] == found[1]


def test_memory_that_is_not_there_is_refused_before_the_first_step(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokdyn.upcycling.command.free_memory", lambda device: 1000.0)
    config = PipelineConfig(base=str(pipeline), out=tmp_path / "out", device="cpu", trained="lora", **SMALL)
    with pytest.raises(InputError, match="gradient_checkpointing=true"):
        upcycle_pipeline(config, ["dc"])
    assert not (tmp_path / "out").exists()
