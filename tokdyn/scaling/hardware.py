"""List GPUs, and the nodes that they are sold in, with the numbers that their maker publishes."""

from __future__ import annotations

from dataclasses import dataclass

_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_DGX_H100 = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"
_DGX_A100 = "https://docs.nvidia.com/dgx/dgxa100-user-guide/introduction-to-dgxa100.html"


@dataclass(frozen=True)
class Gpu:
    """A GPU in its node.

    Attributes:
        name: as the maker calls it.
        bf16: FLOPs per second of its tensor cores in bf16, dense: half of what is published for sparse matrices.
        fp32: FLOPs per second in fp32, without tensor cores. PyTorch rounds no fp32 product to TF32 by default.
        memory: bytes, as published (1 GB is 10^9 bytes).
        link: bytes per second that it sends to other GPUs of its node, which is half of what is published for both
            directions.
        network: bytes per second that it sends out of the node, through a network card of its own.
        per_node: GPUs of a node.
        sources: addresses of the pages with these numbers: that of the GPU, and that of the node.
    """

    name: str
    bf16: float
    fp32: float
    memory: int
    link: float
    network: float
    per_node: int
    sources: tuple[str, str]

    def peak(self, precision: str) -> float:
        """Return the FLOPs per second in a precision, "bf16" or "fp32"."""
        return self.bf16 if precision == "bf16" else self.fp32

    def bandwidth(self, gpus: int) -> float:
        """Return the bytes per second that each of some GPUs sends in a ring over all of them.

        A ring crosses the network twice per node. There are as many rings as network cards, each with a part of the
        data, so the cards of a node add up.

        Args:
            gpus: number of GPUs.
        """
        return self.link if gpus <= self.per_node else min(self.link, self.network * self.per_node)


HARDWARE = {
    "h100": Gpu("H100 SXM", 989.4e12, 67e12, 80_000_000_000, 450e9, 50e9, 8, (_H100, _DGX_H100)),
    "h200": Gpu("H200 SXM", 989.4e12, 67e12, 141_000_000_000, 450e9, 50e9, 8, (_H200, _DGX_H100)),
    "a100": Gpu("A100 SXM 80GB", 312e12, 19.5e12, 80_000_000_000, 300e9, 25e9, 8, (_A100, _DGX_A100)),
}
"""The GPUs by the name that the setting `gpu` takes."""
