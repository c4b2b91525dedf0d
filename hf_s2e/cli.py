"""The `s2e` command, thin: each subcommand reads its arguments, asks a room of the package, and prints.

What is heavy is imported where it is needed: `s2e COMMAND --help` costs nothing.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import __version__

OK, FAILED, USAGE = 0, 1, 2  # exit codes; argparse itself exits with 2
Run = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0 done, 1 something failed, 2 wrong usage.

    Expected failures become one sentence on stderr; anything else is a bug and keeps its traceback.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130  # as shells report it
    except _failures() as error:
        print(f"s2e {args.command}: {_first_line(error)}", file=sys.stderr)
        return FAILED


def _failures() -> tuple[type[Exception], ...]:
    """What users can mend. Asked for only where something was raised: it takes torch."""
    from .model.adapter_files_s2e import S2EAdapterError

    return S2EAdapterError, OSError, ValueError, ImportError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="s2e", description="Speech emotion recognition with residual adapters.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, define) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=define(command))
    return parser


# -- s2e predict


def _predict(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound file, URL, or folder with subfolders")
    parser.add_argument("--model", required=True, help="Hub id or folder of a base or an adapter")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="only the K most probable classes")
    parser.add_argument("--json", action="store_true", help='print a list of {"file", "scores" or "error"}')
    return _run_predict


def _run_predict(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    files = [file for given in args.files for file in _sound_files(given)]
    pipe = _load_pipeline(args.model, args.top_k)
    results = []
    with warnings.catch_warnings(), tqdm(total=len(files), unit="file", disable=len(files) < 2) as progress:
        warnings.showwarning = lambda message, *_: tqdm.write(f"s2e predict: {message}", file=sys.stderr)
        for file, answer in zip(files, pipe(file for file in files)):
            results.append(answer if isinstance(answer, dict) else {"file": file, "scores": answer})
            if not args.json:
                _print_result(results[-1], tqdm.write)
            progress.update()
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    return FAILED if any("error" in result for result in results) else OK


def _sound_files(given: str) -> list[str]:
    from .audio import AUDIO_EXTENSIONS

    if not Path(given).is_dir():
        return [given]
    inside = sorted(Path(given).rglob("*"))
    files = [
        str(file)
        for file in inside
        if file.suffix.lower() in AUDIO_EXTENSIONS and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise ValueError(f"{given}: no sound files in this folder; expected {', '.join(AUDIO_EXTENSIONS)}.")
    return files


def _load_pipeline(model: str, top_k: int | None) -> Any:
    """Without transformers' factory, which wraps errors into pages of text."""
    from transformers.utils import logging

    from .hub.download import fetch_repo
    from .model.modeling_s2e import S2EForAudioClassification
    from .pipeline import TASK, S2EPipeline

    logging.disable_progress_bar()
    fetch_repo(model).check()  # says more plainly what is wrong
    return S2EPipeline(S2EForAudioClassification.from_pretrained(model), task=TASK, top_k=top_k)


def _print_result(result: dict[str, Any], write: Callable[..., None]) -> None:
    if "error" in result:
        write(f"s2e predict: {_naming(result)}", file=sys.stderr)
    else:
        scores = "  ".join(f"{score['label']} {score['score']:.3f}" for score in result["scores"])
        write(f"{result['file']}: {scores}", file=sys.stdout)


def _naming(result: dict[str, Any]) -> str:
    """The error, which most often begins with the file already."""
    error, file = result["error"], result["file"]
    return error if error.startswith(file) else f"{file}: {error}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return value


# -- s2e info


