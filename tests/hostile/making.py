"""Make the corpus of hostile files: small ones that would run code, fill the memory, hang or end in a traceback.

    python tests/hostile --write

writes them to tests/hostile/corpus, a folder for each reader (tests/hostile/readers.py). They are committed, so that
they stay what they are when libraries change. What a file cannot be (a pipe, a device) is made by the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.packing import MARK, arrays, checkpoints, images, statistics, zips

CORPUS = Path(__file__).with_name("corpus")
SOUND = "model: {name: tiny}\ndata: {}\ntraining: {steps: 1}\n"
"""A recipe to spoil."""


def aliases(levels: int, wide: int, top: str) -> str:
    """YAML in which `top` stands for wide ** levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * wide)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"{top}: *a{levels - 1}"]) + "\n"


def recipes() -> Iterator[tuple[str, bytes | str]]:
    """Recipes: YAML."""
    for key in ("description", "extends", "name"):
        yield f"aliases-{key}.yaml", aliases(12, 9, key) + SOUND
    for section, key in (("data", "size"), ("model", "depth")):
        yield f"aliases-{section}-{key}.yaml", aliases(7, 9, "b") + f"{section}: {{{key}: *a6}}\n"
    yield "alias-of-itself.yaml", "description: &a [*a]\n" + SOUND
    yield "brackets.yaml", f"description: {'[' * 500}{']' * 500}\n"
    yield "open-brackets.yaml", "description: " + "[" * 5000
    yield "braces.yaml", "x: " + "{a: " * 3000
    yield "indents.yaml", "".join(f"{' ' * i}a:\n" for i in range(400))
    yield "many.yaml", SOUND + "\n".join(f"k{i}: 1" for i in range(3_000))
    yield "digits.yaml", SOUND + f"seed: {'9' * 5000}\n"
    yield "seed-true.yaml", SOUND + "seed: true\n"
    yield "seed-zeros.yaml", SOUND + "seed: 0010\n"
    yield "seed-huge.yaml", SOUND + f"seed: {10**400}\n"
    for tag, value in (("int", "abc"), ("float", "abc"), ("bool", "maybe"), ("timestamp", "x"), ("binary", "§"),
                       ("map", "x"), ("seq", "x"), ("set", "{a, b}"), ("null", "x")):  # fmt: skip
        yield f"tag-{tag}.yaml", SOUND + f"description: !!{tag} {value}\n"
    yield "tag-python.yaml", f"description: !!python/object/apply:pathlib.Path.touch [{MARK}]\n" + SOUND
    yield "tag-python-name.yaml", "description: !!python/name:os.system x\n" + SOUND
    yield "tag-long.yaml", f"description: !<{'t' * 20_000}> x\n" + SOUND
    yield "key-list.yaml", SOUND + "? [a, b]\n: 1\n"
    yield "key-mapping.yaml", SOUND + "? {a: b}\n: 1\n"
    yield "key-number.yaml", SOUND + "3: 1\n"
    yield "key-twice.yaml", SOUND + "seed: 1\nseed: 2\n"
    yield "key-long.yaml", SOUND + f"{'k' * 1000}: 1\n"
    yield "merge.yaml", SOUND + "<<: {seed: 3}\n"
    yield "nul.yaml", SOUND + 'out: "a\\0b"\n'
    yield "surrogate.yaml", SOUND + 'out: "a\\ud800b"\n'
    yield "raw-nul.yaml", SOUND + "out: a\0b\n"
    yield "escape.yaml", SOUND + '"\\e[2Jk": 1\n'
    yield "latin-1.yaml", (SOUND + "description: é\n").encode("latin-1")
    yield "utf-16.yaml", SOUND.encode("utf-16")
    yield "long-name.yaml", f"extends: {'n' * 300}\n"
    yield "documents.yaml", SOUND + "---\n" + SOUND
    yield "extends-itself.yaml", "extends: extends-itself.yaml\n"
    yield "extends-a-list.yaml", "extends: [a, b]\n"
    yield "extends-nobody.yaml", "extends: ~nosuch/x\n"
    for name, text in {
        "hidden-size": "model: {hidden_size: 1e12}", "hidden-size-inf": "model: {hidden_size: .inf}",
        "depth": "model: {depth: 99999}", "depth-true": "model: {depth: true}",
        "encoder": "model: {encoder_depth: 99999}",
        "target": "model: {target: .inf}", "target-nan": "model: {target: .nan}", "ratio": "model: {mlp_ratio: 1e300}",
        "patch": "model: {patch_size: 1000000000}", "scaffold": "model: {scaffold_width: 1000000000}",
        "size": "data: {size: 100000}", "size-text": "data: {size: 99999999999x1}", "length": "data: {length: 1e15}",
        "classes": "data: {num_classes: 1e12}", "batch": "training: {batch_size: 1e12}",
        "steps": "training: {steps: 1e26}",
        "workers": "training: {workers: 100000}", "accumulation": "training: {accumulation: 1e12}",
        "timesteps": "objective: {num_train_timesteps: 1e12}", "preview": "preview: {images: 1e12}",
        "lr-true": "optimizer: {lr: true}", "lr-text": "optimizer: {lr: '1e-4'}",
        "betas": "optimizer: {betas: [true, 0.9]}",
        "drops": "chunking: {tail_drops: ['0.1']}", "sampler": "preview: {sampler: {steps: 1e9}}",
    }.items():  # fmt: skip
        section, _, rest = text.partition(": ")
        given = {"model": "{name: tiny", "data": "{", "training": "{steps: 1"}
        inner = rest.strip("{}")
        start = given.get(section, "{")
        both = f"{start}{', ' if len(start) > 1 else ''}{inner}}}"
        yield (
            f"sizes-{name}.yaml",
            "\n".join(
                f"{key}: {both if key == section else value + '}'}" for key, value in {**given, section: start}.items()
            ),
        )


