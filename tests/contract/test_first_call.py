"""Methods that do nothing useful in sampling are named at the first call, once; trained and loaded ones are not."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, sample
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge

IDLE = {
    "chunk": Chunking(target=2),
    "width": DynamicWidth(target=0.7),
    "gates": DepthSkip(learned=True),
    "nothing to skip": DepthSkip(),
    "levels of nothing": DepthSkip(levels=(0.2, 0.8)),
    "drop": TokenDrop(rate=0.5),
}
USEFUL = [
    [FeatureCache(threshold=0.1)],
    [DepthSkip(blocks=(1,)), TokenMerge(ratio=0.5)],
    [DepthSkip(table=((0.0, 0.5, (1,)),))],
    [Chunking(target=1)],
    [],
]
TRAINED = {name: IDLE[name] for name in ("chunk", "width", "gates")}
idle = pytest.mark.parametrize("method", IDLE.values(), ids=list(IDLE))
trained = pytest.mark.parametrize("method", TRAINED.values(), ids=list(TRAINED))


def model_with(*methods, name="DiTTransformer2DModel"):
    return tokdyn.wrap(TINY[name].build(), list(methods))


def call(model, name="DiTTransformer2DModel"):
    with torch.no_grad():
        return sample(model(**TINY[name].inputs(2)))


def accept_untrained(model):
    """Set every trained part by hand, as training does."""
    with torch.no_grad():
        for parameter in model.tokdyn.parameters():
            parameter.add_(0.0)
    return model


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@idle
def test_the_first_call_in_sampling_names_the_method_and_later_ones_are_silent(method):
    model = model_with(TokenMerge(ratio=0.25), method)
    with pytest.warns(UserWarning, match=type(method).__name__) as seen:
        call(model)
    assert [each.filename for each in seen] == [__file__]
    assert "TokenMerge" not in str(seen[0].message)
    with silence():
        call(model)
        tokdyn.reset(model)
        call(model)


def test_one_warning_names_all_of_them():
    with pytest.warns(UserWarning, match="methods on") as seen:
        call(model_with(DynamicWidth(), TokenDrop(), DepthSkip()))
    (text,) = (str(each.message) for each in seen)
    assert all(name in text for name in ("DynamicWidth", "TokenDrop", "DepthSkip"))


@pytest.mark.parametrize("methods", USEFUL, ids=lambda methods: "-".join(type(each).__name__ for each in methods))
def test_methods_that_act_are_not_named(methods):
    with silence():
        call(model_with(*methods))


@idle
def test_after_a_call_in_training_nothing_is_said(method):
    model = model_with(method).train()
    with silence():
        sample(model(**TINY["DiTTransformer2DModel"].inputs(2)))
        call(model.eval())


@idle
def test_loaded_methods_are_not_named(method, tmp_path):
    tokdyn.save(model_with(method), tmp_path)
    with silence():
        call(tokdyn.load(TINY["DiTTransformer2DModel"].build(), tmp_path))


def step(model, other):
    optimizer = torch.optim.SGD(model.tokdyn.parameters(), lr=0.1)
    for parameter in model.tokdyn.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load_state(model, other):
    model.load_state_dict(other.state_dict())


def assign_state(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


@trained
@pytest.mark.parametrize("change", [step, load_state, assign_state])
def test_parts_that_were_written_to_count_as_trained(method, change):
    model, other = model_with(method), model_with(method)
    change(model, other)
    with silence():
        call(model)


@trained
def test_casting_and_copying_do_not_train(method):
    with pytest.warns(UserWarning, match="never trained"):
        call(model_with(method).float())
    with silence():
        copied = copy.deepcopy(model_with(TokenMerge(ratio=0.5)))
        call(copied)


def test_a_calibrated_router_and_a_weak_prediction_are_wanted():
    model, inputs = model_with(Chunking(target=2)), TINY["DiTTransformer2DModel"].inputs(2)
    tokdyn.calibrate_router(model, **inputs)
    with silence():
        call(model)
    model = model_with(TokenDrop(rate=0.5))
    with silence(), tokdyn.dropping(model, 0.5):
        call(model)


def test_counting_and_compiling_are_no_first_calls():
    """Counting FLOPs says nothing, and a compiled model is one graph and warns outside of it."""
    model, inputs = model_with(Chunking(target=2)), TINY["DiTTransformer2DModel"].inputs(2)
    with silence():
        tokdyn.flops(model, **inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="Chunking"):
        call(compiled)


def test_a_pipeline_says_it_too():
    from tests.contract.pipelines import build, images

    pipe = tokdyn.wrap(build("DiT"), [TokenDrop(rate=0.5)])
    with pytest.warns(UserWarning, match="TokenDrop"):
        images(pipe, "DiT")


def tokens_of(model, name="DiTTransformer2DModel"):
    """Call a model and return, of its first block, the image tokens and those that its attention saw."""
    call(model, name)
    (first, *_) = (block for block in tokdyn.traces(model)[-1].blocks)
    return first.tokens, first.mean_tokens(first.attention)


SHORT = "leaves out fewer tokens"


def test_a_ratio_above_what_buckets_allow_is_told_once_with_what_is_reached():
    """Of 4 x 4 tokens in buckets of 2 x 2, a quarter stays."""
    model = model_with(TokenMerge(ratio=0.9))
    with pytest.warns(UserWarning, match=r"TokenMerge .*12 of 16 \(75\.0%\) and not 90\.0%.*bucket") as seen:
        assert tokens_of(model) == (16, 4)
    assert [each.filename for each in seen] == [__file__]
    with silence():
        call(model)
        assert tokdyn.stats(model).shortfalls == {"TokenMerge": (0.9, 0.75)}
        assert "75.0%" in str(tokdyn.stats(model))
        assert tokens_of(model_with(TokenMerge(ratio=0.75))) == (16, 4)
        assert tokens_of(model_with(TokenMerge(ratio=0.9, bucket=4))) == (16, 2)
        assert tokens_of(model_with(TokenMerge(ratio=0.6))) == (16, 7)  # rounded to whole tokens
        assert tokdyn.stats(model_with(TokenMerge(ratio=0.6))).shortfalls == {}


@pytest.mark.parametrize(
    ("methods", "named", "reached"),
    [
        ([TokenMerge(ratio=0.05)], "TokenMerge", 0.0),
        ([TokenMerge(ratio=((0.0, 0.95), (1.0, 0.95)))], "TokenMerge", 0.75),
        ([Chunking(target=1.02)], "Chunking", 0.0),
    ],
)
def test_other_shares_that_are_not_reached_are_told_too(methods, named, reached):
    model = accept_untrained(model_with(*methods))
    with pytest.warns(UserWarning, match=f"{named} .*{SHORT}"):
        call(model)
    assert tokdyn.stats(model).shortfalls[named][1] == reached


def test_merging_inside_of_chunking_counts_the_tokens_that_are_left():
    """Chunking leaves four of sixteen tokens, and there are four buckets: nothing is left to merge."""
    model = accept_untrained(model_with(Chunking(target=4), TokenMerge(ratio=0.3)))
    with pytest.warns(UserWarning, match=r"TokenMerge .*0 of 4 \(0\.0%\) and not 30\.0%"):
        assert tokens_of(model) == (4, 4)


def test_it_is_told_in_training_where_token_drop_acts():
    inputs = TINY["DiTTransformer2DModel"].inputs(2)
    model = model_with(TokenDrop(rate=0.05)).train()
    with pytest.warns(UserWarning, match=rf"TokenDrop .*{SHORT}.*0 of 16"):
        sample(model(**inputs))
    with silence():
        sample(model(**inputs))
        sample(model_with(TokenDrop(rate=0.5)).train()(**inputs))


def test_compiled_models_tell_it_and_accepted_ones_do_not():
    torch._dynamo.reset()
    compiled = torch.compile(model_with(TokenMerge(ratio=0.9)), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=f"TokenMerge .*{SHORT}"):
        call(compiled)
    with silence():
        call(compiled)
        call(tokdyn.attach.accept_methods(model_with(TokenMerge(ratio=0.9))))
        model = model_with(TokenMerge(ratio=0.9))
        tokdyn.flops(model, **TINY["DiTTransformer2DModel"].inputs(2))
    with pytest.warns(UserWarning, match=SHORT):
        call(model)


def test_a_share_of_the_flops_that_gates_cannot_reach_is_told_in_training_once():
    """Of 2 heads and 2 groups of channels one is always on, so that half of the FLOPs stay."""
    inputs = TINY["DiTTransformer2DModel"].inputs(2)
    model = model_with(DynamicWidth(target=0.3, tokens=False)).train()
    with pytest.warns(UserWarning, match=r"fewer FLOPs.*at most .*\(50\.0%\) and not 70\.0%.*raise target"):
        model(**inputs)
    with silence():
        model(**inputs)
        for reached in (DynamicWidth(target=0.55, tokens=False), DynamicWidth(target=0.4)):
            model_with(reached).train()(**inputs)
    with pytest.warns(UserWarning, match="fewer FLOPs"):  # attention is more than a tenth
        model_with(DynamicWidth(target=0.1, heads=False)).train()(**inputs)


def test_a_single_head_has_no_gates_and_that_is_told_when_the_model_is_wrapped():
    def model():
        return tokdyn.DiT(sample_size=8, hidden_size=16, depth=2, num_heads=1)

    with pytest.warns(UserWarning, match="single attention head.*neither have gates") as seen:
        tokdyn.wrap(model(), [DynamicWidth()])
    assert [each.filename for each in seen] == [__file__]
    with silence():
        tokdyn.wrap(model(), [DynamicWidth(heads=False, channels=False)])
        model_with(DynamicWidth())


@pytest.mark.parametrize("method", [FeatureCache(threshold=0.1, warmup=4), FeatureCache(threshold=0.1, start=0.9)])
def test_a_cache_that_no_step_of_the_told_trajectory_is_open_to_says_so(method):
    model = model_with(method)
    warns = pytest.warns(UserWarning, match="FeatureCache has no effect.*none of 4 steps")
    with warns, tokdyn.trajectory(model, steps=4):
        call(model)
    with silence():
        with tokdyn.trajectory(model, steps=4):
            call(model)
        longer = model_with(method)
        with tokdyn.trajectory(longer, steps=20):
            call(longer)
        call(model_with(method))  # nobody says how many steps there are
