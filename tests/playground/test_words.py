"""The words of `tokdyn playground`: what is wrong is said before anything heavy is loaded."""

from __future__ import annotations

import socket
import sys

import pytest
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tokdyn.bench.stacks import read_stacks
from tokdyn.errors import InputError, RecipeError
from tokdyn.playground.run import typed
from tokdyn.playground.server import address_of, listen
from tokdyn.playground.stacks import methods_of
from tokdyn.playground.words import read_methods


def run(*words: object, code: int = 2) -> str:
    result = CliRunner().invoke(app, ["playground", *map(str, words)])
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["shapes", "methods=[{method: TokenMrge}]"], "TokenMerge"),
        (["shapes", "methods=[{ratio: 0.3}]"], "name"),
        (["shapes", "methods=[merge]"], "list of methods"),
        (["shapes", "port=70000"], "port"),
        (["shapes", "share=true"], "share"),
        (["shapes", "steps=5000"], "steps"),
        ([], "model"),
    ],
)
def test_wrong_words_end_in_a_sentence(words, named):
    assert named in run(*words)


def test_a_missing_gradio_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'tokdyn[playground]'" in run("shapes")


def test_methods_are_read_in_the_words_of_the_command_line():
    assert read_methods(" ") == []
    assert read_methods("merge") == [{"method": "merge"}]
    assert read_methods("{method: TokenMerge, ratio: 0.3}") == [{"method": "TokenMerge", "ratio": 0.3}]
    assert read_methods("{transformer: [{method: skip}]}") == {"transformer": [{"method": "skip"}]}
    assert read_methods("FLUX.1-dev/fast") == "FLUX.1-dev/fast"


def test_a_stack_is_typed_as_the_same_methods(tmp_path):
    (stack,) = read_stacks(["{name: a, methods: [{method: merge, ratio: 0.3, blocks: [0, 1]}]}"])
    assert methods_of(typed(stack)) == stack.for_model()
    (folder,) = read_stacks([f"{{name: b, folder: {tmp_path}}}"])
    assert methods_of(typed(folder)) == tmp_path
    for setting in ("model: shapes", "tail_drop: 0.5"):
        with pytest.raises(RecipeError, match=setting.partition(":")[0]):
            typed(read_stacks([f"{{name: c, {setting}}}"])[0])


def test_the_page_is_for_this_machine_and_a_taken_port_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with listen("127.0.0.1", port) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match=str(port)):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):  # an address for documentation, of no machine
        listen("192.0.2.1", port)