def settings() -> Iterator[tuple[str, bytes | str]]:
    """Lines of key=value settings for the recipe `demo`."""
    for name, line in {
        "digits": f"seed={'9' * 5000}", "brackets": f"description={'[' * 5000}", "nul": "out=a\0b",
        "dots": "a." * 2000 + "b=1",
        "long-key": "k" * 20_000 + "=1", "long-value": "training.precision=" + "v" * 20_000, "true": "seed=true",
        "zeros": "seed=0010", "inf": "model.target=.inf", "steps": "training.steps=1e26",
        "workers": "training.workers=100000",
        "size": "data.size=100000", "width": "model.hidden_size=1e12", "depth": "model.depth=99999",
        "batch": "training.batch_size=1e12", "alias": "description={a: &a [*a]}", "no-equals": "seed",
        "lr": "optimizer.lr=[[[]]]",
        "surrogate": 'out="\\ud800"', "quoted": "optimizer.lr='1e-4'", "arabic": "seed=٣",
    }.items():  # fmt: skip
        yield f"{name}.txt", line


def presets() -> Iterator[tuple[str, bytes | str]]:
    """Preset files: YAML."""
    yield "aliases.yaml", aliases(12, 9, "models")
    yield "brackets.yaml", "models: " + "[" * 3000
    yield "date.yaml", "models: [2026-99-99]\n"
    yield "int.yaml", "models: !!int abc\n"
    yield "list.yaml", "[1, 2]\n"
    yield "python.yaml", f"models: !!python/object/apply:pathlib.Path.touch [{MARK}]\n"
    yield "methods-null.yaml", "family: x\nmodels: [{model: y, presets: [{name: z, stack: null}]}]\n"


def prompts() -> Iterator[tuple[str, bytes | str]]:
    """Files of prompts."""
    yield "aliases.yaml", aliases(12, 9, "b")
    yield (
        "aliases-list.yaml",
        "- &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"- &a{i} [{', '.join(['*a' if i == 0 else f'*a{i - 1}'] * 9)}]\n" for i in range(9)),
    )
    yield "brackets.json", "[" * 20_000
    yield "deep.json", "[" * 500 + "]" * 500
    yield "digits.json", f'[{{"prompt": "a", "height": {"9" * 5000}}}]'
    yield "nan.json", '[{"prompt": "a", "guidance_scale": NaN}]'
    yield "number.json", "3"
    yield "date.yaml", "- 2026-01-01\n"
    yield "empty.txt", "\n\n"
    yield "latin-1.txt", "é".encode("latin-1")


def stacks() -> Iterator[tuple[str, bytes | str]]:
    """Files of stacks of methods."""
    yield "aliases.yaml", aliases(12, 9, "stacks")
    yield "methods-null.yaml", "- {name: a, methods: null}\n"
    yield "method-deep.yaml", f"- {{name: a, methods: [{{method: TokenMerge, ratio: {'[' * 200}]}}]}}\n"
    yield "ratio-nan.yaml", "- {name: a, methods: [{method: TokenMerge, ratio: .nan}]}\n"
    yield "blocks.yaml", f"- {{name: a, methods: [{{method: DepthSkip, blocks: [{'9' * 5000}]}}]}}\n"
    yield "path.yaml", "- {name: a, methods: [{method: os.system}]}\n"
    yield "latin-1.yaml", "é".encode("latin-1")


