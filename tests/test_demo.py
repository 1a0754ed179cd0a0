"""The router's score and the time limit of the demo. The whole demo runs in tests/cli/test_commands.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tokdyn.data import ShapesDataset
from tokdyn.demo import DemoSettings, demo, score_router
from tokdyn.demo.pictures import draw_router
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT
from tokdyn.tokens import Routing


@dataclass
class _Output:
    routing: Routing


class Contrast(torch.nn.Module):
    """A router without learning: it keeps the quarter of the cells that differ most from their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, **_: Any) -> _Output:
        blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        surprise = torch.nn.functional.avg_pool2d((x - blurred).abs().sum(1), 2).flatten(1)
        keep = surprise > surprise.quantile(0.75, dim=1, keepdim=True)
        return _Output(Routing(surprise, keep, keep, (x.shape[2] // 2, x.shape[3] // 2)))


@pytest.fixture
def shapes() -> ShapesDataset:
    return ShapesDataset((32, 32))


def test_router_of_contrast_beats_chance_until_noise_hides_the_detail(shapes: ShapesDataset) -> None:
    clear, noisy = (score_router(Contrast(), Objective(), shapes, range(64), level) for level in (0.02, 0.9))
    assert clear.level == pytest.approx(0.02, abs=0.01)
    assert clear.detail.kept == pytest.approx(0.25, abs=0.01)
    assert clear.detail.lift > 2.5
    assert noisy.detail.lift < 1.3
    assert 0.75 < clear.area < clear.best_area < 1.0
    assert noisy.area == pytest.approx(0.5, abs=0.1)
    assert noisy.best_area == clear.best_area


def test_score_depends_on_its_seed_alone(shapes: ShapesDataset) -> None:
    model = DCDiT.named("tiny", sample_size=32, patch_size=2, in_channels=3, num_classes=10)
    model.train()
    first, again, far = (score_router(model, Objective(), shapes, range(4), 0.5, seed=s) for s in (3, 3, 3 + 2**32))
    assert first == again != far
    assert model.training


def test_picture_is_written(shapes: ShapesDataset, tmp_path: Path) -> None:
    path = draw_router(Contrast(), Objective(), shapes, range(3), (0.1, 0.5), tmp_path / "new" / "router.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=tmp_path.name):
        demo(DemoSettings(train=True, out=tmp_path))


def test_time_limit_stops_training_and_the_next_call_resumes_it(tmp_path: Path) -> None:
    lengths = {"minutes": 1e-6, "training_steps": 7, "sampling_steps": 1, "count": 1, "scored": 8}
    settings = DemoSettings(train=True, out=tmp_path / "run", **lengths)
    stopped = demo(settings)
    assert (stopped.steps, stopped.planned) == (5, 7)
    assert [budget.images for budget in stopped.samples.budgets] == [1, 1, 1]
    finished = demo(settings.model_copy(update={"minutes": 10.0}))
    assert (finished.steps, finished.planned) == (7, 7)
    assert demo(settings).steps == 7
