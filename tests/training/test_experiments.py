"""The one command for all results: what it would run exists, in order, and can be stopped and started."""

import shlex

import pytest
from conftest import ROOT
from training_tools import script

from hf_s2e.corpora import about
from hf_s2e.training.checkpoints import STATE_FILE


@pytest.fixture
def experiments():
    return script("experiments")


def commands(experiments, capsys, *flags):
    experiments.main(["--data_dir", "corpora", "--dry_run", *flags])
    lines = capsys.readouterr().out.splitlines()
    return [(name, shlex.split(line)) for name, _, line in (line.partition(": ") for line in lines)]


def test_every_command_can_be_read_by_its_script(experiments, capsys):
    results, pretrain, validate = script("results"), script("pretrain"), script("cross_validate")
    found = commands(experiments, capsys)
    assert list(dict.fromkeys(name for name, _ in found)) == list(experiments.experiments())
    for _, line in found:
        at = next(i for i, part in enumerate(line) if part.startswith(f"{ROOT}/training/"))
        flags = line[at + 1 :]
        if line[at].endswith("pretrain.py"):
            args, _ = parsed(pretrain.Arguments, flags)
            assert args.output_dir.startswith("out/bases/")
            assert all(about(name) for name in args.corpus.split(","))  # the card of the base has their licences
            assert args.corpus.count(",") == args.data_dir.count(",")
        else:
            parser = results.HfArgumentParser(results.Arguments, allow_abbrev=False)
            args, rest = parser.parse_args_into_dataclasses(args=flags, return_remaining_strings=True)
            parsed(validate.Arguments, rest)
            assert args.data_dir == str((ROOT.cwd() / "corpora" / args.corpus).resolve())
            for file in rest[1].split(",") if rest else []:
                assert (ROOT / file).is_file()
            assert set(args.methods.split(",")) <= set(validate.METHODS)
            assert not rest or args.out.endswith("-chosen-plus")  # other bases than the choice's folder has by default


def parsed(arguments, flags):
    from hf_s2e.training.arguments import parse_arguments

    return parse_arguments(arguments, {}, flags)


def test_a_base_is_trained_once_and_resumed(experiments, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    done, begun = (tmp_path / experiments.BASES / f"s2e-50-{kind}" for kind in ("adapter", "plain"))
    done.mkdir(parents=True)
    (done / "README.md").touch()
    half = begun / "run" / "checkpoints" / "step_500.part"
    half.mkdir(parents=True)
    (half / STATE_FILE).touch()
    flags = ["--data_dir", "corpora", "--dry_run", "--only", "fifty"]
    experiments.main(flags)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "fifty: out/bases/s2e-50-adapter is there"
    assert "s2e-50-plain" in second and "--resume" not in second
    half.rename(half.with_suffix(""))
    experiments.main(flags)
    assert capsys.readouterr().out.splitlines()[1].endswith("--resume_from_checkpoint latest")


def test_an_unknown_step_is_refused(experiments, capsys):
    with pytest.raises(SystemExit):
        experiments.main(["--data_dir", "corpora", "--only", "everything"])
    assert "unknown ['everything']; known are emodb, ravdess" in capsys.readouterr().err