def configs() -> Iterator[tuple[str, bytes | str]]:
    """The config.json beside sound weights of a DC-DiT."""
    yield "brackets.json", "[" * 20_000
    yield "braces.json", '{"a":' * 20_000
    yield "deep.json", '{"_class_name": "DCDiT", "sigma": ' + "[" * 900 + "]" * 900 + "}"
    yield "number.json", "3"
    yield "empty.json", ""
    yield "latin-1.json", "{é".encode("latin-1")
    yield "class-list.json", '{"_class_name": ["DCDiT"], "depth": 1e999}'
    for name, value in {
        "text": '"four"', "digits": "9" * 5000, "huge": "1e999", "nan": "NaN", "list": "[1, 2, 3]", "object": "{}",
        "true": "true", "negative": "-4", "zero": "0", "fraction": "1.5",
    }.items():  # fmt: skip
        for setting in ("num_heads", "sample_size", "sigma", "timestep_map"):
            if (setting, name) not in {("sigma", "fraction"), ("router", "x")}:
                yield f"{setting}-{name}.json", f'{{"_class_name": "DCDiT", "{setting}": {value}}}'
    yield "size.json", '{"_class_name": "DCDiT", "sample_size": [1000000000, 1000000000]}'
    yield "unknown.json", '{"_class_name": "DCDiT", "colour": "red"}'


def sidecars() -> Iterator[tuple[str, bytes | str]]:
    """The tokdyn_config.json of methods for a DiT."""
    for name, methods in {
        "null": "null", "number": "3", "text": '"TokenMerge"', "object": '{"method": "TokenMerge"}',
        "empty-method": "[{}]",
        "method-null": '[{"method": null}]', "method-list": '[{"method": [1]}]', "path": '[{"method": "os.system"}]',
        "ratio-text": '[{"method": "TokenMerge", "ratio": "half"}]',
        "ratio-nan": '[{"method": "TokenMerge", "ratio": NaN}]',
        "blocks-digits": f'[{{"method": "DepthSkip", "blocks": [{"9" * 5000}]}}]',
        "blocks-huge": f'[{{"method": "DepthSkip", "blocks": [{"9" * 4000}]}}]',
        "deep": f'[{{"method": "TokenMerge", "ratio": {"[" * 900}{"]" * 900}}}]',
        "self": '[[[[{"method": "TokenMerge"}]]]]',
        "setting": '[{"method": "TokenMerge", "colour": 1}]', "width": '[{"method": "DynamicWidth"}]',
    }.items():  # fmt: skip
        yield f"methods-{name}.json", f'{{"tokdyn": "1", "model": "DiT", "methods": {methods}}}'
    for key in ("schema", "format", "version"):
        yield f"{key}.json", f'{{"tokdyn": "9", "{key}": 99, "model": "DiT", "methods": []}}'
    yield "model-null.json", '{"model": null, "methods": []}'
    yield "level.json", '{"model": "DiT", "methods": [], "level": [1, "x"]}'
    yield "brackets.json", "[" * 20_000


def indices() -> Iterator[tuple[str, bytes | str]]:
    """The index.json of latents."""
    sound: dict[str, Any] = {
        "fingerprint": "f", "count": 1, "shape": [4, 2, 2], "dtype": "fp32", "flipped": False, "class_names": ["a"],
        "image_size": [16, 16], "posterior": "mean", "seed": 0, "scaling": {},
        "vae": {"kind": "AutoencoderKL", "source": None, "subfolder": None, "sha256": "0"},
        "shards": [{"file": "shard_00000.safetensors", "count": 1, "size": 1}],
    }  # fmt: skip
    for name, change in {
        "outside": {"shards": [{"file": "../../../etc/passwd", "count": 1, "size": 1}]},
        "missing": {}, "version": {"version": 99}, "count": {"count": 10**30},
        "shape": {"shape": [10**9, 10**9, 10**9]},
        "none": {"shards": []}, "scaling": {"scaling": {"factor": "x"}},
    }.items():  # fmt: skip
        yield f"{name}.json", json.dumps({**sound, **change})
    yield "nan.json", json.dumps({**sound, "scaling": {"factor": float("nan")}})
    yield "brackets.json", "[" * 20_000
    yield "digits.json", '{"count": ' + "9" * 5000 + "}"


CORPORA: dict[str, Callable[[], Iterator[tuple[str, bytes | str]]]] = {
    "recipes": recipes, "settings": settings, "presets": presets, "prompts": prompts, "stacks": stacks,
    "checkpoints": checkpoints, "configs": configs, "sidecars": sidecars, "arrays": arrays, "zips": zips,
    "images": images,
    "latents": indices, "statistics": statistics,
}  # fmt: skip
"""Hostile files by the name of their reader."""


def main() -> None:
    """Write the files of the corpus that are missing."""
    total = 0
    for reader, make in CORPORA.items():
        folder = CORPUS / reader
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in make():
            data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
            if not (folder / name).exists():  # some bytes, such as numbers of objects, differ every time
                (folder / name).write_bytes(data)
            total += len(data)
    print(f"{total:,} bytes in {CORPUS}")
