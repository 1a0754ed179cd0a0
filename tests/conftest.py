"""Settings shared by every test, no network, no windows, repeatable draws; and fixtures of several files."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

# Before any test imports torch, matplotlib or a hub client.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKDYN_CACHE"] = tempfile.mkdtemp(prefix="tokdyn-")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.pairwise import covering

# Times measure the machine and not the code; derandomised runs fail the same way for everybody.
settings.register_profile("tokdyn", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tokdyn")


THREADS = torch.get_num_threads()
ROOMS, MANY, SHARE = ("contract", "calibration"), 6, 4  # of tests that are repeated MANY times, one in SHARE runs
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "square")  # of the text encoders of pipelines


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TOKDYN_CACHE"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--product",
        action="store_true",
        help="run whole products of models, methods and laws instead of a pairwise covering of them (make test-all)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a pairwise covering of the tests of each group, `@pytest.mark.pairwise(group, cost=1)`.

    The test function is one factor and each parameter another. A test that costs more than others runs as rarely as
    possible. Of other tests of the contract and of calibration that are repeated for many models or methods, a quarter
    is kept; a checksum chooses, so that every model is in a quarter of them. A test named on the command line runs.
    """
    if config.getoption("product"):
        return
    groups: dict[str, list[pytest.Item]] = {}
    alike: dict[str, list[pytest.Item]] = {}
    for item in items:
        if mark := item.get_closest_marker("pairwise"):
            groups.setdefault(mark.args[0], []).append(item)
        elif item.path.parent.name in ROOMS:
            alike.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for each in alike.values():
        if len(each) >= MANY:
            left_out.update(item for item in each if crc32(item.nodeid.encode()) % SHARE)
    for group in groups.values():
        rows = [
            [("test", item.nodeid.split("[")[0]), *((name, str(value)) for name, value in item.callspec.params.items())]
            for item in group
        ]
        left_out.update(group)
        costs = [item.get_closest_marker("pairwise").kwargs.get("cost", 1) for item in group]
        left_out.difference_update(group[index] for index in covering(rows, costs))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Exempt the million objects that imports make from garbage collection, which takes a second with them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture
def nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out all adapters of the package, so that everything about a model is inferred."""
    monkeypatch.setattr("tokdyn.adapters.registry.ADAPTERS", ())


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """`with largest_file(bytes):` the system refuses to write a longer file, as a full disk would."""

    import resource  # POSIX only

    @contextmanager
    def refuse(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return refuse


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state and number of threads, which commands that time something change."""
    torch.manual_seed(0)
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a tiny DC-DiT as training does, and return its folder."""
    from tests.sampling import FACTS, tiny
    from tokdyn.train.snapshot import save_model

    save_model(tiny(0), tmp_path / "saved", FACTS)
    return tmp_path / "saved"


def tokenizer() -> Any:
    """Build a tokenizer of seven words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a PixArt pipeline with a tokenizer and a text encoder."""
    transformers = pytest.importorskip("transformers")
    import diffusers

    from tests.contract.models import TINY
    from tests.contract.pipelines import vae

    model = TINY["PixArtTransformer2DModel"].build()
    torch.manual_seed(0)
    width = model.config.caption_channels
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    pipe = diffusers.PixArtSigmaPipeline(tokenizer(), encoder, vae(), model, diffusers.DDIMScheduler())
    folder = tmp_path_factory.mktemp("pipe") / "pixart"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Wan 2.2 pipeline, whose second transformer takes over below a noise level of 0.875."""
    transformers = pytest.importorskip("transformers")
    from tests.contract.pipelines import build

    pipe, other = build("Wan"), build("Wan").transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.UMT5EncoderModel(config).eval()
    pipe.register_modules(transformer_2=other, tokenizer=tokenizer(), text_encoder=encoder)
    pipe.register_to_config(boundary_ratio=0.875)
    folder = tmp_path_factory.mktemp("pipe") / "wan"
    pipe.save_pretrained(folder)
    return folder
