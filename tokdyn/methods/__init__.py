"""Token-reduction methods: each an immutable configuration, its modules, its cost and its losses."""

from tokdyn.methods.base import Method
from tokdyn.methods.chunking import Chunking, ChunkingModule

__all__ = ["Chunking", "ChunkingModule", "Method"]
