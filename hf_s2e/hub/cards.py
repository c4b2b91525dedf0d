"""Cards of bases and adapters: what a repo is for, what it was trained on, and how good it is.

A card is made from what lies in the repo's folder and from one results file, and from nothing else:

- `config.json` and the weights;
- `training.json`, written by whoever trained: `{"corpora": [{"name", "speakers", "utterances", "hours"}],
  "method", "settings": {NAME: VALUE}, "note", "reported", "evaluation", "results"}`, each optional.
  `results` is the path of the results file, relative to the folder; `evaluation` is what training/pretrain.py
  measured (its evaluation.json); `reported` is a sentence about numbers not measured here;
- the `summary.json` that `training/cross_validate.py` writes (percent, standard deviations over runs), and
  the output of `s2e audit --json` in audit.json beside it.

Texts are in templates/ beside this file; what there is to know of a corpus is in its module in hf_s2e.corpora.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file

from ..corpora import about, list_corpora
from ..evaluation.reports import about_bootstrap, about_choice, origin, started_from, without_hearing
from ..model.adapter_files_s2e import ADAPTER_WEIGHTS, fingerprint
from ..model.configuration_s2e import BASE_DOMAIN, S2EConfig

BASE_WEIGHTS = "model.safetensors"
TRAINING_FACTS = "training.json"
WEIGHTS_LICENSE = "apache-2.0"  # the package's own, where the training data leave that free
OWN_NAMESPACE = "your-name"  # in the card of a repo whose base has no Hub id yet
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: measured, not trained
_SHARED = "s2e.shared."
_PROTOCOLS = {  # for readers of a card; `5fold` and its like are folds of speakers, published ones say what they are
    "loso": "leave one speaker out",
    "session": "leave one session out, one of its speakers tested at a time",
    "split": "the corpus' own split",
}
TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 3  # files that a card names for each finding of the audit
_USED = {"speakers": "{:,} speakers", "utterances": "{:,} utterances", "hours": "{} h"}


def write_card(folder: str | os.PathLike, results: Mapping[str, Any] | str | os.PathLike | None = None) -> Path:
    """Write README.md of a base's or an adapter's folder.

    Args:
        results: a `summary.json`, as a path (remembered in training.json) or read already. By default the one
            that training.json names; where it names none the card says "Not evaluated".

    Returns:
        The card's path.

    Raises:
        ValueError: the folder holds no such repo, or the results are of another corpus, method or label set.
        FileNotFoundError: the results file is not there.
    """
    folder = Path(folder)
    config = S2EConfig.from_json_file(_there(folder, "config.json"))
    training = read_training(folder)
    if isinstance(results, (str, os.PathLike)):
        training["results"] = Path(os.path.relpath(results, folder)).as_posix()
    if results is None and training.get("results"):
        results = folder / training["results"]
        if not results.is_file():  # a repo that was published or copied goes without them
            raise FileNotFoundError(
                f"{folder / TRAINING_FACTS} names the results {training['results']}, which are not there: say where "
                "(--results FILE), or take the line out of it."
            )
    if isinstance(results, (str, os.PathLike)):
        results = _read_results(Path(results))
    card = make_card(folder, config, training, results)
    path = folder / "README.md"
    card.save(path)
    if training:
        write_training(folder, training)
    return path


def _read_results(path: Path) -> dict[str, Any]:
    results, audit = json.loads(path.read_text(encoding="utf-8")), path.with_name("audit.json")
    if audit.is_file():
        results.setdefault("audit", json.loads(audit.read_text(encoding="utf-8")))
    return results


def find_repos(folder: str | os.PathLike) -> list[Path]:
    """The folder itself, if it is a repo, or the repos right inside it: bases first, then adapters, by name.

    Raises:
        ValueError: neither.
    """
    folder = Path(folder)
    places = [folder] if (folder / "config.json").is_file() else sorted(folder.glob("*/"))
    repos = [place for place in places if _weights(place).is_file()]
    if not repos:
        raise ValueError(
            f"{folder}: no repo here; expected config.json beside {BASE_WEIGHTS} (a base) or "
            f"{ADAPTER_WEIGHTS} (an adapter), in this folder or in those inside it."
        )
    return sorted(repos, key=lambda repo: (is_adapter(repo), repo.name))


def is_adapter(folder: str | os.PathLike) -> bool:
    return Path(folder, ADAPTER_WEIGHTS).is_file()


def _weights(folder: Path) -> Path:
    return folder / (ADAPTER_WEIGHTS if is_adapter(folder) else BASE_WEIGHTS)


def read_training(folder: str | os.PathLike) -> dict[str, Any]:
    """What training.json says; empty where there is none."""
    path = Path(folder, TRAINING_FACTS)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_training(folder: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    text = json.dumps(dict(facts), indent=2, ensure_ascii=False)
    Path(folder, TRAINING_FACTS).write_text(text + "\n", encoding="utf-8")


def card_repo_id(folder: str | os.PathLike, config: Any) -> str:
    """The Hub id by which a card names its own repo until a push gives it another."""
    base = config.repo_id or config.base_model_name_or_path or ""
    namespace = base.rpartition("/")[0]
    return f"{namespace or OWN_NAMESPACE}/{Path(folder).resolve().name}"


def about_corpus(used: Mapping[str, Any]) -> dict[str, Any]:
    """Title, language, licence, terms, url and citation of a corpus; what `used` itself says goes first.

    `known` says whether it is one that the package knows, `used` becomes the amount of it in words.
    """
    name = used["name"]
    known = about(name) if name in list_corpora() else None  # that a repo names a module is no reason to import it
    facts = {"title": name, "language": "not stated", "terms": "not stated"}
    facts |= {key: value for key, value in vars(known).items() if value is not None} if known else {}
    amount = [text.format(used[key]) for key, text in _USED.items() if used.get(key) is not None]
    return {**facts, **used, "known": known is not None, "used": ", ".join(amount) or "not recorded"}


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def make_card(folder: Path, config: Any, training: Mapping[str, Any], results: Mapping[str, Any] | None) -> ModelCard:
    """The card of a folder, not yet written; see `write_card`."""
    adapter, labels = is_adapter(folder), [config.id2label[i] for i in range(config.num_labels)]
    method = config.method if adapter else training.get("method")
    emotion = adapter or bool(results) or method in ("plain", "feature_extractor", "fine_tune")
    emotion = emotion or config.base_domain != BASE_DOMAIN  # fused, without training.json
    corpora = [about_corpus(used) for used in training.get("corpora", [])]
    repo_id = card_repo_id(folder, config)
    weights = _weights(folder)
    found = _evaluation(results, method, labels, corpora) if results else None
    card = ModelCard.from_template(
        _metadata(repo_id, config, corpora, found, adapter=adapter, emotion=emotion),
        template_str=_template("adapter.md" if adapter else "base.md") + _template("common.md"),
        repo_id=repo_id,
        config=config,
        labels=labels,
        emotion=emotion,
        training=training,
        corpora=corpora,
        results=found,
        parameters=_count_parameters(weights),
        megabytes=weights.stat().st_size / 1e6,
        fingerprint=None if adapter or config.fused else fingerprint_of(weights, config),
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


def _metadata(repo_id: str, config: Any, corpora: list, found: dict | None, *, adapter: bool, emotion: bool):
    languages = sorted({corpus["language"] for corpus in corpora if corpus["language"] != "not stated"})
    fields: dict[str, Any] = _license(corpora)
    if adapter and config.base_model_name_or_path:
        fields |= {"base_model": config.base_model_name_or_path, "base_model_relation": "adapter"}
        if config.base_model_revision:
            fields["base_model_revision"] = config.base_model_revision
    if found:
        fields |= {"model_name": repo_id.rpartition("/")[2], "eval_results": _eval_results(found)}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        language=languages or None,
        datasets=[corpus["name"] for corpus in corpora if corpus["known"]] or None,
        metrics=["recall", "accuracy", "f1"] if emotion else ["accuracy"],
        tags=["s2e", "speech-emotion-recognition", "residual-adapters"],
        **fields,
    )


def _license(corpora: list[dict[str, Any]]) -> dict[str, str]:
    """The strictest licence that the training data ask of the weights; none where theirs is unknown."""
    if not corpora or any("license" not in corpus for corpus in corpora):
        return {}
    asked = [corpus for corpus in corpora if corpus.get("weights")]
    if not asked:
        return {"license": WEIGHTS_LICENSE}
    strictest = next((corpus for corpus in asked if corpus["weights"] == "other"), asked[0])
    if strictest["weights"] != "other":
        return {"license": strictest["weights"]}
    return {"license": "other", "license_name": f"{strictest['name']}-agreement"}


def _eval_results(found: Mapping[str, Any]) -> list[EvalResult]:
    """For the metadata, where a figure stands without the card's words: the name says whose it is."""
    of_metric = {"ua": ("recall", "UA (mean recall of the classes)"), "wa": ("accuracy", "WA (accuracy)")}
    of_metric["macro_f1"] = ("f1", "macro-F1")
    return [
        EvalResult(
            task_type="audio-classification",
            dataset_type=found["corpus"],
            dataset_name=found["title"],
            dataset_config=found["protocol"]["name"],
            metric_type=kind,
            metric_name=f"{name}, cross-validated: not these weights",
            metric_value=round(found["score"][f"{key}_mean"], 2),
        )
        for key, (kind, name) in of_metric.items()
        if f"{key}_mean" in found["score"]
    ]


