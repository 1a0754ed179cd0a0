"""Token-reduction methods: each an immutable configuration, its modules, its cost and its losses."""

from tokdyn.methods.base import Method, Sizes
from tokdyn.methods.chunking import Chunking, ChunkingModule
from tokdyn.methods.depth_skip import DepthSkip, SkipGates
from tokdyn.methods.dynamic_width import DynamicWidth, WidthGates
from tokdyn.methods.feature_cache import TEACACHE_FLUX, FeatureCache
from tokdyn.methods.token_drop import TokenDrop
from tokdyn.methods.token_merge import TokenMerge

METHODS: dict[str, type[Method]] = {
    each.__name__: each for each in (Chunking, TokenMerge, TokenDrop, DepthSkip, DynamicWidth, FeatureCache)
}

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
    "TokenDrop",
    "TokenMerge",
    "WidthGates",
]
