"""From per-utterance predictions to the paper's tables: summary.json, markdown, LaTeX; the audit as text.

Everything in a summary is in percent. UA and WA are pooled over the folds (each utterance is tested once in a
run) and then averaged over the runs.
"""

from collections import Counter
from itertools import combinations

import numpy as np

from .metrics import bootstrap_ci, confusion_matrix, mean_std, paired_test, scores

COLUMNS = ("run", "fold", "method", "utterance", "speaker", "label", "prediction")
SHARED_SPEAKERS = (
    "Not speaker-disjoint: speakers of the test part may be in training, so these figures may be inflated."
)
SHOWN = 5  # files that the audit's text names for each finding
MANY_CLASSES = 20  # more are counted, not listed: the classes are speakers


def summarize(
    predictions,
    *,
    corpus,
    protocol,
    recipe,
    base,
    classes,
    trained_parameters,
    starts=None,
    references=None,
    choice=None,
) -> dict:
    """The content of summary.json from one prediction per utterance, method and run.

    predictions: a table (pandas DataFrame, or the path of a parquet file) with the columns run, fold, method,
        utterance, speaker, label, prediction; labels as class numbers or names. Every run of every method has
        to hold every utterance exactly once.
    protocol: a `Protocol`, or a dict with `name`, `hash`, `speaker_disjoint`.
    trained_parameters: method -> number. references: name -> {"ua", "wa"} in percent, for the tables; with
        "measured": True where they were measured under this protocol, and then perhaps `macro_f1`, `ua_ci95`,
        `wa_ci95`. All others are called "reported". What else they hold is kept.
    starts: method -> the network that it starts from, by name.
    choice: where each fold chose its recipe, what `choose_recipes` of hf_s2e.training.fold_runs returned.

    Each method has `ua_mean`, `ua_std`, `wa_mean`, `wa_std` (None for a single run), `macro_f1_mean`,
    `ua_ci95`, `wa_ci95`, `ua_fold_mean` and `wa_fold_mean` (mean of the folds' own scores), `recall` by
    class, `confusion` summed over the runs, `runs` (their number) and `trained_parameters`. `paired` holds
    every pair of methods. Raises ValueError for an incomplete or contradictory table.
    """
    frame = _checked(predictions, list(classes))
    utterances = frame.drop_duplicates("utterance").set_index("utterance")
    labels, folds = utterances["label"].to_numpy(), utterances["fold"].to_numpy()
    known = utterances["speaker"].notna().all() and (utterances["speaker"] != "").all()
    speakers = utterances["speaker"].to_numpy() if known else None
    runs = {  # method -> (runs, utterances)
        method: part.pivot(index="run", columns="utterance", values="prediction")[utterances.index].to_numpy()
        for method, part in frame.groupby("method", sort=False)
    }
    if missing := [method for method in runs if method not in trained_parameters]:
        raise ValueError(f"trained_parameters lacks {', '.join(missing)}")
    if not isinstance(protocol, dict):
        protocol = {key: getattr(protocol, key) for key in ("name", "hash", "speaker_disjoint")}
    return {
        "corpus": corpus,
        "protocol": {key: protocol[key] for key in ("name", "hash", "speaker_disjoint")},
        "recipe": recipe,
        "base": base,
        **({"starts": {method: starts[method] for method in runs if method in starts}} if starts else {}),
        "utterances": len(labels),
        "speakers": len(set(speakers)) if known else None,
        "methods": {
            method: {
                **_method(labels, of_method, list(classes), speakers, folds),
                "trained_parameters": int(trained_parameters[method]),
            }
            for method, of_method in runs.items()
        },
        "references": dict(references or {}),
        "classes": list(classes),
        **({"choice": choice} if choice else {}),
        "paired": [_pair(a, b, labels, runs, len(classes), speakers) for a, b in combinations(runs, 2)],
    }


