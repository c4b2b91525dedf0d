"""training/cross_validate.py: what is kept, shared out, guarded and reported; and how folds choose a recipe."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from training_tools import LAUNCH, SCRIPTS, TINY_RUN, forget_accelerator, read, run, save_base, script

from hf_s2e.evaluation import plots
from hf_s2e.hub.cards import write_card
from hf_s2e.training.arguments import domain_of
from hf_s2e.training.methods import build_model
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.result_folder import ResultFolder

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD_FIELDS = {
    "ua_mean",
    "ua_std",
    "wa_mean",
    "wa_std",
    "macro_f1_mean",
    "ua_ci95",
    "runs",
    "trained_parameters",
}
SUMMARY_FIELDS = {"corpus", "protocol", "recipe", "base", "methods", "references", "classes", "paired"}
PAIR_FIELDS = {"a", "b", "ua_diff", "ci95", "p", "test"}


def cross_validate(work, out, **flags):
    flags = {
        "protocol": "loso",
        "runs": 1,
        "methods": "plain,residual_adapter",
        "model_name_or_path": work.adapter,
        "plain_model_name_or_path": work.plain,
        "speed_perturbation": 0.2,  # drawn for each step
        **TINY_RUN,
        **flags,
    }
    return work.flags(output_dir=out, **flags)


def fold_runs(out, part="test"):
    return {name: facts for name, facts in ResultFolder(out).finished().items() if facts["part"] == part}


def take_out(out, name):
    """One fold-run less, as runs.json says."""
    runs = read(out / "runs.json")
    del runs[name]
    (out / "runs.json").write_text(json.dumps(runs))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than all that is tested here, and is tested in evaluation/test_reports.py."""
    for name in ("plot_bars", "plot_confusion"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)


@pytest.fixture(scope="module")
def validated(work, tmp_path_factory):
    """A finished cross-validation, with its plots."""
    out = tmp_path_factory.mktemp("validated")
    torch.set_num_threads(1)
    forget_accelerator()
    script("cross_validate").main(cross_validate(work, out, runs=2))
    return out


def test_every_fold_is_run_and_reported(validated):
    assert len(fold_runs(validated)) == 12  # 2 methods, 3 speakers, 2 runs
    assert "| residual_adapter |" in (validated / "table.md").read_text()
    reports = {"table.tex", "bars.png", "confusion-plain.png", "confusion-residual_adapter.png"}
    assert reports <= {path.name for path in validated.iterdir()} and read(validated / "protocol.json")


@pytest.mark.slow
def test_two_processes_share_the_fold_runs_and_find_what_one_finds(validated, work, tmp_path):
    """Through accelerate's launcher. A fold-run is a process' own, so how many share the work changes nothing."""
    two = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    said = run([*two, str(SCRIPTS / "cross_validate.py"), *cross_validate(work, tmp_path, runs=2)])
    assert "2 process(es) on cpu" in said and "12 fold-runs, 0 finished before" in said
    assert len(fold_runs(tmp_path)) == 12 and (tmp_path / "table.md").read_text() in said
    assert not [*(tmp_path / "running").glob("*.parquet")]
    a, b = (
        pd.read_parquet(out / "predictions.parquet").sort_values(["method", "run", "utterance"]).reset_index(drop=True)
        for out in (validated, tmp_path)
    )
    assert a.drop(columns="posterior").equals(b.drop(columns="posterior"))
    assert np.allclose(np.stack(a["posterior"]), np.stack(b["posterior"]), atol=2e-4)  # kept with four digits


