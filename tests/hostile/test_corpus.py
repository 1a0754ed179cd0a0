"""No reader runs, hangs on, is filled by or answers with a traceback any file of the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.making import CORPORA, CORPUS
from tests.hostile.readers import READERS, attempt, warm

FILES = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())
ACCEPTED = {
    "zips/escape.zip": "refused when it is read; its only image is broken",
}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    warm()
    for reader in READERS:
        file = next(name for name in FILES if name.startswith(f"{reader}/"))
        path = tmp_path_factory.mktemp("warm") / Path(file).name
        path.write_bytes((CORPUS / file).read_bytes())
        try:
            READERS[reader](path)
        except Exception:
            continue


@pytest.mark.parametrize("file", FILES)
def test_hostile_files_are_refused_in_a_sentence(file: str, tmp_path: Path) -> None:
    reader, _, name = file.partition("/")
    refused = attempt(reader, name, (CORPUS / file).read_bytes(), tmp_path)
    assert refused is not None, f"{file} was accepted"
    assert "\n" not in str(refused)


def test_the_corpus_is_small_and_complete() -> None:
    made = {f"{reader}/{name}" for reader, make in CORPORA.items() for name, _ in make()}
    assert made == set(FILES), "python tests/hostile --write writes the corpus"
    assert sum((CORPUS / name).stat().st_size for name in FILES) < 10**6
    assert set(CORPORA) == set(READERS)
