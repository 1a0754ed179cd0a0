"""Bases open by name, hub id and path from caches filled by hand, without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import tokdyn
from tokdyn.attach import attachment_of
from tokdyn.bases import open_base, read_base, rows, table
from tokdyn.bases.download import cache_folder, digest
from tokdyn.bases.locating import in_cache, locate
from tokdyn.bases.names import names_pipeline
from tokdyn.checkpoints import read, to_facebook, to_official
from tokdyn.checkpoints.writer import write
from tokdyn.data.vae import load_vae
from tokdyn.errors import CheckpointError, DataError
from tokdyn.models import DCDiT, DiT

SMALL: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "sample_size": 8}


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def small(**settings: Any) -> DiT:
    model: DiT = shaken(DiT(**{**SMALL, "patch_size": 2, **settings}))
    return model


def equal(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches and no network. huggingface_hub reads its environment on import, so its constants are patched."""
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def hub_file(folder: Path, repo: str, name: str, source: Path, commit: str = "a" * 40) -> Path:
    """Put a file into a cache of the hub as huggingface_hub does: a link to a blob that is named by its sha256."""
    root = folder / f"models--{repo.replace('/', '--')}"
    blob = root / "blobs" / digest(source)
    link = root / "snapshots" / commit / name
    for path in (blob, link, root / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, blob)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs" / "main").write_text(commit)
    return link


def fill(name: str, tmp_path: Path) -> Path:
    """Put small random weights where a named base is looked up."""
    row, hub, given = rows()[name], tmp_path / "hub", tmp_path / "given.pt"
    if row.kind == "diffusers":
        folder = write(small(timestep_shift=1, mlp_norm_eps=1e-5), tmp_path / "given", "diffusers").place
        repo, _, inside = row.place.partition(":")
        for file in folder.iterdir():
            link = hub_file(hub, repo, f"{inside}/{file.name}", file)
        return link.parent
    if row.kind == "dc-dit":
        torch.save({"ema": to_official(shaken(DCDiT(**SMALL, force_ends=True)))}, given)
        repo, _, inside = row.place.partition(":")
        return hub_file(hub, repo, f"{inside}/anything.pt", given).parent
    weights = to_facebook(small())
    if row.kind == "dydit":
        for block in range(2):
            for part, shape in (("attn_rate.router", (3, 32)), ("mlp_rate.router", (3, 32))):
                weights |= _layer(f"blocks.{block}.{part}", *shape)
            weights |= _layer(f"blocks.{block}.token_selection.mlp_head.0", 2, 32)
            weights |= _layer(f"blocks.{block}.token_selection.mlp_head.2", 1, 2)
        torch.save({"ema": weights, "args": Namespace(lr=1.0)}, given)
        repo, _, inside = row.place.partition(":")
        return hub_file(hub, repo, inside, given)
    place = tmp_path / "cache" / row.file
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, place)
    return place


