"""Token-reduction methods: the settings of each and, if it is trained, its modules. They know nothing of any model."""

from tokdyn.methods.base import Method, Sizes, Stage, Traits
from tokdyn.methods.chunking import Chunking, ChunkingModule
from tokdyn.methods.depth_skip import DepthSkip, SkipGates
from tokdyn.methods.dynamic_width import DynamicWidth, WidthGates
from tokdyn.methods.feature_cache import TEACACHE_FLUX, FeatureCache
from tokdyn.methods.registry import METHODS, find_method, register_method
from tokdyn.methods.token_drop import TokenDrop
from tokdyn.methods.token_merge import TokenMerge

for _method in (Chunking, TokenMerge, TokenDrop, DepthSkip, DynamicWidth, FeatureCache):  # the order of tables
    METHODS[_method.__name__] = METHODS.pop(_method.__name__)

__all__ = [
    "METHODS",
    "TEACACHE_FLUX",
    "Chunking",
    "ChunkingModule",
    "DepthSkip",
    "DynamicWidth",
    "FeatureCache",
    "Method",
    "Sizes",
    "SkipGates",
    "Stage",
    "TokenDrop",
    "TokenMerge",
    "Traits",
    "WidthGates",
    "find_method",
    "register_method",
]
