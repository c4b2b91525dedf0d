"""Write docs/results.md: all tables and plots of results/, from the files there and nothing else.

    python training/results_page.py [--results results] [--output docs/results.md]

A folder is shown if it holds summary.json (training/cross_validate.py) or, alone, references.json
(benchmarks/references.py); what else there is of audit.json, settings.json, protocol.json, runs.json and the plots
adds to it, and what was not run is said.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hf_s2e.evaluation.protocols import Protocol
from hf_s2e.evaluation.reports import markdown_table, origin, without_hearing
from hf_s2e.training.methods import TABLE_METHODS
from hf_s2e.training.result_folder import TABLE_RUNS, ResultFolder
from hf_s2e.training.runtime import readable_errors

HEAD = """\
# Results

The speakers of a fold's test part take no part in its training, unless a table says "NOT speaker-disjoint". Scores
are in percent, the mean (standard deviation) over the runs; an interval says how far a score could move with other
speakers, not with other runs, and two rows differ only as far as their paired test says so. *Measured* references
were run on the same folds, *reported* ones are other people's figures, under conditions that may differ.
No figure here is typed by hand: `python training/results_page.py` writes this page from the files in `results/`, and
`make results` makes those.
"""
PACKAGES = ("python", "torch", "transformers", "accelerate")
LIMITS = {"max_train_steps": "batches", "max_train_samples": "utterances"}


def read_folder(folder: Path) -> dict:
    """The files of a result by their names; those that are missing are None."""
    content = {"folder": folder, "protocol": None}
    for name in ("summary", "references", "audit", "settings"):
        file = folder / f"{name}.json"
        content[name] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if (folder / "protocol.json").is_file():
        content["protocol"] = Protocol.load(folder / "protocol.json")
    if summary := content["summary"]:
        rows = summary["methods"]
        summary["methods"] = {name: rows[name] for name in dict.fromkeys([*TABLE_METHODS, *rows]) if name in rows}
        content["references"] = summary["references"]
    return content


# ---- all results in one table


def overview(results: list[dict], link: str) -> Iterator[str]:
    methods = [*TABLE_METHODS]
    for one in results:
        methods += [name for name in (one["summary"] or {}).get("methods", ()) if name not in methods]
    yield f"| corpus | protocol | recipe | base | {' | '.join(methods)} | best reference |"
    yield "|---" * (len(methods) + 5) + "|"
    for one in results:
        about, protocol, folder = one["summary"], one["protocol"], one["folder"].name
        corpus, classes, name = folder, None, ""
        if protocol:
            corpus, classes, name = protocol.corpus, protocol.classes, protocol.name
        if about:
            corpus, classes, name = about["corpus"], about["classes"], about["protocol"]["name"]
        where = f"[{corpus}]({link}/{folder})" + (f", {len(classes)} classes" if classes else "")
        rows = about["methods"] if about else {}
        cells = [ua(rows[method]) if method in rows else "–" for method in methods]
        recipe, base = (about["recipe"], about["base"]) if about else ("", "")
        yield f"| {where} | {name} | {recipe} | {base} | {' | '.join(cells)} | {best(one['references'])} |"
    yield ""
    yield f"UA in %, mean (standard deviation) over {TABLE_RUNS} runs, or as many as are said; –: no whole run."


def ua(row: dict) -> str:
    deviation = "" if row["ua_std"] is None else f" ({row['ua_std']:.2f})"
    runs = "" if row["runs"] == TABLE_RUNS else f", {row['runs']} run{'s' * (row['runs'] > 1)}"
    return f"{row['ua_mean']:.2f}{deviation}{runs}"


def best(references: dict | None) -> str:
    known = {name: one for name, one in (references or {}).items() if one.get("ua") is not None}
    if not known:
        return "none"
    name = max(known, key=lambda name: known[name]["ua"])
    return f"{known[name]['ua']:.2f}, {name} ({origin(known[name])})"


# ---- one result


def section(one: dict, link: str) -> Iterator[str]:
    """A folder with summary.json."""
    summary, folder = one["summary"], one["folder"]
    here, name, recipe = f"{link}/{folder.name}", summary["protocol"]["name"], summary["recipe"]
    yield f"## {summary['corpus']}, {len(summary['classes'])} classes, {name}, recipe {recipe}\n"
    yield markdown_table(summary)
    if (folder / "references.md").is_file():
        yield f"Paired tests of the methods with the references: [references.md]({here}/references.md).\n"
    yield from plots(summary, folder, here)
    if one["audit"]:
        yield audit(one["audit"], here) + "\n"
    if ran := ResultFolder(folder).environments():
        yield f"Fold-runs kept, those of unfinished runs too: {'; '.join(ran_on(*each) for each in ran)}.\n"
    if commands := (one["settings"] or {}).get("commands"):
        made_by = "This command makes it" if len(commands) == 1 else "These commands made it"
        yield f"{made_by}, where DIR holds the corpus, and resumes a run that was stopped:\n"
        yield "```bash\n{}\n```\n".format("\n".join(commands))
    yield "Not run:\n"
    yield from (f"- {line}" for line in [*not_run(one)] or [f"nothing; every method has {TABLE_RUNS} runs or more"])
    yield ""


def plots(summary: dict, folder: Path, here: str) -> Iterator[str]:
    if (folder / "bars.png").is_file():
        yield f"![UA and WA of the methods and references]({here}/bars.png)\n"
    confused = [name for name in summary["methods"] if (folder / f"confusion-{name}.png").is_file()]
    if confused:
        yield f"| {' | '.join(f'{name}, confusions' for name in confused)} |"
        yield "|---" * len(confused) + "|"
        yield f"| {' | '.join(f'![confusion matrix of {name}]({here}/confusion-{name}.png)' for name in confused)} |\n"


def audit(report: dict, here: str) -> str:
    counts, findings = report["counts"], report["findings"]
    found = "; ".join(f"{one['severity']}, {one['kind']}: {one['message']}" for one in findings) or "nothing"
    rates = ", ".join(f"{number:,} files at {rate} Hz" for rate, number in counts.get("sampling_rates", {}).items())
    text = f"[The audit]({here}/audit.json) of the corpus{rates and f' ({rates})'} found {found}."
    if alone := without_hearing(counts):
        text += f" UA without hearing the emotion: {'; '.join(alone)} (chance {counts['chance_ua']:.1f} %)."
    return text


def ran_on(environment: dict, count: int) -> str:
    precision, revision = environment["mixed_precision"], environment["git_revision"] or "not known"
    parts = [environment["device"], "float32" if precision == "no" else f"mixed precision {precision}"]
    parts += [f"{name} {environment[name]}" for name in PACKAGES]
    revision = revision[:12] if len(revision) == 40 else revision
    parts += [f"revision {revision}{' with changes' * bool(environment['git_changed'])}"]
    return f"{count} on {', '.join(parts)}"


def not_run(one: dict) -> Iterator[str]:
    """What a reader of the table might believe to have been run."""
    rows, protocol = one["summary"]["methods"], one["protocol"]
    if missing := [name for name in TABLE_METHODS if name not in rows]:
        yield f"{', '.join(missing)}: no whole run"
    for name, row in rows.items():
        if row["runs"] < TABLE_RUNS:
            yield f"{name}: {row['runs']} of {TABLE_RUNS} runs are in the table"
    if not one["references"]:
        yield "references under this protocol"
    for key, what in LIMITS.items():
        if limit := (one["settings"] or {}).get(key):
            yield f"the whole recipe: no training had more than {limit} {what}"
    if protocol:
        yield from not_shown(ResultFolder(one["folder"]).folds_by_run(), rows, len(protocol.folds))


def not_shown(finished: dict[tuple[str, int], set[str]], rows: dict, folds: int) -> Iterator[str]:
    """Fold-runs that are kept and not in the table."""
    for (method, run), done in finished.items():
        if len(done) < folds:
            yield f"{method}, run {run + 1}: begun, {len(done)} of {folds} folds, not in the table"
    whole = Counter(method for (method, _), done in finished.items() if len(done) == folds)
    for method, number in whole.items():
        shown = rows[method]["runs"] if method in rows else 0
        if number > shown:
            yield f"{method}: a new table (`--report_only`), {number} runs are whole and {shown} in the one above"


def references_section(one: dict) -> Iterator[str]:
    """A folder with references.json alone."""
    references, protocol, folder = one["references"], one["protocol"], one["folder"]
    about = f"{protocol.corpus}, {len(protocol.classes)} classes, {protocol.name}" if protocol else folder.name
    yield f"## {about}: references only\n"
    if protocol:
        disjoint = "speaker-disjoint" if protocol.speaker_disjoint else "NOT speaker-disjoint"
        yield f"{protocol.utterances} utterances, {len(protocol.folds)} folds, {disjoint} ({protocol.hash[:12]}).\n"
    yield "| reference | UA | WA | macro-F1 | UA, 95 % interval | features |"
    yield "|---|---|---|---|---|---|"
    for name, one_of in references.items():
        scores = [f"{one_of[key]:.2f}" if key in one_of else "" for key in ("ua", "wa", "macro_f1")]
        interval = "{:.1f} to {:.1f}".format(*one_of["ua_ci95"]) if "ua_ci95" in one_of else ""
        features = f"{one_of['features']:,}" if "features" in one_of else ""
        yield f"| *{name} ({origin(one_of)})* | {' | '.join([*scores, interval, features])} |"
    yield ""
    versions = {name: number for one_of in references.values() for name, number in one_of.get("versions", {}).items()}
    if versions:
        yield f"Run with {', '.join(f'{name} {number}' for name, number in versions.items())}.\n"
    if protocol:
        flags = f"--corpus {protocol.corpus} --data_dir DIR --protocol {protocol.name}"
        command = f"python benchmarks/references.py {flags} --output_dir results/{folder.name}"
        yield f"This command makes it, where DIR holds the corpus:\n\n```bash\n{command}\n```\n"
    yield f"Not run:\n\n- {', '.join(TABLE_METHODS)}: no whole run\n"


def results_page(results: Path, output: Path) -> str:
    """The page's text; links are relative to the place of `output`."""
    shown = [read_folder(folder) for folder in sorted(results.glob("*/"))]
    shown = [one for one in shown if one["summary"] or one["references"]]
    link = Path(os.path.relpath(results.resolve(), output.resolve().parent)).as_posix()
    lines = [HEAD, *overview(shown, link), ""]
    for one in shown:
        lines += section(one, link) if one["summary"] else references_section(one)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default="results", help="the folder of results")
    parser.add_argument("--output", type=Path, default="docs/results.md", help="the page that is written")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise SystemExit(f"{args.results} is not a folder: --results names the one that holds a folder for each result")
    with readable_errors():
        args.output.write_text(results_page(args.results, args.output), encoding="utf-8")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
