"""The `s2e` command. A subcommand is a function in `COMMANDS`; heavy modules are imported where needed."""

import argparse
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OK, FAILED, USAGE = 0, 1, 2  # exit codes; argparse itself exits with 2
Run = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0 done, 1 something failed, 2 wrong usage.

    Expected failures become one sentence on stderr; anything else is a bug and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    from .model.adapter_files_s2e import S2EAdapterError

    try:
        return args.run(args)
    except (S2EAdapterError, OSError, ValueError, ImportError) as error:
        print(f"s2e {args.command}: {_first_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130  # as shells report it


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    about = "Speech emotion recognition with residual adapters."
    parser = argparse.ArgumentParser(prog="s2e", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, define) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # the others need not be imported
            command.set_defaults(run=define(command))
    return parser


def _from_module(name: str, command: str = "") -> Callable[[argparse.ArgumentParser], Run]:
    """A subcommand that lives in a module with `add_arguments(parser)` and `run(args) -> int`.

    A module with several has `add_<command>_arguments` and `run_<command>`.
    """
    add, run = (f"add_{command}_arguments", f"run_{command}") if command else ("add_arguments", "run")

    def define(parser: argparse.ArgumentParser) -> Run:
        module = importlib.import_module(name, package=__package__)
        getattr(module, add)(parser)
        return getattr(module, run)

    return define


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

    from .model.modeling_s2e import S2EForAudioClassification
    from .pipeline import TASK, S2EPipeline

    _config_of(model)  # says more plainly what is wrong
    logging.disable_progress_bar()
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


def describe_repo(source: str) -> dict[str, Any]:
    """What a folder or Hub repo holds.

    Returns:
        `source`, `kind` (base, plain base, fused or adapter), `labels`, `parameters`, `weights_bytes`,
        `fingerprint` (of the base; for an adapter of the one it needs) and `results` (of the card's
        model-index: dataset, metric, value); of a base also `repo_id` and `adapters` (name to labels), of an
        adapter `name`, `base`, `base_revision` and `method`.

    Raises:
        S2EAdapterError, OSError, ValueError: there is no such repo, or it is not one of this package's.
    """
    from .model.adapter_files_s2e import ADAPTER_WEIGHTS, fetch

    config = _config_of(source)
    adapter = fetch(source, ADAPTER_WEIGHTS, required=False)
    about = _about_adapter(config, adapter) if adapter else _about_base(config, source)
    card = fetch(source, "README.md", required=False)
    return {"source": source, **about, "results": _card_results(card) if card else []}


def _config_of(source: str) -> Any:
    """The config of a base or adapter; transformers itself would take any model's."""
    from .model.adapter_files_s2e import BAD_CONFIG, fetch
    from .model.configuration_s2e import S2EConfig

    file = fetch(source, "config.json", required=False)
    if file is None:
        found = "no config.json in this folder"
        if not Path(source).is_dir():
            found = "no such folder, and no such repo on the Hub, or the Hub cannot be reached"
        raise ValueError(f"{source}: {found}; expected the folder or Hub id of a base or adapter.")
    try:
        model_type = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
        config = S2EConfig.from_json_file(file) if model_type == S2EConfig.model_type else None
    except BAD_CONFIG as error:
        raise ValueError(f"{source}: config.json is damaged ({error}); fetch it again.") from error
    if config is None:
        raise ValueError(f"{source}: a model of type {model_type!r}; expected 's2e', made with this package.")
    return config


def _about_adapter(config: Any, weights: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a whole safetensors file ({error}); fetch it again.") from error
    measured = ("running_mean", "running_var")  # of batch norm, not trained
    return {
        "kind": "adapter",
        "name": config.adapter_name,
        "labels": config.labels_of(config.active_domain),
        "base": config.base_model_name_or_path or config.base_local_path,
        "base_revision": config.base_model_revision,
        "method": config.method,
        "fingerprint": config.base_fingerprint,
        "parameters": sum(math.prod(shapes[name]) for name in shapes if not name.endswith(measured)),
        "weights_bytes": Path(weights).stat().st_size,
    }


def _about_base(config: Any, source: str) -> dict[str, Any]:
    from transformers.utils import SAFE_WEIGHTS_NAME, logging

    from .model.adapter_files_s2e import fetch
    from .model.modeling_s2e import S2EForAudioClassification

    logging.disable_progress_bar()
    model = S2EForAudioClassification.from_pretrained(source)
    adapters = [name for name in config.domains if name != config.base_domain]
    return {
        "kind": "fused" if config.fused else "base" if config.adapters else "plain base",
        "repo_id": config.repo_id,
        "labels": config.labels_of(config.active_domain),
        "adapters": {name: config.labels_of(name) for name in adapters},
        "fingerprint": None if config.fused else model.base_fingerprint,
        "parameters": model.num_parameters(),
        "weights_bytes": Path(fetch(source, SAFE_WEIGHTS_NAME)).stat().st_size,
    }


def _card_results(card: str) -> list[dict[str, Any]]:
    from huggingface_hub import ModelCard

    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return [
        {
            "dataset": result.dataset_name,
            "metric": result.metric_name or result.metric_type,
            "value": result.metric_value,
        }
        for result in data.eval_results or []
    ]


# -- output


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "predict": ("classify sound files and folders", _predict),
    "info": ("show what a base or adapter repo holds", _info),
    "audit": ("look for leaks and damage in a corpus", _from_module(".evaluation.audit")),
    "card": ("write the cards of repos from their configs and results", _from_module(".hub.cards")),
    "push": ("publish bases and adapters on the Hub", _from_module(".hub.upload")),
    "pull": ("download a base, or an adapter with its base", _from_module(".hub.download", "pull")),
    "adapters": ("list the adapters of a base on the Hub", _from_module(".hub.download", "adapters")),
}

if __name__ == "__main__":
    sys.exit(main())