def test_summary_has_the_fields_that_others_read(validated, work):
    summary = read(validated / "summary.json")
    assert set(summary) >= SUMMARY_FIELDS and set(summary["protocol"]) == {"name", "hash", "speaker_disjoint"}
    assert set(summary["methods"]) == {"plain", "residual_adapter"}
    for row in summary["methods"].values():
        assert set(row) >= METHOD_FIELDS and row["runs"] == 2 and len(row["ua_ci95"]) == 2
    assert [set(pair) >= PAIR_FIELDS for pair in summary["paired"]] == [True]
    assert summary["classes"] == work.labels and summary["corpus"] == "toy" and summary["base"] == "adapter"
    assert summary["methods"]["residual_adapter"]["trained_parameters"] == sum(
        p.numel() for p in work.model().parameters() if p.requires_grad
    )
    table = pd.read_parquet(validated / "predictions.parquet")
    columns = ["run", "fold", "method", "utterance", "speaker", "label", "prediction", "posterior"]
    assert list(table.columns) == columns
    counts = table.groupby(["method", "run"]).size()
    assert (counts == 24).all() and len(counts) == 4
    pooled = table[table["method"] == "plain"].groupby("run").apply(lambda t: (t["label"] == t["prediction"]).mean())
    assert summary["methods"]["plain"]["wa_mean"] == pytest.approx(100 * pooled.mean(), abs=1e-3)


def test_a_recipe_that_flags_changed_is_not_called_the_papers(validated, tmp_path):
    assert read(validated / "summary.json")["recipe"] == "paper-changed"  # two epochs, batches of five
    name_of, file = script("cross_validate").name_of, tmp_path / "mine.yaml"
    file.write_text("momentum: 0.5\n")
    assert name_of(Recipe(), None) == "paper" and name_of(Recipe(momentum=0.5), str(file)) == "mine"
    assert name_of(Recipe(), str(file)) == "mine-changed"


def test_a_killed_job_resumes(work, tmp_path, monkeypatch, capsys):
    module = script("cross_validate")
    train, trained = module.train, []

    def train_until_killed(*args, **options):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(options["description"])
        return train(*args, **options)

    monkeypatch.setattr(module, "train", train_until_killed)
    with pytest.raises(KeyboardInterrupt):
        module.main(cross_validate(work, tmp_path))
    (tmp_path / "running" / "half.parquet.part").write_bytes(b"half")
    kept = sorted(file.stem for file in (tmp_path / "running").glob("*.parquet"))
    assert kept == sorted(trained) and not (tmp_path / "runs.json").exists()
    monkeypatch.setattr(module, "train", train)
    with pytest.raises(SystemExit, match="results with another recipe"):  # what is not merged yet is guarded, too
        forget_accelerator()
        module.main(cross_validate(work, tmp_path, momentum=0.5))
    forget_accelerator()
    module.main(cross_validate(work, tmp_path))
    assert "6 fold-runs, 4 finished before" in capsys.readouterr().out
    after = fold_runs(tmp_path)
    assert len(after) == 6 and not [*(tmp_path / "running").glob("*.par*")]
    assert read(tmp_path / "summary.json")["methods"].keys() == {"plain", "residual_adapter"}

    # one more method, alone: what is there stays, and is in the tables
    forget_accelerator()
    module.main(cross_validate(work, tmp_path, methods="fine_tune"))
    assert {name: facts for name, facts in fold_runs(tmp_path).items() if name in after} == after
    summary = read(tmp_path / "summary.json")
    assert len(summary["paired"]) == 3 and summary["base"] == "adapter"
    assert summary["starts"] == {"plain": "random weights", "residual_adapter": "adapter", "fine_tune": "plain"}
    said = "started: plain from random weights, fine_tune from plain, residual_adapter from adapter"
    assert said in (tmp_path / "table.md").read_text()
    for facts in fold_runs(tmp_path).values():
        assert {"device", "torch", "git_revision"} <= set(facts["environment"]) and facts["seconds"] > 0
        assert facts["recipe"] == "paper-changed" and facts["history"]["epoch"] == [1, 2]


def test_an_unfinished_run_is_kept_and_not_in_the_tables(validated, work, tmp_path, capsys):
    out, main = tmp_path / "copy", script("cross_validate").main
    shutil.copytree(validated, out)
    (fold, *_) = fold_runs(out).values()
    name = f"plain--{fold['folds'][0]}--run1"
    take_out(out, name)
    main([*cross_validate(work, out, runs=2), "--report_only"])
    assert len(ResultFolder(out).rows("test")) == 11 * 8
    assert {name: row["runs"] for name, row in read(out / "summary.json")["methods"].items()} == {
        "plain": 1,
        "residual_adapter": 2,
    }
    forget_accelerator()
    main(cross_validate(work, out, runs=2))
    assert "12 fold-runs, 11 finished before" in capsys.readouterr().out
    assert read(out / "summary.json") == read(validated / "summary.json")
    assert len(pd.read_parquet(out / "predictions.parquet")) == 12 * 8


