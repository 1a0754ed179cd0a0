"""A tiny text-to-image pipeline in a folder."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from tests.contract.models import TINY
from tests.contract.pipelines import vae


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a PixArt pipeline with a tokenizer and a text encoder."""
    transformers = pytest.importorskip("transformers")
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
