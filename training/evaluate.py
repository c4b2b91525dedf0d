"""Recognise a corpus with a trained repo: UA, WA and macro-F1 with intervals, and every single prediction.

    accelerate launch training/evaluate.py --model_name_or_path REPO --corpus ravdess --data_dir DIR \
        --output_dir OUT

REPO is an adapter, a base, a full or a fused model: a folder or a Hub id. Where corpus and model call a class
by different names, say so with `--label_map '{"happiness": "happy", "boredom": null}'`: from the corpus' name
to the model's, null leaves its utterances out. An answer that is no class of the corpus is wrong.
Writes OUT/evaluation.json (as cross_validate.py's summary.json) and OUT/predictions.parquet; its
`speaker_disjoint` is null where it cannot be known whether REPO, or its base, was trained on these speakers.

Several GPUs (`accelerate launch --multi_gpu`, NCCL) are built for, but unverified: only processes on CPUs were tried.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from transformers import HfArgumentParser

from hf_s2e import S2EConfig, S2EForAudioClassification
from hf_s2e.corpora import list_corpora
from hf_s2e.corpora.index import read_index, text_column
from hf_s2e.evaluation.reports import summarize
from hf_s2e.hub.repo import TRAINING
from hf_s2e.model.adapter_files_s2e import ADAPTER_WEIGHTS, S2EAdapterError, fetch, find_base, read_adapter_config
from hf_s2e.training.arguments import CorpusArguments, split_names
from hf_s2e.training.inputs import decode, draw, load_corpora, make_task, rows_by_speaker
from hf_s2e.training.methods import METHODS
from hf_s2e.training.output import prediction_table, write_json
from hf_s2e.training.predict import predict
from hf_s2e.training.runtime import environment, make_accelerator, readable_errors

FROM_SCRATCH = {"speaker classification", *(name for name, method in METHODS.items() if method.from_scratch)}
ANY_RECORDINGS = {"folder", "manifest", "hub"}  # corpora whose names do not say which recordings they are


@dataclass
class Arguments(CorpusArguments):
    model_name_or_path: str | None = field(default=None, metadata={"help": "folder or Hub id of a repo"})
    model_revision: str | None = None
    adapter_name: str | None = field(default=None, metadata={"help": "a domain of the repo; else the active one"})
    label_map: str = field(default="{}", metadata={"help": "JSON: corpus label -> model label, or null"})
    eval_speakers: str | None = field(default=None, metadata={"help": "these speakers only: a,b"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "so many utterances, drawn by --seed"})
    batch_size: int = field(default=64, metadata={"help": "segments of 2 s at a time"})
    seed: int = 0
    output_dir: str = "out"


def load_model(args: Arguments) -> S2EForAudioClassification:
    """The network, with the domain active that is to answer."""
    if args.model_name_or_path is None:
        raise SystemExit("--model_name_or_path is needed: the folder or Hub id of a repo")
    revision = {"revision": args.model_revision} if args.model_revision else {}
    with readable_errors():
        model = S2EForAudioClassification.from_pretrained(args.model_name_or_path, **revision)
        if args.adapter_name:
            model.set_adapter(args.adapter_name)
    return model


def class_numbers(corpus_labels: list[str], model_labels: list[str], label_map: dict) -> list[int | None]:
    """For each class of the corpus its number in the model, or None where it is left out.

    Raises:
        ValueError: a name on either side that is not there, or a class of the corpus without a counterpart.
    """
    if unknown := set(label_map) - set(corpus_labels):
        raise ValueError(f"--label_map: the corpus has no {sorted(unknown)}, only {corpus_labels}")
    if unknown := {name for name in label_map.values() if name is not None} - set(model_labels):
        raise ValueError(f"--label_map: the model has no {sorted(unknown)}, only {model_labels}")
    targets = [label_map.get(name, name) for name in corpus_labels]
    if missing := [name for name in targets if name is not None and name not in model_labels]:
        example = json.dumps({missing[0]: model_labels[0]})
        raise ValueError(
            f"The model has no class {', '.join(missing)}; it has {', '.join(model_labels)}. Say which is "
            f"meant, --label_map '{example}', with null for what to leave out, or keep some with --labels."
        )
    return [None if name is None else model_labels.index(name) for name in targets]


def choose_rows(dataset, numbers: list[int | None], args: Arguments) -> list[int]:
    """The utterances that are recognised."""
    others, chosen = rows_by_speaker(dataset, args.eval_speakers, "--eval_speakers")
    labels = dataset["label"][:]
    rows = [row for row in chosen or others if numbers[labels[row]] is not None]
    if not rows:
        raise SystemExit("No utterance is left: see --eval_speakers, --label_map and --labels")
    return draw(rows, args.max_eval_samples, args.seed)


def trained_on(repo: str, revision: str | None = None) -> tuple[set[str], bool]:
    """The corpora that a repo, and the base it starts from, say they were trained on; and whether these are all."""
    where = {"revision": revision} if revision else {}
    try:
        file = fetch(repo, TRAINING, required=False, **where)
        facts = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        names = {corpus["name"] for corpus in facts.get("corpora") or ()}
        if facts.get("method") in FROM_SCRATCH:
            return names, bool(names)
        if fetch(repo, ADAPTER_WEIGHTS, required=False, **where) is None:  # a full model does not name its base
            return names, False
        base = find_base(read_adapter_config(S2EConfig, repo, where), repo)
    except (S2EAdapterError, ValueError, KeyError, TypeError, AttributeError):  # whatever a repo may hold
        return set(), False
    of_base, all_known = trained_on(base["pretrained_model_name_or_path"], base.get("revision"))
    return names | of_base, all_known and bool(names)


def speakers_unseen(args: Arguments) -> bool | None:
    """Whether no speaker was trained on: True where all corpora are known and others, False where one is the
    same, None where that cannot be known. Speakers of differently named corpora count as different."""
    tested = set(split_names(args.corpus))
    trained, all_known = trained_on(args.model_name_or_path, args.model_revision)
    named = set(list_corpora()) - ANY_RECORDINGS
    if tested & trained & named:
        return False
    return True if all_known and tested | trained <= named else None


def hash_of(dataset) -> str:
    """What was recognised; without the speakers, where not all of them are known."""
    if "" in (text_column(dataset, "speaker") or ()):
        dataset = dataset.remove_columns("speaker")
    return read_index(dataset).sha256()


def recognise(accelerator, model, dataset, store, rows: list[int], batch_size: int) -> np.ndarray:
    """Posteriors (rows, classes); each process takes its share, all get the whole."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    found = []
    if mine:
        task = make_task(dataset, store, mine, model.config)
        options = {"batch_size": batch_size, "progress": accelerator.is_main_process}
        found = list(zip(mine, predict(model, task, device=accelerator.device, **options)))
    answers = dict(gather_object(found))
    return np.stack([answers[row] for row in rows])


