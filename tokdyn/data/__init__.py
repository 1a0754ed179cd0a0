"""Open data sets of images or latents, and draw batches from them for training.

The names are loaded when they are first used, so that settings can be checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.data.base import Dataset
    from tokdyn.data.config import DataConfig
    from tokdyn.data.detail import DetailScore, detail_area, detail_score, detail_shares
    from tokdyn.data.factory import open_data
    from tokdyn.data.features import FeaturesReport, write_features
    from tokdyn.data.features_config import FeaturesConfig
    from tokdyn.data.images import ImageDataset
    from tokdyn.data.latents import LatentDataset
    from tokdyn.data.shapes import ShapesDataset
    from tokdyn.data.stream import BatchStream

__all__ = [
    "BatchStream",
    "DataConfig",
    "Dataset",
    "DetailScore",
    "FeaturesConfig",
    "FeaturesReport",
    "ImageDataset",
    "LatentDataset",
    "ShapesDataset",
    "detail_area",
    "detail_score",
    "detail_shares",
    "open_data",
    "write_features",
]

__getattr__ = loading(
    __name__,
    {
        "BatchStream": ".stream",
        "DataConfig": ".config",
        "Dataset": ".base",
        "DetailScore": ".detail",
        "FeaturesConfig": ".features_config",
        "FeaturesReport": ".features",
        "ImageDataset": ".images",
        "LatentDataset": ".latents",
        "ShapesDataset": ".shapes",
        "detail_area": ".detail",
        "detail_score": ".detail",
        "detail_shares": ".detail",
        "open_data": ".factory",
        "write_features": ".features",
    },
)
