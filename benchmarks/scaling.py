"""Work out trainings on 8 to 256 GPUs for docs/scaling.md: `python -m benchmarks.scaling`. Nothing is timed.

DC-DiT-XL trains by its recipes for 256 and 512 pixels, and the transformer of FLUX.1-dev gets Chunking and LoRA on
images of 1024 pixels. Activations of DC-DiT-XL are rehearsed for micro-batches of one and two images; each further
image adds as much as the second one. The tables are written into the page.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import command_line, markdown
from tokdyn.recipe import load
from tokdyn.recipe.build import stated_shape, total_steps
from tokdyn.scaling import HARDWARE, ScalingSettings, Work, worked_out
from tokdyn.train.work import work_of
from tokdyn.upcycling.dry_run import dry_run
from tokdyn.upcycling.pipeline_settings import PipelineConfig

ROOT = Path(__file__).parents[1]
OUT, PAGE = ROOT / "benchmarks/results/scaling.json", ROOT / "docs/scaling.md"
GPUS = (8, 16, 32, 64, 128, 256)
RECIPES = {"DC-DiT-XL, 256 px": "imagenet/dc-dit-xl-256", "DC-DiT-XL, 512 px": "imagenet/dc-dit-xl-512"}
FLUX = "FLUX.1-dev, 1024 px, LoRA of rank 16"
PART = re.compile(r"(<!-- scaling:.*?-->\n)(.*?)(\n+<!-- end)", re.DOTALL)
FLUX_PARTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "transformer": (["diffusers", "FluxTransformer2DModel"], {"guidance_embeds": True}),
    "vae": (
        ["diffusers", "AutoencoderKL"],
        {
            "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 16,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
    ),
    "text_encoder": (
        ["transformers", "CLIPTextModel"],
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "text_encoder_2": (
        ["transformers", "T5EncoderModel"],
        {
            "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}  # fmt: skip
"""The parts of FLUX.1-dev, as their configurations on the hub describe them."""


def recipe_works(name: str, recomputed: bool) -> dict[int, Work]:
    """What a step of a recipe takes, by number of GPUs."""
    recipe = load(name, ["training.gradient_checkpointing=true"] if recomputed else [])
    shape, steps = stated_shape(recipe.data), total_steps(recipe)
    one, two = (work_of(recipe, recipe.training.batch_size // images, shape, None, steps) for images in (1, 2))
    further = two.activations - one.activations
    micro = {gpus: recipe.training.batch_size // gpus for gpus in GPUS}
    return {
        gpus: replace(one, micro_batch=images, activations=one.activations + (images - 1) * further)
        for gpus, images in micro.items()
    }


def flux_works(recomputed: bool, calls: int = 256) -> dict[int, Work]:
    """What a step of the upcycling of FLUX.1-dev takes, by number of GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"_class_name": "FluxPipeline", **{name: entry for name, (entry, _) in FLUX_PARTS.items()}}
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
        for name, (_, settings) in FLUX_PARTS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(settings))
        config = PipelineConfig(
            base=folder, trained="lora", rank=16, precision="bf16", calls=calls, gradient_checkpointing=recomputed
        )
        estimate = dry_run(config, ["dc"], ScalingSettings(gpus=calls))
    assert not estimate.uncounted
    return {gpus: replace(estimate.work, accumulation=calls // gpus) for gpus in GPUS}


def rows_of(name: str, plain: dict[int, Work], recomputed: dict[int, Work]) -> list[dict[str, Any]]:
    """The rows of a model: what each number of GPUs holds, sends and trains a second."""
    rows = []
    for gpus in GPUS:
        plan, shards = (worked_out(plain[gpus], ScalingSettings(gpus=gpus, sharding=each)) for each in ("none", "full"))
        rows.append(
            {
                "model": name,
                "of": plan.of,
                "gpus": gpus,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                "memory": plan.memory,
                "memory_sharded": shards.memory,
                "activations_recomputed": recomputed[gpus].activations,
                "tflops_step": plan.flops_step / 1e12,
                "sent": plan.sent,
                "sent_sharded": shards.sent,
                "milliseconds": [1e3 * plan.compute_seconds, 1e3 * plan.wire_seconds, 1e3 * shards.wire_seconds],
                "rates": plan.rates,
                "rates_sharded": shards.rates,
                "hours": plan.hours,
            }
        )
    return rows


def measure() -> dict[str, Any]:
    """Work out all rows."""
    rows = [
        row
        for name, recipe in RECIPES.items()
        for row in rows_of(name, recipe_works(recipe, False), recipe_works(recipe, True))
    ]
    return {"gpu": "h100", "rows": [*rows, *rows_of(FLUX, flux_works(False), flux_works(True))]}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of a model."""

    def gib(size: int) -> str:
        return f"{size / 2**30:.1f}"

    def pair(values: Any) -> str:
        return " to ".join(f"{value:,.0f}" for value in values)

    of = rows[0]["of"]
    head = [
        "GPUs", f"{of} of a GPU", "GiB, replicas", "GiB, shards", "activations", "recomputed", "GB sent, replicas",
        "GB sent, shards", "ms computing", "ms sending", f"{of}/s, replicas", f"{of}/s, shards", "hours",
    ]  # fmt: skip
    return markdown.table(
        head,
        [
            [
                str(row["gpus"]), f"{row['accumulation']} x {row['micro_batch']}", gib(sum(row["memory"].values())),
                gib(sum(row["memory_sharded"].values())), gib(row["memory"]["activations"]),
                gib(row["activations_recomputed"]), f"{row['sent'] / 1e9:.2f}", f"{row['sent_sharded'] / 1e9:.2f}",
                f"{row['milliseconds'][0]:,.1f}",
                f"{row['milliseconds'][1]:,.1f}, {row['milliseconds'][2]:,.1f}",
                pair(row["rates"]), pair(row["rates_sharded"]), " to ".join(f"{hours:.1f}" for hours in row["hours"]),
            ]
            for row in rows
        ],
    )  # fmt: skip


def hardware() -> str:
    """The table of the GPUs."""
    head = ["`gpu=`", "GPU", "bf16, dense", "fp32", "memory", "to its node", "to other nodes", "in a node", "sources"]
    rows = []
    for name, gpu in HARDWARE.items():
        sources = " ".join(f"[{what}]({url})" for what, url in zip(("GPU", "node"), gpu.sources, strict=True))
        speeds = [f"{gpu.bf16 / 1e12:,.0f} TFLOP/s", f"{gpu.fp32 / 1e12:g} TFLOP/s", f"{gpu.memory / 1e9:.0f} GB"]
        links = [f"{gpu.link / 1e9:.0f} GB/s", f"{gpu.network / 1e9:.0f} GB/s", str(gpu.per_node)]
        rows.append([f"`{name}`", gpu.name, *speeds, *links, sources])
    return markdown.table(head, rows)


def page(result: dict[str, Any]) -> str:
    """All that the command writes into the page."""
    names = dict.fromkeys(row["model"] for row in result["rows"])
    parts = [f"### {name}\n\n{table([row for row in result['rows'] if row['model'] == name])}" for name in names]
    return "\n\n".join([hardware(), *parts])


def main() -> int:
    """Work out the tables, and write them into the page."""
    given = command_line.start(command_line.parser(__doc__, str(OUT)).parse_args())
    result = measure()
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(PART.sub(lambda part: part[1] + page(result) + part[3], text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