def summarize_table(table, args: Arguments, model, **protocol) -> dict:
    """As cross_validate.py's summary.json, but nothing was trained here."""
    name = Path(args.model_name_or_path).name
    summary = summarize(
        table,
        corpus=args.corpus,
        protocol={"name": "evaluation", "speaker_disjoint": speakers_unseen(args), **protocol},
        recipe=None,
        base=model.config.repo_id,
        classes=model.config.labels_of(model.config.active_domain),
        trained_parameters={name: 0},
    )
    del summary["methods"][name]["trained_parameters"]
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(Arguments, allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else argv)
    accelerator = make_accelerator(args)
    model = load_model(args)
    dataset = load_corpora(accelerator, args)
    classes = model.config.labels_of(model.config.active_domain)
    with readable_errors():
        label_map = json.loads(args.label_map)
        numbers = class_numbers(dataset.features["label"].names, classes, label_map)
    rows = choose_rows(dataset, numbers, args)
    with readable_errors():
        heard = hash_of(dataset.select(rows))
    store = decode(dataset, accelerator, args)
    posteriors = recognise(accelerator, model, dataset, store, rows, args.batch_size)
    if accelerator.is_main_process:
        name, folder = Path(args.model_name_or_path).name, Path(args.output_dir)
        table = prediction_table(dataset, rows, posteriors, run=0, fold="all", method=name)
        table["label"] = [numbers[label] for label in table["label"]]
        summary = summarize_table(table, args, model, hash=heard)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "predictions.parquet", index=False)
        write_json(folder / "evaluation.json", summary | {"label_map": label_map})
        write_json(folder / "environment.json", environment(accelerator) | {"arguments": asdict(args)})
        print(in_words(summary, name))
    accelerator.end_training()


def in_words(summary: dict, name: str) -> str:
    scores = summary["methods"][name]
    (ua_low, ua_high), (wa_low, wa_high) = scores["ua_ci95"], scores["wa_ci95"]
    recalls = [f"{label} {value:.1f}" for label, value in scores["recall"].items() if value is not None]
    lines = [
        f"{name} on {summary['utterances']} utterances of {summary['corpus']} (%, with 95 % intervals)",
        f"UA {scores['ua_mean']:.1f} [{ua_low:.1f}, {ua_high:.1f}]  WA {scores['wa_mean']:.1f} "
        f"[{wa_low:.1f}, {wa_high:.1f}]  macro-F1 {scores['macro_f1_mean']:.1f}",
        f"recall: {', '.join(recalls)}" if len(recalls) <= 20 else f"{len(recalls)} classes",
    ]
    said = {
        False: "These speakers may have been in its training: the figures may be inflated.",
        None: "It is not known whether these speakers were in its training: the figures may be inflated.",
    }
    if (unseen := summary["protocol"]["speaker_disjoint"]) in said:
        lines.append(said[unseen])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
