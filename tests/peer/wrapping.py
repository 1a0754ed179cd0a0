"""Wrap models and pipelines of diffusers as tests build them."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

import tokdyn
from tokdyn import DepthSkip, FeatureCache, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.errors import TokdynError
from tokdyn.methods import Method
from tokdyn.pipelines import is_wrapped

SETTINGS: dict[str, tuple[Method, ...]] = {
    "plain": (),
    "empty": (),
    "never": (
        FeatureCache(threshold=-1.0),
        TokenMerge(ratio=0.0),
        DepthSkip(blocks=(1,), levels=(0.43219, 0.43221)),
    ),
    "acting": (FeatureCache(threshold=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(1,))),
}
"""The methods of each setting, of which a model gets those that can be used on it; "plain" wraps nothing.

Nothing is cached below a threshold of 0, no token is one of a share of 0, and no test has a noise level of 0.4322.
"""
ACTING = "acting"
MODELS = "diffusers.models.transformers"
"""The package of the classes that are wrapped. Autoencoders, text encoders and U-Nets stay as they are."""


class Wrapper:
    """Wraps transformers of diffusers, and pipelines around them, when their constructor or `from_pretrained` returns.

    Attributes:
        setting: a key of `SETTINGS`.
        whole: whether methods that leave out or merge tokens are left out.
        beside_cache: whether a test enables a cache of diffusers, beside which some methods are refused.
        wrapped: the classes that were wrapped since the test began, with the methods that fit them.
        inferred: those of them without an adapter.
        refused: the classes that even an empty list of methods does not fit.
    """

    def __init__(self, setting: str, unwrapped: Sequence[str], whole: bool = False) -> None:
        self.setting, self.whole = setting, whole
        self.beside_cache = False
        self.wrapped: dict[str, list[str]] = {}
        self.inferred: set[str] = set()
        self.refused: set[str] = set()
        self._unwrapped = frozenset(unwrapped)
        self._building = 0  # calls of constructors and loaders of models around the present one
        self._assembling = 0  # likewise of pipelines

    def install(self) -> None:
        """Replace the constructors of all classes of models and pipelines, known now or defined later."""
        from diffusers.loaders import FromOriginalModelMixin
        from diffusers.models.modeling_utils import ModelMixin
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        _after_init(ModelMixin, self._build)
        _after_init(DiffusionPipeline, self._assemble)
        for owner, name, around in (
            (ModelMixin, "from_pretrained", self._build),
            (FromOriginalModelMixin, "from_single_file", self._build),
            (DiffusionPipeline, "from_pretrained", self._assemble),
        ):
            _after_loading(owner, name, around)

    def _build(self, call: Callable[[], Any], built: Any = None) -> Any:
        """Call a constructor or loader of a model, and wrap what it built unless it is part of a larger model."""
        self._building += 1
        try:
            result = call()
        finally:
            self._building -= 1
        if self._building == 0:
            self._wrap_model(result if built is None else built)
        return result

    def _assemble(self, call: Callable[[], Any], built: Any = None) -> Any:
        """Call a constructor or loader of a pipeline, and wrap the pipeline in place of its denoisers."""
        self._assembling += 1
        try:
            result = call()
        finally:
            self._assembling -= 1
        if self._assembling == 0:
            self._wrap_pipeline(result if built is None else built)
        return result

    def _wrap_model(self, model: Any) -> None:
        cls = type(model)
        if not isinstance(model, nn.Module) or not cls.__module__.startswith(MODELS) or cls.__name__ in self._unwrapped:
            return
        chosen: list[Method] = []
        for method in SETTINGS[self.setting]:
            if self.whole and method.traits(2).tokens != "full":
                continue
            with suppress(TokdynError):  # a method that cannot be used on this model
                tokdyn.wrap(model, [*chosen, method])
                tokdyn.unwrap(model)
                depth = sum(len(model.get_submodule(blocks.path)) for blocks in adapter_for(model).blocks)
                if not self.beside_cache or _goes_with_caches(method, depth):
                    chosen.append(method)
        try:
            inferred = adapter_for(model).inferred
            tokdyn.wrap(model, chosen)
        except TokdynError:  # a model whose blocks cannot be found
            self.refused.add(cls.__name__)
        else:
            self.wrapped[cls.__name__] = [type(method).__name__ for method in chosen]
            if inferred and chosen:
                self.inferred.add(cls.__name__)

    def _wrap_pipeline(self, pipe: Any) -> None:
        """Wrap a pipeline whose denoisers, wrapped by now, have the methods that they get."""
        models = {name: each for name, each in pipe.components.items() if _is_wrapped(each)}
        if not models or hasattr(type(pipe), "_tokdyn_base"):
            return
        methods = {name: [method for method, _ in tokdyn.parts(each)] for name, each in models.items()}
        for model in {id(each): each for each in models.values()}.values():
            tokdyn.unwrap(model)
        tokdyn.wrap(pipe, methods)


def _goes_with_caches(method: Method, depth: int) -> bool:
    """Return whether a method is no cache and never skips the last block, at which caches of diffusers record."""
    traits = method.traits(depth)
    return not traits.remembers and depth - 1 not in (traits.owns.get("skipping") or ())


def _is_wrapped(component: Any) -> bool:
    return isinstance(component, nn.Module) and is_wrapped(component)


def _after_init(base: type, around: Callable[..., Any]) -> None:
    """Let `around` make every construction of a class below `base`."""

    def replace(cls: type) -> None:
        original = cls.__dict__.get("__init__")
        if original is None or cls.__module__.startswith("tokdyn"):
            return

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if next(each for each in type(self).__mro__ if "__init__" in each.__dict__) is cls:
                around(lambda: original(self, *args, **kwargs), self)
            else:  # the constructor of a subclass calls this one
                original(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        replace(cls)

    waiting = [base]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            replace(cls)
            waiting.append(cls)
    base.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


def _after_loading(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Let `around` make every call of a class method that returns a new object."""
    original = owner.__dict__[name].__func__

    @functools.wraps(original)
    def load(cls: type, *args: Any, **kwargs: Any) -> Any:
        return around(lambda: original(cls, *args, **kwargs))

    setattr(owner, name, classmethod(load))


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    import diffusers
    import torch

    modules = {module.__name__: module.__version__ for module in (diffusers, torch, tokdyn)}
    return {**modules, "Python": platform.python_version()}