def test_the_commands_are_written_down(validated, work, tmp_path):
    settings = read(validated / "settings.json")
    (command,) = settings["commands"]
    assert command.startswith("accelerate launch training/cross_validate.py --corpus toy --data_dir DIR")
    assert str(work.folder) not in command and str(tmp_path.parent) not in command and "--cache_dir" not in command
    assert "--model_name_or_path adapter --plain_model_name_or_path plain" in command
    assert settings["bases"] == {"adapter": "adapter", "plain": "plain"}
    module = script("cross_validate")
    for further in ([], ["--report_only"], [], ["--command", "make results"]):
        forget_accelerator()
        module.main([*cross_validate(work, tmp_path, methods="plain"), *further])
    first, second = read(tmp_path / "settings.json")["commands"]
    assert first.startswith("accelerate launch training/cross_validate.py") and second == "make results"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"learning_rate": 0.02}, "recipe"),
        ({"seed": 1}, "seed"),
        ({"protocol": "3fold"}, "protocol"),
        ({"labels": "happy,sad"}, "protocol"),
        ({"max_train_samples": 5}, "max_train_samples"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"model_name_or_path": "other"}, "start of residual_adapter"),
    ],
)
def test_other_settings_are_never_mixed_in(validated, work, tmp_path_factory, change, said):
    if "model_name_or_path" in change:
        other = tmp_path_factory.mktemp("other")
        save_base(other, seed=1)
        change = {"model_name_or_path": other}
    before = fold_runs(validated)
    with pytest.raises(SystemExit, match=f"results with another {said}"):
        script("cross_validate").main(cross_validate(work, validated, runs=2, **change))
    assert fold_runs(validated) == before


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Two recipes: with the second nothing is learnt."""
    folder = tmp_path_factory.mktemp("candidates")
    for name, rate in {"fast": 0.05, "frozen": 0.0}.items():
        (folder / f"{name}.yaml").write_text(f"learning_rate: {rate}\nweight_decay: 0.0\n")
    return f"{folder / 'frozen.yaml'},{folder / 'fast.yaml'}"


def test_each_fold_chooses_its_recipe_without_its_test_speakers(work, tmp_path, candidates):
    module = script("cross_validate")
    flags = cross_validate(work, tmp_path, candidates=candidates)
    module.main(flags)
    summary, protocol = read(tmp_path / "summary.json"), read(tmp_path / "protocol.json")
    choice = summary["choice"]
    assert choice["candidates"] == ["frozen", "fast"] and summary["recipe"] == "chosen"
    assert choice["rule"] in (tmp_path / "table.md").read_text()
    speakers = {fold["name"]: fold["test"] for fold in protocol["folds"]}
    for method, folds in choice["validation_ua"].items():
        for fold, ua in folds.items():
            best = max(choice["candidates"], key=ua.get)  # of equals the first
            assert choice["chosen"][method][fold] == best
            (kept,) = (f for f in fold_runs(tmp_path).values() if f["method"] == method and fold in f["folds"])
            assert kept["recipe"] == best
    inner = pd.read_parquet(tmp_path / "validation.parquet")
    for fold, rows in inner.groupby("fold"):
        assert len(rows) and not set(rows["speaker"]) & set(speakers[fold])
    # three speakers: two share a training for each method and recipe, the third has its own
    assert len(fold_runs(tmp_path, "validation")) == 2 * 2 * 2 and set(inner["recipe"]) == {"frozen", "fast"}

    kept = fold_runs(tmp_path)
    forget_accelerator()
    module.main([*cross_validate(work, tmp_path, candidates=candidates, methods="fine_tune"), "--report_only"])
    assert read(tmp_path / "summary.json")["choice"] == choice  # what has not begun keeps no table back
    forget_accelerator()
    take_out(tmp_path, next(name for name in fold_runs(tmp_path, "validation") if name.startswith("plain")))
    with pytest.raises(SystemExit, match="1 of the 8 runs that choose a recipe are not finished"):
        module.main([*flags, "--report_only"])
    forget_accelerator()
    module.main(flags)
    assert fold_runs(tmp_path) == kept and read(tmp_path / "summary.json")["choice"] == choice
    forget_accelerator()
    with pytest.raises(SystemExit, match="results with another recipe"):
        module.main(cross_validate(work, tmp_path, candidates=candidates, momentum=0.5))
    forget_accelerator()
    with pytest.raises(SystemExit, match="results with another candidates"):  # of equals the first is taken
        module.main(cross_validate(work, tmp_path, candidates=",".join(reversed(candidates.split(",")))))
    forget_accelerator()
    runs = read(tmp_path / "runs.json")
    changed = next(name for name in kept if name.startswith("plain"))
    runs[changed]["recipe"] = "another"
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    said = rf"{re.escape(changed)} was trained by the recipe another, .*delete its line in runs.json"
    with pytest.raises(SystemExit, match=said):
        module.main([*flags, "--report_only"])
    forget_accelerator()
    with pytest.raises(SystemExit, match="results with another recipe"):
        module.main(cross_validate(work, tmp_path))


def test_what_rests_on_nothing_may_change(tmp_path):
    """Only what was trained locks what it was made with."""
    check = script("cross_validate").check_settings
    slow, fast = dataclasses.asdict(Recipe(learning_rate=0.01)), dataclasses.asdict(Recipe(learning_rate=0.1))

    def noted(recipes, start="a", protocol="loso"):
        settings = {"protocol": protocol, "recipe": dict(recipes), "candidates": list(recipes)}
        check(ResultFolder(tmp_path), settings, {f"plain, {name}": start for name in recipes}, {}, [])
        return read(tmp_path / "settings.json")

    def keep(method, recipe, part):
        (tmp_path / "runs.json").write_text(json.dumps({"one": {"method": method, "recipe": recipe, "part": part}}))

    noted({"slow": slow, "fast": fast}, protocol="5fold")
    (tmp_path / "audit.json").touch()
    noted({"slow": slow, "fast": fast})
    assert not (tmp_path / "audit.json").exists()  # was of the other protocol
    keep("fine_tune", "slow", "validation")
    noted({"slow": slow, "fast": fast}, start="b")  # plain was not trained
    keep("plain", "slow", "validation")
    with pytest.raises(SystemExit, match="another start of plain, slow"):
        noted({"slow": slow, "fast": fast}, start="a")
    noted({"slow": slow, "third": slow}, start="b")  # fast left, as where it diverges, and another one came
    noted({"slow": slow, "third": fast}, start="b")  # of which nothing was trained
    with pytest.raises(SystemExit, match="another recipe"):
        noted({"slow": fast, "third": fast}, start="b")
    keep("plain", "slow", "test")
    with pytest.raises(SystemExit, match="another recipe, candidates"):
        noted({"slow": slow, "fast": fast}, start="b")


@pytest.mark.parametrize(
    "change, said",
    [({"protocol": "2fold"}, "nothing is left to choose a recipe by"), ({"recipe": "one.yaml"}, "that compete")],
)
def test_a_choice_that_cannot_be_made_is_refused(work, tmp_path, candidates, change, said):
    if "recipe" in change:
        (tmp_path / "one.yaml").write_text("momentum: 0.5\n")
        change = {"recipe": tmp_path / "one.yaml"}
    with pytest.raises(SystemExit, match=said):
        script("cross_validate").main(cross_validate(work, tmp_path / "out", candidates=candidates, **change))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="two or more"):
        one = candidates.split(",")[0]
        script("cross_validate").main(cross_validate(work, tmp_path / "out", candidates=one))


def test_other_audio_under_the_same_names_is_never_mixed_in(validated, work, monkeypatch):
    module = script("cross_validate")
    read_whole = module.read_corpus

    def read_trimmed(accelerator, args):
        dataset, store = read_whole(accelerator, args)
        return dataset, dataclasses.replace(store, lengths=store.lengths - 1)

    monkeypatch.setattr(module, "read_corpus", read_trimmed)
    with pytest.raises(SystemExit, match="results with another audio"):
        module.main(cross_validate(work, validated, runs=2))


def test_references_of_other_folds_are_not_shown(validated, work, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(validated, out)
    known = {
        "mine": {"ua": 50.0, "wa": 50.0, "measured": True, "protocol": read(out / "summary.json")["protocol"]["hash"]}
    }
    known["theirs"] = known["mine"] | {"protocol": "of other folds"}
    (out / "references.json").write_text(json.dumps(known))
    script("cross_validate").main(cross_validate(work, out, runs=2, report_only=True))
    assert set(read(out / "summary.json")["references"]) == {"mine"}
    assert "measured under another protocol, left out: theirs" in capsys.readouterr().out


def test_a_corpus_of_ones_own_may_be_a_class(work):
    """Its name, module:Class, cannot be a domain's."""
    assert domain_of("my.corpora:Urdu") == "my-corpora-Urdu" and domain_of("emodb") == "emodb"
    model = build_model("residual_adapter", str(work.adapter), domain_of("urdu:Urdu"), work.labels, Recipe())
    assert model.config.active_domain == "urdu-Urdu"


