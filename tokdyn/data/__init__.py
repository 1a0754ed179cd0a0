"""Data sets, and the stream of batches that training draws from them."""

from tokdyn.data.base import Dataset
from tokdyn.data.config import DataConfig
from tokdyn.data.detail import DetailScore, detail_score
from tokdyn.data.factory import open_data
from tokdyn.data.images import ImageDataset
from tokdyn.data.shapes import ShapesDataset
from tokdyn.data.stream import BatchStream

__all__ = [
    "BatchStream",
    "DataConfig",
    "Dataset",
    "DetailScore",
    "ImageDataset",
    "ShapesDataset",
    "detail_score",
    "open_data",
]
