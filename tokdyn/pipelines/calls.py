"""Record the calls of a model, or of every denoiser of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tokdyn import recorder
from tokdyn.pipelines.denoisers import denoisers, is_pipeline


@contextmanager
def recording(target: Any, host: bool = False) -> Iterator[Any]:
    """Record the arguments of every call of a model, or of its forward, within this context.

    Args:
        target: a model, wrapped or not, such as the transformer of a pipeline; or a pipeline, for all of its denoisers.
        host: copy tensors to the memory of the host, if the accelerator has none to spare.

    Yields:
        A list that grows with every call, each a dictionary of arguments by name; of a pipeline one list for each
        denoiser, by the name of its component. Tensors are copied; one that equals that of the previous call is stored
        once.

    Raises:
        InputError: the target is neither a module nor a pipeline.
        UnsupportedModelError: the pipeline has no diffusion transformer.
    """
    with ExitStack() as stack:
        if is_pipeline(target):
            models = denoisers(target)
            yield {name: stack.enter_context(recorder.recording(model, host)) for name, model in models.items()}
        else:
            yield stack.enter_context(recorder.recording(target, host))
