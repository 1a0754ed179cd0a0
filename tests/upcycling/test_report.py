"""Reports of upcycled models: tensors that are copied, new, frozen and left behind, tokens and FLOPs."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch

import tokdyn
from tests.upcycling.models import small_base
from tokdyn import DepthSkip, DynamicWidth
from tokdyn.errors import InputError
from tokdyn.upcycling import UpcycleReport, report

COPIED = ("blocks.", "t_embedder.", "y_embedder.")
EMBEDDERS = ("t_embedder.", "y_embedder.")


def test_report_counts_copied_new_and_frozen_tensors() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, "dc", target=4)
    before, after = base.state_dict(), student.state_dict()
    result = report(base, student)
    copied = [name for name in before if name.startswith(COPIED)]
    assert set(result.copied.names) == set(copied)
    assert result.copied.parameters == sum(before[name].numel() for name in copied)
    assert set(result.new.names) == set(after) - set(copied) - {"pos_embed"}
    assert result.frozen.parameters == sum(after[name].numel() for name in after if name.startswith(EMBEDDERS))
    assert {name.partition(".")[0] for name in result.left_behind.names} == {"x_embedder", "final_layer"}
    assert (result.tokens_before, result.tokens_after) == (16, 16.0)
    assert result.flops_before == tokdyn.cost.flops_per_image(base)
    assert result.flops_after == tokdyn.cost.flops_per_image(student)
    assert "multiply-add = 2" in str(result)
    assert result.width is None
    with pytest.raises(InputError, match="DCDiT"):
        report(student, base)


def test_report_names_the_target_of_any_method_that_is_trained_to_a_share_of_the_flops() -> None:
    base = small_base()
    for method, target in (
        (DynamicWidth(target=0.6), 0.6),
        (DepthSkip(learned=True, target=0.7), 0.7),
        (DepthSkip(blocks=(1,)), None),
    ):
        assert report(base, tokdyn.wrap(tokdyn.upcycle(base, "dc"), [method])).width == target


def test_a_report_counts_tensors_and_gives_its_numbers_with_units() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, ["dc", "dydit"], target=2.0, width_target=0.6)
    result = report(base, student)
    assert (result.tokens_before, result.tokens_after) == (16, 32.0)  # 8 x 8 cells of 2, half of them kept
    assert result.width == 0.6
    assert report(base, tokdyn.upcycle(base, "dc")).width is None
    assert result.as_dict()["copied"] == {"names": result.copied.names, "parameters": result.copied.parameters}
    text = dict(result.lines())
    assert list(text) == ["copied", "new", "frozen", "left behind", "tokens", "forward"]
    assert f"{len(result.copied.names)} tensors" in text["copied"]
    assert f"{result.copied.parameters:,} parameters" in text["copied"]
    assert "x_embedder, final_layer" in text["left behind"]
    assert text["tokens"].startswith("16 ")
    assert " 32 " in text["tokens"]
    assert f"({result.flops_after / result.flops_before:.2f}x" in text["forward"]
    assert f"{result.flops_before / 1e9:,.2f} GFLOP" in text["forward"]
    assert f"{result.flops_after / 1e9:,.2f}" in text["forward"].partition("before")[2]
    assert "60%" in text["forward"]
    assert [line.split()[0] for line in str(result).splitlines()] == [
        "copied",
        "new",
        "frozen",
        "left",
        "tokens",
        "forward",
    ]


def test_a_report_says_nothing_where_there_is_nothing() -> None:
    base = small_base()
    same = report(base, copy.deepcopy(base).train())
    assert same.new.names == ()
    assert same.left_behind.names == ()
    assert dict(same.lines())["new"] == "nothing"
    assert same.frozen.names == ()
    assert same.tokens_after == same.tokens_before == 16


def test_tensors_that_differ_are_new() -> None:
    base = small_base()
    student = copy.deepcopy(base)
    with torch.no_grad():
        next(student.blocks.parameters()).add_(1.0)
    (changed,) = report(base, student).new.names
    assert changed.startswith("blocks.0.")
    assert report(base, student).left_behind.names == (changed,)
    half = report(base.bfloat16(), copy.deepcopy(base).float())
    assert half.new.names == ()  # the same values in another type


def test_flops_are_given_in_billions() -> None:
    whole = report(small_base(), tokdyn.upcycle(small_base(), "dc"))
    large = dataclasses.replace(whole, flops_before=3e18, flops_after=1.5e18)
    text = dict(large.lines())["forward"]
    numbers = [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.\d\d", text)]
    assert numbers == [3e9, 1.5e9, 0.5]


def test_a_report_cannot_be_changed_and_needs_no_width() -> None:
    whole = report(small_base(), tokdyn.upcycle(small_base(), ["dc", "dydit"], width_target=0.6))
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    fields.pop("width")
    plain: Any = UpcycleReport(**fields)
    assert plain.width is None
    assert "%" not in str(plain)
    for each, name in ((plain, "width"), (plain.new, "names")):
        with pytest.raises(AttributeError):
            setattr(each, name, None)


def test_reports_compare_models_of_this_package_alone() -> None:
    other = torch.nn.Linear(2, 2)
    for base, student in ((small_base(), other), (other, small_base())):
        with pytest.raises(InputError, match="Linear"):
            report(base, student)


def test_frozen_tensors_are_those_that_do_not_learn() -> None:
    student = tokdyn.upcycle(small_base(), "dydit")
    student.blocks.requires_grad_(False)
    student.tokdyn.requires_grad_(False)
    frozen = report(small_base(), student).frozen.names
    assert set(frozen) == {name for name in student.state_dict() if name.startswith(("blocks.", "tokdyn."))}
