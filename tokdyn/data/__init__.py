"""Open data sets of images or latents, and draw batches from them for training."""

from tokdyn.data.base import Dataset
from tokdyn.data.config import DataConfig
from tokdyn.data.detail import DetailScore, detail_score
from tokdyn.data.factory import open_data
from tokdyn.data.features import FeaturesConfig, FeaturesReport, write_features
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
    "detail_score",
    "open_data",
    "write_features",
]