def test_a_mistyped_start_does_not_lock_the_folder(work, tmp_path):
    module = script("cross_validate")
    for flags in ({"runs": 0}, {"methods": ","}, {"methods": "plain", "report_only": True, "learning_rate": 9}):
        forget_accelerator()
        with pytest.raises(SystemExit, match=r"at least one of each|no run is finished"):
            module.main(cross_validate(work, tmp_path, **flags))
    forget_accelerator()
    module.main(cross_validate(work, tmp_path, methods="plain"))
    (tmp_path / "settings.json").unlink()
    forget_accelerator()
    with pytest.raises(SystemExit, match="results with another"):
        module.main(cross_validate(work, tmp_path, methods="plain"))


def test_every_method_can_train_by_every_candidate(work, tmp_path):
    """Otherwise a job of hours would stop in its middle."""
    files = sorted((SCRIPTS / "recipes" / "plus").glob("*.yaml"))
    methods = "plain,feature_extractor,fine_tune,residual_adapter,adapter_only,bn_only"
    flags = {"candidates": ",".join(map(str, files)), "methods": methods, "report_only": True}
    with pytest.raises(SystemExit, match="runs that choose a recipe are not finished"):
        script("cross_validate").main(cross_validate(work, tmp_path, **flags))
    assert len(read(tmp_path / "settings.json")["starts"]) == 6 * len(files)