def _layer(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


NAMES = list(rows())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_opens_from_a_filled_cache(name: str, tmp_path: Path) -> None:
    row = rows()[name]
    if row.source == "shipped":
        assert in_cache(row)
        return
    assert not in_cache(row)
    place = fill(name, tmp_path)
    assert in_cache(row)
    base = read_base(name, num_heads=4)
    assert (base.path, base.origin, base.objective) == (place, name, row.objective)
    file = place if place.is_file() else next(p for p in place.iterdir() if p.suffix != ".json")
    assert base.sha256 == digest(file)
    assert isinstance(base.model, DCDiT if row.kind == "dc-dit" else DiT)
    assert (tuple(base.model.config.timestep_map) != (1.0, 0.0)) == (row.kind == "sit")
    assert base.model.config.timestep_shift == (1 if row.kind == "diffusers" else 0)
    attachment = attachment_of(base.model)
    assert (attachment is not None) == (row.kind == "dydit")
    if attachment is not None:
        assert attachment.methods[0].target == float(name[-3:])  # type: ignore[attr-defined]
    assert equal(open_base(name, num_heads=4), base.model)


@pytest.mark.parametrize("name", NAMES)
def test_offline_errors_name_the_ways_out(name: str, tmp_path: Path) -> None:
    row = rows()[name]
    if row.source == "shipped":
        return
    place = str(tmp_path / "cache" / row.file) if row.source == "url" else str(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="the path of a file") as error:
        read_base(name)
    assert place in str(error.value)
    assert "shapes" in str(error.value)  # ships with the package
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", [small, lambda: shaken(DCDiT(**SMALL))], ids=["DiT", "DCDiT"])
def test_hub_ids_name_files_folders_and_pipelines(tmp_path: Path, model: Any) -> None:
    made = model()
    folder = write(made, tmp_path / "given", "tokdyn", facts={"objective": {"kind": "flow"}}).place
    for file in folder.iterdir():
        hub_file(tmp_path / "hub", "some-one/top.v1", file.name, file)
        hub_file(tmp_path / "hub", "some-one/deep", f"runs/ema/{file.name}", file)
        hub_file(tmp_path / "hub", "some-one/pipeline", f"transformer/{file.name}", file)
    (tmp_path / "index.json").write_text("{}")
    hub_file(tmp_path / "hub", "some-one/pipeline", "model_index.json", tmp_path / "index.json")
    weights = "diffusion_pytorch_model.safetensors"
    for name in (
        "some-one/top.v1", f"some-one/top.v1:{weights}", "some-one/deep:runs/ema", "some-one/pipeline",
        f"some-one/deep:runs/ema/{weights}",
    ):  # fmt: skip
        base = read_base(name)
        assert equal(base.model, made), name
        assert base.objective == "flow"
        assert base.sha256 == digest(folder / weights)
    with pytest.raises(CheckpointError, match=r"some-one/deep.*the path of a file"):
        read_base("some-one/deep")  # nothing in its top folder
    with pytest.raises(CheckpointError, match=r"some-one/deep:other.*the path of a file"):
        read_base("some-one/deep:other")


def test_hub_ids_do_not_lead_out_of_their_repository(tmp_path: Path) -> None:
    """The other repository is in the cache and holds a DiT, so that only its place can be the reason."""
    folder = write(small(), tmp_path / "given", "tokdyn").place
    for repo in ("some-one/own", "some-one/other"):
        for file in folder.iterdir():
            hub_file(tmp_path / "hub", repo, f"model/{file.name}", file)
    assert isinstance(read_base("some-one/own:model").model, DiT)
    other = f"../../../models--some-one--other/snapshots/{'a' * 40}/model"
    for inside in (other, f"{other}/diffusion_pytorch_model.safetensors", "model/../model"):
        with pytest.raises(CheckpointError, match=re.escape(inside)):
            read_base(f"some-one/own:{inside}")


def test_damaged_file_in_the_cache_of_the_hub_is_refused(tmp_path: Path) -> None:
    save_file(to_facebook(small()), tmp_path / "dit.safetensors")
    link = hub_file(tmp_path / "hub", "some-one/dit", "dit.safetensors", tmp_path / "dit.safetensors")
    assert isinstance(read_base("some-one/dit", num_heads=4).model, DiT)
    changed = bytearray(link.read_bytes())
    changed[-1] ^= 1
    link.resolve().write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=link.resolve().name):
        read_base("some-one/dit", num_heads=4)


def test_files_and_folders_open_by_path(tmp_path: Path) -> None:
    made = small()
    file = write(made, tmp_path / "dit.safetensors", "facebook").place
    base = read_base(file)
    assert equal(base.model, made)
    assert (base.objective, base.sha256, base.facts) == ("noise", digest(file), {})
    sit = read_base(write(made, tmp_path / "SiT.safetensors", "facebook").place, kind="sit")
    assert sit.objective == "flow"
    folder = write(sit.model, tmp_path / "own", "tokdyn").place
    assert read_base(folder).objective == "flow"  # its timestep map says so
    (folder / "tokdyn.json").write_text('{"objective": {"kind": "magic"}}')
    with pytest.raises(CheckpointError, match=r"tokdyn\.json .*'magic'.* noise .* flow"):
        read_base(folder)
    made.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    lines = "".join(f"{digest(each)}  {each.name}\n" for each in shards)
    assert len(shards) > 1
    assert read_base(tmp_path / "shards").sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_existing_paths_come_before_names(tmp_path: Path) -> None:
    made = small()
    write(made, tmp_path / "DiT-XL" / "2", "tokdyn")
    assert equal(read_base("DiT-XL/2").model, made)
    assert locate("DiT-XL/2") == (Path("DiT-XL/2"), None)


