"""The page of the playground, made with gradio. It draws nothing by itself and keeps no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr
from pydantic import ValidationError

from tokdyn.errors import TokdynError
from tokdyn.playground import view
from tokdyn.playground.settings import Wanted
from tokdyn.playground.studio import Studio, scenes
from tokdyn.recipe.explain import explain
from tokdyn.report.html import html, tag

_HINT = "[{method: TokenMerge, ratio: 0.3}, {method: FeatureCache}]"


def build(studio: Studio, stacks: Sequence[tuple[str, str]] = ()) -> gr.Blocks:
    """Build the page.

    Args:
        studio: draws the pictures.
        stacks: methods to choose from: names, and texts as a user would type them.
    """
    offer, begin = studio.offer, studio.offer.begin
    with gr.Blocks(title=f"{offer.title} - tokdyn", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(tag("h1", offer.title))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                subject = _subject(studio)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                with gr.Row():
                    seed = gr.Number(begin.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Number(begin.steps, label="Steps", precision=0, minimum=1, elem_id="steps")
                guidance = gr.Slider(
                    0, max(15, begin.guidance), begin.guidance, step=0.1, label="Guidance", info="1 turns it off"
                )
                drop = gr.Slider(
                    0, 1, begin.tail_drop, step=0.05, label="Tail drop", visible=offer.budgets, elem_id="drop",
                    info="share of the kept tokens that is dropped",
                )  # fmt: skip
                uncond = gr.Slider(
                    0, 1, begin.tail_drop, step=0.05, label="Tail drop without the class", visible=offer.budgets,
                    info="of the unconditional branch (Lite-CFG), at least the tail drop",
                )  # fmt: skip
                stack = gr.Dropdown(
                    [("none", ""), *stacks], value="", label="Stack", visible=bool(stacks), elem_id="stack"
                )
                methods = gr.Textbox(
                    begin.methods, label="Methods", lines=2, placeholder=_HINT, elem_id="methods",
                    info="a list, a preset, or a folder of tokdyn calibrate",
                )  # fmt: skip
            with gr.Column(scale=3):
                with gr.Row():
                    shown = _place(view.PICTURE, "picture")
                    tokens = _place(view.TOKENS, "tokens")
                    beside = _place(offer.full, "beside")
                costs = gr.HTML("", elem_id="costs", elem_classes="shown")
                gr.HTML(view.LEGEND, elem_classes="shown")
        stack.input(lambda text: text or "", stack, methods, api_visibility="private", queue=False)

        def draw(*given: Any) -> Iterator[tuple[str, ...]]:
            try:
                with closing(scenes(studio, _wanted(*given))) as seen:
                    for scene in seen:
                        yield tuple(map(str, (*view.pictures(scene, offer), view.costs(scene, offer))))
            except TokdynError as error:
                raise gr.Error(str(html(error)), duration=None, print_exception=False) from error

        drawing = gr.on(
            [start.click, *([subject.submit] if offer.what == "prompt" else [])],
            draw,
            [subject, seed, steps, guidance, drop, uncond, methods],
            [shown, tokens, beside, costs],
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=[drawing], api_visibility="private")
    return page


def _subject(studio: Studio) -> Any:
    """Return the field of the class or of the prompt."""
    offer = studio.offer
    if offer.what == "class":
        return gr.Dropdown(list(offer.subjects), value=offer.begin.subject, label="Class", elem_id="subject")
    field = gr.Textbox(offer.begin.subject, label="Prompt", lines=3, max_lines=8, elem_id="subject")
    if len(offer.subjects) > 1:
        choice = gr.Dropdown(list(offer.subjects), value=None, label="Prompts of the file")
        choice.input(lambda text: text, choice, field, api_visibility="private", queue=False)
    return field


def _place(title: str, name: str) -> Any:
    """Return a place for a picture."""
    with gr.Column(min_width=200):
        return gr.HTML(view.nothing(title), elem_id=name, elem_classes="shown")


def _wanted(
    subject: str, seed: float, steps: float, guidance: float, drop: float, uncond: float, methods: str
) -> Wanted:
    """Return what the fields of the page ask for.

    Raises:
        RecipeError: a field is empty or out of range.
    """
    try:
        return Wanted.model_validate(
            {
                "subject": subject,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
                "tail_drop": drop,
                "uncond_tail_drop": uncond if uncond > drop else None,
                "methods": methods or "",
            }
        )
    except ValidationError as error:
        raise explain(Wanted, error, "settings") from error