def markdown_table(summary) -> str:
    """The paper's Table II for one corpus, then the paired tests, as markdown with what they mean."""
    lines = [_about(summary), ""]
    if not summary["protocol"]["speaker_disjoint"]:
        lines += [f"**{SHARED_SPEAKERS}**", ""]
    lines += [
        "| method | UA | WA | macro-F1 | UA, 95 % interval | runs | trained parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in summary["methods"].items():
        lines.append(
            f"| {name} | {_spread(m, 'ua')} | {_spread(m, 'wa')} | {m['macro_f1_mean']:.2f} "
            f"| {_interval(m['ua_ci95'])} | {m['runs']} | {m['trained_parameters']:,} |"
        )
    for name, reference in summary["references"].items():
        ua, wa, f1, interval = _reference(reference)
        lines.append(f"| *{name} ({origin(reference)})* | {ua} | {wa} | {f1} | {interval} | | |")
    lines += ["", _about_intervals(summary)]
    if "choice" in summary:
        lines += ["", about_choice(summary), "", *_choice_table(summary)]
    if summary["paired"]:
        lines += ["", "| a | b | UA of a minus b | 95 % interval | p |", "|---|---|---|---|---|"]
        for pair in summary["paired"]:
            lines.append(
                f"| {pair['a']} | {pair['b']} | {pair['ua_diff']:+.2f} | {_interval(pair['ci95'])} | {_p(pair['p'])} |"
            )
        lines += ["", _about_tests(summary)]
    return "\n".join(lines) + "\n"


def latex_table(summary) -> str:
    """The same for a paper: two tables for the package booktabs."""
    note = "" if summary["protocol"]["speaker_disjoint"] else rf" \textbf{{{SHARED_SPEAKERS}}}"
    rows = [
        rf"{_tex(name)} & {_spread(m, 'ua')} & {_spread(m, 'wa')} & {m['macro_f1_mean']:.2f} & "
        rf"{_interval(m['ua_ci95'])} & {m['trained_parameters']:,} \\"
        for name, m in summary["methods"].items()
    ]
    references = [
        rf"{_tex(name)} ({origin(r)}) & {' & '.join(_reference(r))} & \\" for name, r in summary["references"].items()
    ]
    text = _tex_table(
        "lrrrrr",
        r"Method & UA & WA & macro-F1 & UA, 95\,\% interval & Trained parameters \\",
        rows + ([r"\midrule", *references] if references else []),
        _tex(" ".join([_about(summary), _about_intervals(summary), *_choice_in_words(summary)])) + note,
    )
    if summary["paired"]:
        rows = [
            rf"{_tex(pair['a'])} & {_tex(pair['b'])} & ${pair['ua_diff']:+.2f}$ & "
            rf"${pair['ci95'][0]:.1f}$ to ${pair['ci95'][1]:.1f}$ & {_tex(_p(pair['p']))} \\"
            for pair in summary["paired"]
        ]
        header = r"a & b & UA of a minus b & 95\,\% interval & p \\"
        text += "\n" + _tex_table("llrrr", header, rows, _tex(_about_tests(summary)))
    return text


def origin(reference) -> str:
    """Where a reference's numbers come from, as tables and figures say it."""
    return "measured" if reference.get("measured") else "reported"


def audit_text(report, title="corpus") -> str:
    """The report of `hf_s2e.evaluation.audit.audit` for people: the counts, then each finding with its first files."""
    counts = report["counts"]
    sizes = [sum(labels.values()) for labels in counts["speakers"].values()]
    lines = [f"{title}: {counts['files']} files, {counts['hours']:.2f} h"]
    classes = counts["classes"]
    named = ", ".join(f"{name} {number}" for name, number in classes.items())
    if len(classes) > MANY_CLASSES:
        named = f"{len(classes)}, with {min(classes.values())} to {max(classes.values())} utterances"
    lines.append(f"  classes   {named}")
    if sizes:
        lines.append(f"  speakers  {len(sizes)}, with {min(sizes)} to {max(sizes)} utterances")
    if "duration_s" in counts:
        seconds = counts["duration_s"]
        lines.append(f"  duration  {seconds['min']:.2f} to {seconds['max']:.2f} s, median {seconds['median']:.2f} s")
    rates = counts["sampling_rates"].items()
    lines.append("  rates     " + ", ".join(f"{rate} Hz: {number}" for rate, number in rates))
    lines += [f"  UA        {each} (chance {counts['chance_ua']:.1f} %)" for each in without_hearing(counts)]
    findings = report["findings"]
    lines.append(f"{len(findings)} finding{'' if len(findings) == 1 else 's'}{':' if findings else ''}")
    for finding in findings:
        lines.append(f"  {finding['severity']:7}  {finding['kind']}: {finding['message']}")
        lines += [f"             {name}" for name in finding["files"][:SHOWN]]
        if len(finding["files"]) > SHOWN:
            lines.append(f"             and {len(finding['files']) - SHOWN} more (all with --json)")
    return "\n".join(lines)


def without_hearing(counts):
    """The trivial baselines of an audit's `counts` in words: the UA that something else than the emotion reaches."""
    return [
        f"{'no more than chance' if counts[key] <= counts['chance_ua'] else f'{counts[key]:.1f} %'} from {what}"
        for key, what in AUDIT_ACCURACIES.items()
        if counts.get(key) is not None
    ]


AUDIT_ACCURACIES = {
    "ua_by_speaker": "the speaker alone, utterances split at random",
    "ua_by_speaker_in_protocol": "the speaker alone, in the protocol's folds",
    "ua_by_duration": "the duration alone",
}


def _checked(predictions, classes):
    if not hasattr(predictions, "columns"):
        import pandas

        predictions = pandas.read_parquet(predictions)
    if missing := [column for column in COLUMNS if column not in predictions.columns]:
        raise ValueError(f"the predictions lack the columns {', '.join(missing)}")
    if not len(predictions):
        raise ValueError("the predictions are empty")
    frame = predictions[list(COLUMNS)].copy()
    for column in ("label", "prediction"):
        frame[column] = _numbers(frame[column], classes, column)
    repeated = frame.duplicated(["method", "run", "utterance"])
    if repeated.any():
        row = frame[repeated].iloc[0]
        raise ValueError(f"{row['method']}, run {row['run']}: {row['utterance']} is there more than once")
    everything = frame["utterance"].nunique()
    sizes = frame.groupby(["method", "run"], sort=False).size()
    if (sizes != everything).any():
        (method, run), size = next(iter(sizes[sizes != everything].items()))
        found = f"{size} of {everything} utterances"
        raise ValueError(f"{method}, run {run} has {found}: let it finish, or leave it out")
    for column in ("label", "speaker", "fold"):
        different = frame.groupby("utterance")[column].nunique(dropna=False) > 1
        if different.any():
            raise ValueError(f"{different.idxmax()} has different values of {column!r} in different runs")
    return frame


def _numbers(values, classes, column):
    """Class numbers of a column that holds numbers or names."""
    if values.dtype.kind in "iu":
        if not values.between(0, len(classes) - 1).all():
            raise ValueError(f"{column} holds numbers outside 0..{len(classes) - 1}")
        return values
    unknown = sorted({str(value) for value in values} - set(classes))
    if unknown:
        raise ValueError(f"{column} holds {', '.join(unknown[:4])}; the classes are {', '.join(classes)}")
    return values.map({name: number for number, name in enumerate(classes)}).astype(int)


def _method(labels, runs, classes, speakers, folds):
    pooled = [scores(labels, run, len(classes)) for run in runs]
    by_fold = [
        [scores(labels[folds == fold], run[folds == fold], len(classes)) for fold in np.unique(folds)] for run in runs
    ]
    (ua, ua_std), (wa, wa_std) = (mean_std([run[key] for run in pooled]) for key in ("ua", "wa"))
    confusion = sum(confusion_matrix(labels, run, len(classes)) for run in runs)
    support = confusion.sum(1)
    return {
        "ua_mean": _percent(ua),
        "ua_std": _percent(ua_std),
        "wa_mean": _percent(wa),
        "wa_std": _percent(wa_std),
        "macro_f1_mean": _percent(np.mean([run["macro_f1"] for run in pooled])),
        "ua_ci95": [_percent(v) for v in bootstrap_ci(labels, runs, len(classes), speakers)],
        "wa_ci95": [_percent(v) for v in bootstrap_ci(labels, runs, len(classes), speakers, metric="wa")],
        "ua_fold_mean": _percent(np.mean([[fold["ua"] for fold in run] for run in by_fold])),
        "wa_fold_mean": _percent(np.mean([[fold["wa"] for fold in run] for run in by_fold])),
        "recall": {
            name: _percent(row[i] / n) if n else None
            for i, (name, row, n) in enumerate(zip(classes, confusion, support))
        },
        "confusion": confusion.tolist(),
        "runs": len(runs),
    }


def _pair(a, b, labels, runs, num_classes, speakers):
    result = paired_test(labels, runs[a], runs[b], num_classes, speakers)
    percent = {"ua_diff": _percent(result["ua_diff"]), "ci95": [_percent(v) for v in result["ci95"]]}
    return {"a": a, "b": b, **result, **percent}


def _percent(value):
    return None if value is None else round(100 * float(value), 4)


def _about(summary):
    protocol = summary["protocol"]
    classes = len(summary["classes"])
    speakers = f", {summary['speakers']} speakers" if summary["speakers"] else ""
    disjoint = "speaker-disjoint" if protocol["speaker_disjoint"] else "NOT speaker-disjoint"
    return (
        f"{summary['corpus']}: {summary['utterances']} utterances{speakers}, {classes} classes; "
        f"protocol {protocol['name']} ({disjoint}, {protocol['hash'][:12]}); recipe {summary['recipe']}; "
        f"{started_from(summary)}."
    )


def started_from(summary):
    """What the networks were before this training, in words: one base, or the methods that start from each."""
    if "starts" not in summary:
        return f"base {summary['base']}"
    methods = {}
    for method, start in summary["starts"].items():
        methods.setdefault(start, []).append(method)
    return "started: " + ", ".join(f"{' and '.join(names)} from {start}" for start, names in methods.items())


def about_bootstrap(summary):
    units = {None: "utterances (no speaker ids)", 1: "utterances (of one speaker)"}
    return f"bootstrap over {units.get(summary.get('speakers'), 'speakers')}"


def _about_intervals(summary):
    return (
        "UA and WA in %, pooled over the folds: mean (standard deviation) over the runs. "
        f"Intervals: {about_bootstrap(summary)}, for the runs at hand."
    )


def about_choice(summary):
    return f"Recipes, chosen among {', '.join(summary['choice']['candidates'])}. {summary['choice']['rule']}"


def _folds_by_recipe(summary):
    return {method: Counter(folds.values()) for method, folds in summary["choice"]["chosen"].items()}


def _choice_table(summary):
    """How well each recipe did where it was chosen by, and how many folds took it, as lines of markdown."""
    taken, scored = _folds_by_recipe(summary), summary["choice"]["validation_ua"]
    yield f"| mean UA on validation speakers, folds that took it | {' | '.join(taken)} |"
    yield "|---" * (len(taken) + 1) + "|"
    for name in summary["choice"]["candidates"]:
        means = [np.mean([ua[name] for ua in scored[method].values()]) for method in taken]
        cells = [f"{mean:.2f}, {counts[name]}" for mean, counts in zip(means, taken.values())]
        yield f"| {name} | {' | '.join(cells)} |"


def _choice_in_words(summary):
    """The rule, and the same numbers for a caption; nothing where no recipe was chosen."""
    if "choice" in summary:
        yield about_choice(summary)
        for method, counts in _folds_by_recipe(summary).items():
            yield f"{method}: {', '.join(f'{name} {number}' for name, number in counts.most_common())} folds."


def _about_tests(summary):
    tests = ", ".join(sorted({pair["test"] for pair in summary["paired"]}))
    count = len(summary["paired"])
    return f"p: {tests}; two-sided, not corrected for {count} comparison{'s' if count > 1 else ''}."


def _spread(method, key):
    deviation = method[f"{key}_std"]
    return f"{method[f'{key}_mean']:.2f}" + ("" if deviation is None else f" ({deviation:.2f})")


def _interval(ends):
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def _reference(reference):
    """UA, WA, macro-F1 and the interval of UA as text, empty where they are not known."""
    interval = _interval(reference["ua_ci95"]) if "ua_ci95" in reference else ""
    return *(_number(reference, key) for key in ("ua", "wa", "macro_f1")), interval


def _number(reference, key):
    value = reference.get(key)
    return "" if value is None else f"{value:.2f}"


def _p(value):
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _tex(text):
    for character in "&%_#$":
        text = text.replace(character, "\\" + character)
    return text.replace("<", "$<$")


def _tex_table(columns, header, rows, caption):
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            header,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
