"""`tokdyn upcycle` on a text-to-image pipeline in a folder, with its text encoder and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import vae
from tokdyn.errors import InputError
from tokdyn.upcycling.command import PipelineConfig, is_pipeline, upcycle_pipeline

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a PixArt pipeline with a tokenizer and a text encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "a", "red", "blue", "square"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = TINY["PixArtTransformer2DModel"].build()
    torch.manual_seed(0)
    width = model.config.caption_channels
    config = transformers.T5Config(vocab_size=len(words), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    pipe = diffusers.PixArtSigmaPipeline(fast_tokenizer, encoder, vae(), model, diffusers.DDIMScheduler())
    folder = tmp_path_factory.mktemp("pipe") / "pixart"
    pipe.save_pretrained(folder)
    return folder


QUICK = ["steps=60", "lr=3e-3", "sampling_steps=3", "height=16", "width=16", "target=2", "device=cpu"]


def run(*words: Any, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_pipeline_is_upcycled_and_resumed(pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\na blue square\n")
    out = tmp_path / "out"
    shown, notes = run(
        "upcycle", "--base", pipeline, "--method", "dc", *QUICK, f"prompts={prompts}", f"out={out}", "--json"
    )
    report = json.loads(shown)
    assert report["calls"] == 2 * 3
    for word in ("new ", "frozen", "GFLOPs per image"):
        assert word in notes  # before the first step
    assert report["error"]["last"] < report["error"]["first"]
    assert 0 < report["share_of_block_flops"] < 1
    with Image.open(out / "images.png") as image:
        assert np.asarray(image).std() > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    tokdyn.load(pipe.transformer, out / "methods")
    images = pipe(
        "a red square", num_inference_steps=2, height=16, width=16, output_type="np", use_resolution_binning=False
    ).images
    assert images.shape == (1, 16, 16, 3)
    assert tokdyn.stats(pipe.transformer).share < 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    refused = run("upcycle", "--base", pipeline, *QUICK, f"prompts={prompts}", f"out={out}", code=2)[1]
    assert str(out) in refused
    again, _ = run(
        "upcycle", "--base", pipeline, *QUICK, f"prompts={prompts}", f"out={out}", "steps=62", "--resume", "--json"
    )
    assert json.loads(again)["error"]["first"] == report["error"]["first"]
    other = tmp_path / "other"
    twice, _ = run("upcycle", "--base", pipeline, *QUICK, f"prompts={prompts}", f"out={other}", "--json")
    assert json.loads(twice)["error"] == report["error"]
    for words, named in (
        ([f"out={other}", "target=3", "--resume"], "target"),
        (["--dry-run"], "--dry-run"),
        (["--recipe", "demo"], "--recipe"),
        (["trained=all", "precision=bf16"], "precision=fp32"),
    ):
        assert named in run("upcycle", "--base", pipeline, *QUICK, f"prompts={prompts}", *words, code=2)[1]


def test_invalid_settings_and_methods_are_refused(pipeline: Path, tmp_path: Path) -> None:
    assert is_pipeline(str(pipeline))
    assert not is_pipeline(None)
    assert not is_pipeline(str(pipeline / "transformer"))
    base = ["upcycle", "--base", pipeline, f"out={tmp_path / 'out'}"]
    for words, named in (
        (["height=16"], "height and width"),
        (["prompts=nowhere.txt"], "nowhere.txt"),
        (["target=1"], "target"),
        (["speed=3"], "'speed'"),
    ):
        assert named in run(*base, *words, code=2)[1]
    with pytest.raises(InputError, match="'cache'"):
        upcycle_pipeline(
            PipelineConfig(base=str(pipeline), out=tmp_path / "out", sampling_steps=1, height=16, width=16), ["cache"]
        )
