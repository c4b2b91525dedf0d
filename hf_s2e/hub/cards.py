"""Cards of bases and adapters: what a repo is for, what it was trained on, and how good it is.

A card is made from what lies in the repo's folder and from one results file, and from nothing else:

- `config.json` and the weights;
- `training.json`, written by whoever trained: `{"corpora": [{"name", "speakers", "utterances", "hours"}], "origin",
  "license", "language", "method", "settings": {NAME: VALUE}, "note", "reported", "evaluation", "results"}`, each
  optional.
  `results` is the path of the results file, relative to the folder; `evaluation` is what training/pretrain.py
  measured (its evaluation.json); `reported` is a sentence about numbers not measured here;
- the `summary.json` that `training/cross_validate.py` writes (percent, standard deviations over runs), and
  the output of `s2e audit --json` in audit.json beside it.

Texts are in templates/ beside this file; what there is to know of a corpus is in its module in hf_s2e.corpora.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..corpora import about, list_corpora
from ..evaluation.reports import about_bootstrap, about_choice, origin, started_from, without_hearing
from ..model.atomic_write_s2e import atomic_write
from ..model.configuration_s2e import BASE_DOMAIN
from .repo import CARD, TRAINING, Repo, as_repo, first_of

WEIGHTS_LICENSE = "apache-2.0"  # the package's own, where the training data leave that free
_PROTOCOLS = {  # for readers of a card; `5fold` and its like are folds of speakers, published ones say what they are
    "loso": "leave one speaker out",
    "session": "leave one session out, one of its speakers tested at a time",
    "split": "the corpus' own split",
}
NETWORKS = {"resnet20": "ResNet20", "campplus": "CAM++"}
TEMPLATES = Path(__file__).parent / "templates"
_USED = {"speakers": "{:,} speakers", "utterances": "{:,} utterances", "hours": "{} h"}


def write_card(repo: Repo | str | os.PathLike, results: Mapping[str, Any] | str | os.PathLike | None = None) -> Path:
    """Write README.md of a base or an adapter.

    Args:
        repo: it, or its folder.
        results: a `summary.json`, as a path (remembered in training.json) or read already. By default the one
            that training.json names; where it names none the card says "Not evaluated".

    Returns:
        The card's path.

    Raises:
        ValueError: the folder holds no such repo, or the results are of another corpus, method or label set.
        S2EAdapterError: a file of the repo is damaged.
        FileNotFoundError: the results file is not there.
    """
    repo = as_repo(repo)
    training = dict(repo.training)
    if isinstance(results, (str, os.PathLike)):
        training["results"] = Path(os.path.relpath(results, repo.folder)).as_posix()
        results = _read_results(Path(results))
    elif results is None and repo.results:
        if not repo.results.is_file():
            raise FileNotFoundError(
                f"{repo.folder / TRAINING} names the results {training['results']}, which are not there: say where "
                "(--results FILE), or take the line out of it."
            )
        results = _read_results(repo.results)
    card, path = make_card(repo, results), repo.folder / CARD
    with atomic_write(path) as partial:
        card.save(partial)
    if training != repo.training:
        repo.write_training(training)
    return path


def _read_results(path: Path) -> dict[str, Any]:
    results, audit = json.loads(path.read_text(encoding="utf-8")), path.with_name("audit.json")
    if audit.is_file():
        results.setdefault("audit", json.loads(audit.read_text(encoding="utf-8")))
    return results


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


def make_card(repo: Repo, results: Mapping[str, Any] | None) -> ModelCard:
    """The card of a repo, not yet written; see `write_card`."""
    config, training, labels = repo.config, repo.training, repo.labels
    method = config.method if repo.is_adapter else training.get("method")
    emotion = repo.is_adapter or bool(results) or method in ("plain", "feature_extractor", "fine_tune")
    emotion = emotion or config.base_domain != BASE_DOMAIN  # fused, without training.json
    corpora = [about_corpus(used) for used in training.get("corpora", [])]
    found = _evaluation(results, method, labels, corpora) if results else None
    card = ModelCard.from_template(
        _metadata(repo, corpora, found, emotion=emotion),
        template_str=_template("adapter.md" if repo.is_adapter else "base.md") + _template("common.md"),
        repo_id=repo.hub_id,
        config=config,
        labels=labels,
        emotion=emotion,
        network=NETWORKS[config.backbone],
        training=training,
        corpora=corpora,
        results=found,
        parameters=repo.parameters,
        megabytes=repo.weights_bytes / 1e6,
        fingerprint=repo.fingerprint,
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


def _metadata(repo: Repo, corpora: list[dict[str, Any]], found: dict[str, Any] | None, *, emotion: bool):
    config = repo.config
    languages = sorted({corpus["language"] for corpus in corpora if corpus["language"] != "not stated"})
    fields: dict[str, Any] = _license(corpora)
    if repo.training.get("license"):  # of weights that were trained elsewhere
        fields = {"license": repo.training["license"]}
        languages = repo.training.get("language", languages)
    if repo.is_adapter and config.base_model_name_or_path:
        fields |= {"base_model": config.base_model_name_or_path, "base_model_relation": "adapter"}
        if config.base_model_revision:
            fields["base_model_revision"] = config.base_model_revision
    if found:
        fields |= {"model_name": repo.name, "eval_results": _eval_results(found)}
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
    return f" ({first_of(files)})" if files else ""