def _evaluation(
    results: Mapping[str, Any], method: str | None, labels: list[str], corpora: list[dict[str, Any]]
) -> dict[str, Any]:
    """A summary.json as the template shows it: every number formatted here and nowhere else."""
    if missing := {"corpus", "protocol", "methods", "classes"} - set(results):
        raise ValueError(f"the results lack {sorted(missing)}: no summary.json of training/cross_validate.py.")
    if method not in results["methods"]:
        raise ValueError(f"the results have no method {method!r}; they have {', '.join(results['methods'])}.")
    if list(results["classes"]) != labels:
        raise ValueError(f"the results are for the classes {results['classes']}, but this repo has {labels}.")
    corpus, trained_on = results["corpus"], [used["name"] for used in corpora]
    if trained_on and corpus not in trained_on:
        raise ValueError(f"the results are of {corpus!r}, but this repo was trained on {', '.join(trained_on)}.")
    score, pairs = results["methods"][method], results.get("paired", [])
    copied = ("corpus", "protocol", "recipe", "utterances", "speakers", "classes")
    facts, protocol = about_corpus({"name": corpus}), results["protocol"]["name"]
    published = facts.get("folds", {}).get(protocol)
    return {
        **{key: results.get(key) for key in copied},
        "choice": about_choice(results) if results.get("choice") else None,
        "started": started_from(results) if results.get("base") else None,
        "title": facts["title"],
        "protocol_in_words": published.description if published else _PROTOCOLS.get(protocol, "cross-validation"),
        "method": method,
        "score": score,
        "runs": score.get("runs", 1),
        "intervals": about_bootstrap(results),
        "rows": [_row(name, row, bold=name == method) for name, row in results["methods"].items()],
        "references": [
            _reference(name, row, results["protocol"]["name"]) for name, row in results.get("references", {}).items()
        ],
        "paired": [_comparison(pair) for pair in pairs if method in (pair["a"], pair["b"])],
        "confusion": _confusion(score.get("confusion"), labels),
        "audit": _audit(results.get("audit")),
    }


