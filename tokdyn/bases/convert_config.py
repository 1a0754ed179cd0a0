"""Settings of `tokdyn convert`. They load no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tokdyn.checkpoints.formats import Kind, Layout
from tokdyn.files import UserPath


class ConvertConfig(BaseModel):
    """Settings of `tokdyn convert`.

    Attributes:
        source: A checkpoint file or folder, a name of `tokdyn models`, or OWNER/REPO[:FILE_OR_FOLDER] of the hub.
        destination: A path that does not exist yet: a .safetensors file for `official` and `facebook`, otherwise a
            folder.
        to: The layout: a folder for diffusers' DiTTransformer2DModel (`diffusers`) or for tokdyn (`tokdyn`), or a file
            for the public code of DC-DiT (`official`) or DiT (`facebook`).
        kind: The format of the source; null recognises it. For SiT, set `sit`, and for the SiT of REPA `repa`, because
            their tensors have the names of DiT's.
        dtype: Dtype of the written tensors; `int8` is for the layout `tokdyn`, and stores a scale for each row of a
            matrix.
        ema: Take the averaged weights if the source holds averaged and plain ones.
        num_heads: Number of attention heads, if neither the width nor the source determines it.
        sample_size: Input size in pixels or latent pixels, one number or (rows, columns), if the source does not
            determine it.
        patch_size: Patch size of a DC-DiT whose source does not determine it; null takes 1.
        timestep_shift: Timestep frequencies to read diffusers' weights with: 0 for facebook's, 1 for diffusers' own.
        mlp_norm_eps: Epsilon of the norm before the MLP: 1e-6 in facebook's DiT, 1e-5 in diffusers'.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    destination: UserPath
    to: Layout
    kind: Kind | None = None
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    ema: bool = True
    num_heads: int | None = Field(default=None, ge=1)
    sample_size: int | tuple[int, int] | None = None
    patch_size: int | None = Field(default=None, ge=1)
    timestep_shift: int | None = Field(default=None, ge=0, le=1)
    mlp_norm_eps: float | None = Field(default=None, gt=0.0)
