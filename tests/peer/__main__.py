"""Run diffusers' own tests with every model wrapped, and list what is lost (`make peer TESTS=path/to/diffusers`)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("expected.toml")
STORE = ROOT / "runs" / "peer"
FILES = ("tests/models/transformers/test_*.py", "tests/pipelines/*/test_*.py")


def chosen(checkout: Path, patterns: list[str]) -> list[str]:
    """Return the files of tests in a checkout that fit one of the patterns, relative to it."""
    found = {path for pattern in patterns for path in checkout.glob(pattern)}
    files = [file for path in found for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
    return sorted({str(file.relative_to(checkout)) for file in files})


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="make peer", description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, help="folder of a checkout of diffusers")
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"files, folders or patterns in it; default: {FILES}")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a file, if nothing is wrapped")
    parser.add_argument("--keep", action="store_true", help="keep results of earlier code")
    parser.add_argument("--store", type=Path, default=STORE, help="where results are kept; default: %(default)s")
    parser.add_argument("--expected", type=Path, default=EXPECTED, help="losses that have a reason")
    parser.add_argument("--out", type=Path, help="write the report to OUT.md and OUT.json")
    parser.add_argument(
        "--results", type=Path, help="write the table, with the reasons, to this file, and to JSON beside it"
    )
    parser.add_argument("--known", action="store_true", help="run nothing, and leave out files that have not been run")
    args = parser.parse_args()
    if args.checkout is None:
        parser.error("give a checkout of diffusers, such as make peer TESTS=../diffusers.")
    checkout = args.checkout.expanduser().resolve()
    if not (checkout / "tests" / "conftest.py").is_file():
        parser.error(f"{checkout} is no checkout of diffusers: it has no tests/conftest.py.")
    files = chosen(checkout, args.files or list(FILES))
    if not files:
        parser.error(f"no file of tests in {checkout} fits {' '.join(args.files or FILES)}.")
    return run(args, checkout, files)


def run(args: argparse.Namespace, checkout: Path, files: list[str]) -> int:
    """Run the files and print what is lost; return the exit code."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("PYTORCH_NVML_BASED_CUDA_CHECK", "1"), ("OMP_NUM_THREADS", "1")):
        os.environ.setdefault(name, value)
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", MPLBACKEND="Agg")
    sys.dont_write_bytecode = True  # a checkout stays as it is
    from examining import WRAPPED, Examination, Findings, Store  # imports torch
    from listing import expected, idle, markdown, unexpected, write
    from results import write_page
    from running import in_parallel

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs that are under way end, too
    began, done = time.monotonic(), list[Findings]()

    def say(findings: Findings) -> None:
        lost = ", ".join(f"{len(loss.lost)} {setting}" for setting, loss in findings.losses.items())
        minutes = (time.monotonic() - began) / 60
        where = f"{len(done)}/{len(files)} files, {minutes:.0f} min"
        print(f"[{where}] {findings.file}: {len(findings.passed)} passed, lost {lost or '...'}", flush=True)

    store = Store(args.store.expanduser().resolve())
    if args.known:
        done += [each for each in map(store.recall, files) if set(WRAPPED) <= set(each.losses)]
    else:
        tasks = (Examination(checkout, file, store, args.limit, args.keep, say).run() for file in files)
        for findings in in_parallel(tasks, args.jobs):
            done.append(findings)
    done.sort(key=lambda each: each.file)
    entries = expected(args.expected)
    print(markdown(done, entries))
    if args.out is not None:
        write(args.out, done, entries)
    if args.results is not None:
        write_page(args.results, done, entries, chosen(checkout, list(FILES)))
    for pattern in idle(done, entries):
        print(f"{args.expected} lists {pattern}, but no such test is lost.")
    bad = unexpected(done, entries)
    if bad:
        print(f"{len(bad)} losses are not expected; {args.store} holds the output of the runs.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