def _row(name: str, row: Mapping[str, Any], *, bold: bool) -> dict[str, str]:
    trained = row.get("trained_parameters")
    return {
        "name": f"**{name}**" if bold else name,
        "ua": _number(row["ua_mean"], row.get("ua_std")),
        "ci": _interval(row.get("ua_ci95")),
        "wa": _number(row["wa_mean"], row.get("wa_std")),
        "f1": _number(row.get("macro_f1_mean")),
        "runs": str(row.get("runs", "")),
        "parameters": "" if trained is None else f"{trained:,}",
    }


def _reference(name: str, row: Mapping[str, Any], protocol: str) -> dict[str, str]:
    where = f"measured, {protocol}" if origin(row) == "measured" else "as reported elsewhere"
    return {
        "name": f"*{name}* ({where})",
        "ua": _number(row.get("ua")),
        "ci": _interval(row.get("ua_ci95")),
        "wa": _number(row.get("wa")),
        "f1": _number(row.get("macro_f1")),
    }


def _interval(ends: list[float] | None) -> str:
    return f"[{_number(ends[0])}, {_number(ends[1])}]" if ends else ""


def _number(value: float | None, std: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" + ("" if std is None else f" ({std:.1f})")


def _comparison(pair: Mapping[str, Any]) -> str:
    low, high = pair["ci95"]
    return (
        f"{pair['a']} against {pair['b']}: {pair['ua_diff']:+.1f}, 95 % [{low:+.1f}, {high:+.1f}], "
        f"p = {pair['p']:.3g} ({pair['test']})"
    )


def _confusion(matrix: list[list[int]] | None, labels: list[str]) -> list[dict[str, Any]] | None:
    if matrix is None:
        return None
    rows = zip(labels, matrix, strict=True)
    recall = [f"{100 * row[i] / sum(row):.1f} %" if sum(row) else "" for i, row in enumerate(matrix)]
    return [{"label": label, "counts": row, "recall": share} for (label, row), share in zip(rows, recall)]


def _audit(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `s2e audit --json` says, in lines: what the score is to be compared with, and the findings."""
    if report is None:
        return None
    counts = report.get("counts", {})
    alone = without_hearing(counts)
    chance = f" (chance is {counts['chance_ua']:.1f} %)" if alone else ""
    return {
        "alone": f"UA reached without hearing the emotion: {'; '.join(alone)}{chance}." if alone else None,
        "findings": [
            f"{one['severity']}, {one['kind']}: {one.get('message', '')}{_few(one['files'])}"
            for one in report["findings"]
        ],
    }


def _few(files: list[str]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f" ({', '.join(files[:SHOWN])}{more})" if files else ""


def _there(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {name}; expected the folder of a base or of an adapter.")
    return path


def _count_parameters(weights: Path) -> int:
    with safe_open(weights, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_STATISTICS))


def fingerprint_of(weights: Path, config: Any) -> str:
    """The fingerprint of a base, from its file, without building the network."""
    shared = {name: tensor for name, tensor in load_file(weights).items() if name.startswith(_SHARED)}
    return fingerprint({name.removeprefix(_SHARED): shared[name] for name in shared}, config.front_end)


# ---- s2e card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a repo, or a folder of repos")
    parser.add_argument("--results", metavar="FILE", help="summary.json; remembered in training.json")


def run(args: argparse.Namespace) -> int:
    """`s2e card`: write the cards of these repos anew from their configs, training.json and results."""
    repos = [repo for folder in args.folders for repo in find_repos(folder)]
    if args.results and len(repos) > 1:
        raise ValueError(f"--results is for one repo, but {len(repos)} were given.")
    for repo in repos:
        print(write_card(repo, args.results))
    return 0