def _info(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("repo", help="Hub id or folder of a base or an adapter")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return _run_info


def _run_info(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from .hub.info import describe_repo

    logging.disable_progress_bar()
    found = describe_repo(args.repo)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return OK
    width = max(map(len, found))
    for name, value in found.items():
        for line in _lines(value):
            print(f"{name:<{width}}  {line}")
            name = ""
    return OK


def _lines(value: Any) -> Iterator[str]:
    """A value as the lines of a table cell."""
    if isinstance(value, dict):
        value = [f"{key}: {_listed(labels)}" for key, labels in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        value = ["  ".join(map(str, item.values())) for item in value]
    elif isinstance(value, list):
        value = [_listed(value)] if value else []
    elif isinstance(value, int):
        value = [f"{value:,}"]
    else:
        value = ["-" if value is None else str(value)]
    yield from value or ["none"]


def _listed(items: list) -> str:
    shown = ", ".join(map(str, items[:12]))
    return shown if len(items) <= 12 else f"{shown} ... {items[-1]} ({len(items)} in all)"


# -- s2e audit


def _audit(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("corpus", help="a corpus name: emodb, ravdess, iemocap, folder, manifest, ...")
    parser.add_argument("--data-dir", help="the corpus' folder")
    parser.add_argument("--labels", help="only these classes, separated by commas")
    options_help = """further options of load_corpus, as JSON: '{"label": "emotion"}'"""
    parser.add_argument("--corpus-options", type=_json_object, default={}, metavar="JSON", help=options_help)
    parser.add_argument("--protocol", help="check its folds: a name (loso, 5fold, split, ...) or a JSON file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the report (png, pdf, svg)")
    parser.add_argument("--fail-on-findings", action="store_true", help="exit with 1 if there is any finding")
    return _run_audit


def _run_audit(args: argparse.Namespace) -> int:
    """1 says that there are findings, so that what cannot be audited is wrong usage."""
    from .evaluation.audit import audit_corpus
    from .evaluation.reports import audit_text

    labels = {"labels": args.labels.split(",")} if args.labels else {}
    try:
        report = audit_corpus(args.corpus, args.data_dir, protocol=args.protocol, **(args.corpus_options | labels))
        if args.plot:
            from .evaluation.plots import plot_audit

            plot_audit(report, args.plot, title=args.corpus)
    except (ValueError, OSError, ImportError) as error:
        print(f"s2e audit: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else audit_text(report, args.corpus))
    return FAILED if args.fail_on_findings and report["findings"] else OK


def _json_object(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


# -- s2e card


def _card(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a repo, or a folder of repos")
    parser.add_argument("--results", metavar="FILE", help="summary.json; remembered in training.json")
    return _run_card


def _run_card(args: argparse.Namespace) -> int:
    from .hub.cards import write_card
    from .hub.repo import find_repos

    repos = [repo for folder in args.folders for repo in find_repos(folder)]
    if args.results and len(repos) > 1:
        raise ValueError(f"--results is for one repo, but {len(repos)} were given.")
    for repo in repos:
        print(write_card(repo, args.results))
    return OK


# -- s2e push


def _push(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a repo, or a folder of repos")
    parser.add_argument("--to", required=True, metavar="NAMESPACE", help="user or organisation on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make new repos private")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    return _run_push


def _run_push(args: argparse.Namespace) -> int:
    from .hub import push

    for upload, url in push(args.folders, args.to, private=args.private, dry_run=args.dry_run):
        sizes = upload.sizes
        print(f"{upload.repo_id}  ({sum(sizes.values()) / 1e6:.2f} MB from {upload.repo.folder})")
        for name, size in sizes.items():
            print(f"  {size:>10,}  {name}")
        for line in upload.substitutions:
            print(f"  changed: {line}")
        if upload.left_out:
            print(f"  left out: {', '.join(upload.left_out)}")
        print(f"  {'not sent: dry run' if url is None else url}")
    return OK


# -- s2e pull


def _pull(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("repo", metavar="REPO", help="Hub id of a base or an adapter")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--to", metavar="DIR", help="folder that gets one folder for each repo; by default the cache")
    return _run_pull


def _run_pull(args: argparse.Namespace) -> int:
    from .hub import pull

    print(pull(args.repo, revision=args.revision, to=args.to))
    return OK


# -- s2e adapters


def _adapters(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("base", nargs="?", metavar="BASE", help="Hub id or folder of a base; by default any")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return _run_adapters


def _run_adapters(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .hub import list_adapters

    adapters = list_adapters(args.base)
    if args.json:
        print(json.dumps([asdict(adapter) for adapter in adapters], indent=2, ensure_ascii=False))
        return OK
    for adapter in adapters:
        results = ", ".join(f"{name} {value}" for name, value in adapter.results.items()) or "not evaluated"
        print(f"{adapter.repo_id}  {', '.join(adapter.labels)}  {results}  (base {adapter.base})")
        if adapter.problem:
            print(f"  {adapter.problem}", file=sys.stderr)
    if not adapters:
        print("no adapters found", file=sys.stderr)
    return OK


# -- all of them


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "predict": ("classify sound files and folders", _predict),
    "info": ("show what a base or adapter repo holds", _info),
    "audit": ("look for leaks and damage in a corpus", _audit),
    "card": ("write the cards of repos from their configs and results", _card),
    "push": ("publish bases and adapters on the Hub", _push),
    "pull": ("download a base, or an adapter with its base", _pull),
    "adapters": ("list the adapters of a base on the Hub", _adapters),
}

if __name__ == "__main__":
    sys.exit(main())