def test_methods_without_their_base_are_refused_before_any_training(work, tmp_path):
    flags = cross_validate(work, tmp_path, methods="plain,fine_tune")
    for name in ("--plain_model_name_or_path", "--model_name_or_path"):
        at = flags.index(name)
        flags = flags[:at] + flags[at + 2 :]
    with pytest.raises(SystemExit, match="fine_tune starts from a speaker-trained network"):
        script("cross_validate").main(flags)
    assert not fold_runs(tmp_path)


def test_a_cross_validation_leaves_the_audit_for_the_card(work, tmp_path):
    out = tmp_path / "results"
    flags = {"protocol": "loso", "runs": 1, "methods": "residual_adapter", "max_train_steps": 1}
    flags |= {"model_name_or_path": work.adapter, "num_train_epochs": 1, "per_device_train_batch_size": 5}
    forget_accelerator()
    script("cross_validate").main(work.flags(output_dir=out, **flags))
    text = (out / "audit.json").read_text()
    report = json.loads(text)
    assert report["counts"]["files"] == 24 and "ua_by_speaker_in_protocol" in report["counts"]
    assert str(work.folder) not in text  # it may be published

    model = work.model()
    model.save_adapter(tmp_path / "s2e-toy", "toy")
    card = write_card(tmp_path / "s2e-toy", out / "summary.json").read_text()
    audit = card.partition("### Audit of the corpus")[2].partition("##")[0]
    assert "the speaker alone, in the protocol's folds" in audit
    assert all(finding["message"] in audit for finding in report["findings"])

    (out / "audit.json").write_text('{"findings": []}')  # it is made once
    forget_accelerator()
    script("cross_validate").main(work.flags(output_dir=out, report_only=True, **flags))
    assert (out / "audit.json").read_text() == '{"findings": []}'