def test_methods_beside_the_weights_are_attached(tmp_path: Path) -> None:
    model = tokdyn.wrap(small(), [tokdyn.TokenMerge(ratio=0.5)])
    folder = write(model, tmp_path / "own", "tokdyn").place
    attachment = attachment_of(read_base(folder).model)
    assert attachment is not None
    assert attachment.methods == (tokdyn.TokenMerge(ratio=0.5),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "'nothing'"),
        ("", "''"),
        ("./a/b", "'./a/b'"),
        ("DiT-XL-2", r"'DiT-XL-2'.*'DiT-XL/2'"),
        ("DiT-XL/22", "'DiT-XL/2'"),
        ("a/b/c", "'a/b/c'"),
        ("--a--/b", "'--a--/b'"),
    ],
)
def test_invalid_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_base(name)


def test_shipped_base_is_listed_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "files", lambda _: tmp_path)
    assert "shapes" not in rows()
    made = small()
    write(made, tmp_path / "shapes", "tokdyn", facts={"objective": {"kind": "noise", "learn_sigma": True}})
    monkeypatch.chdir(tmp_path / "shapes")
    row = rows()["shapes"]
    assert (row.source, row.objective, in_cache(row)) == ("shipped", "noise", True)
    assert row.parameters == sum(parameter.numel() for parameter in made.parameters())
    base = read_base("shapes")
    assert equal(base.model, made)
    assert base.path == tmp_path / "shapes"
    with pytest.raises(CheckpointError, match=r"\(shapes\)"):
        read_base("DiT-XL/2")


def test_parameter_counts_of_published_models() -> None:
    """The papers count 675.13 M, including the position table of 256-pixel images."""
    assert rows()["DiT-XL/2"].parameters == 675_129_632
    assert rows()["facebook/DiT-XL-2-512"].parameters == 675_129_632 + (1024 - 256) * 1152
    assert rows()["DyDiT-XL/2-0.7"].parameters > rows()["DiT-XL/2"].parameters


def test_user_chooses_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TOKDYN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tokdyn"


def test_offline_in_a_new_process(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE=1 and HF_HUB_CACHE count as a user sets them, before anything is imported."""
    fill("facebook/DiT-XL-2-256", tmp_path)
    code = (
        "import json, tokdyn.bases as b\n"
        "m = b.open_base('facebook/DiT-XL-2-256')\n"
        "try: b.open_base('facebook/DiT-XL-2-512')\n"
        "except Exception as e: print(json.dumps([type(e).__name__, m.config.depth, str(e)]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    kind, depth, text = json.loads(done.stdout)
    assert (kind, depth) == ("CheckpointError", 2)
    assert "the path of a file" in text


def test_named_base_equals_its_file(tmp_path: Path) -> None:
    place = fill("SiT-XL/2", tmp_path)
    assert equal(open_base("SiT-XL/2", num_heads=4), read(place, kind="sit", num_heads=4))


class Hub:
    """A hub on this machine that knows one pipeline, and may close every connection without an answer."""

    def __init__(self) -> None:
        self.answers, self.asked = True, 0
        index = json.dumps({"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArt"]}).encode()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked += 1
                if not hub.answers:
                    self.close_connection = True
                    return
                known = self.path.startswith("/some/pipe/") or self.path == "/"
                self.send_response(200 if known else 404)
                for name, value in (
                    ("Content-Length", str(len(index) if known else 0)), ("ETag", '"0123"'),
                    ("X-Repo-Commit", "a" * 40), ("X-Error-Code", "" if known else "RepoNotFound"),
                ):  # fmt: skip
                    self.send_header(name, value)
                self.end_headers()
                if known and self.command == "GET":
                    self.wfile.write(index)

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    template = made.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_hub_that_does_not_answer_is_asked_once(hub: Hub, tmp_path: Path) -> None:
    """Its own client would try again for half a minute, for every file."""
    hub.answers = False
    assert not names_pipeline("some/pipe")
    with pytest.raises(CheckpointError, match=r"some/pipe .*cannot be reached"):
        locate("some/pipe")
    with pytest.raises(DataError, match=r"some/vae .*cannot be reached"):
        load_vae("some/vae")
    assert hub.asked == 1


def test_a_hub_that_answers_is_looked_into_and_then_the_cache(hub: Hub) -> None:
    assert names_pipeline("some/pipe")
    assert not names_pipeline("some/other")
    hub.answers, before = False, hub.asked
    assert names_pipeline("some/pipe")
    assert hub.asked == before


def test_names_of_models_are_not_looked_up(hub: Hub) -> None:
    assert not any(names_pipeline(name) for name in ("DiT-XL/2", "DC-DiT-S", *rows()))
    assert hub.asked == 0
