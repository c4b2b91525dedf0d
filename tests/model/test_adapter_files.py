"""Adapter repos: what is written, what comes back, how the base is found, and what is never loaded."""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LABELS, add_scrambled_adapter, scramble, segments, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForAudioClassification, pipeline

import hf_s2e.pipeline  # noqa: F401 (registers S2EPipeline, which must not come in the way)
from hf_s2e import S2EAdapterError, S2EConfig, S2EForAudioClassification, S2EModel
from hf_s2e.model.adapter_files_s2e import tensors_sha256

WEIGHTS = "adapter.safetensors"


@pytest.fixture
def base(tmp_path):
    """A base on disk, loaded from there."""
    tiny_model(repo_id="me/tiny-base").save_pretrained(tmp_path / "bases" / "tiny-base")
    return S2EForAudioClassification.from_pretrained(tmp_path / "bases" / "tiny-base")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """An adapter repo in another tree than its base."""
    add_scrambled_adapter(base, "emo", method="residual_adapter")
    base.save_adapter(tmp_path / "adapters" / "emo")
    return tmp_path / "adapters" / "emo"


def rewrite(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fresh(base) -> S2EForAudioClassification:
    return S2EForAudioClassification.from_pretrained(base._base_source)


# ---- there and back ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"init": "source", "use_shared": False}, {"pooling": "mean_std"}], ids=str)
def test_a_reloaded_adapter_gives_equal_logits_on_a_fresh_base(base, tmp_path, options):
    add_scrambled_adapter(base, "emo", **options, method="mine")
    x = segments(2, 3)
    expected = base(x)
    base.save_adapter(tmp_path / "emo")
    model = fresh(base)
    assert model.load_adapter(tmp_path / "emo") == "emo" and model.active_adapters() == ["emo"]
    assert torch.equal(model(x).logits, expected.logits)
    assert model.load_adapter(tmp_path / "emo", adapter_name="again") == "again"
    assert torch.equal(model(x).logits, expected.logits)
    assert model.config.domains["again"] == base.config.domains["emo"]
    whole = S2EForAudioClassification.from_pretrained(tmp_path / "emo")
    assert torch.equal(whole(x).logits, expected.logits) and whole.config.labels_of("emo") == LABELS
    torch.testing.assert_close(whole.fuse()(x).logits, expected.logits, atol=1e-4, rtol=0)
    assert whole.config.domains["emo"]["method"] == "mine" and not whole.training


@torch.no_grad()
def test_auto_classes_load_both_kinds_of_repo(base, adapter):
    x = segments(2)
    for source in (base._base_source, adapter):
        classifier = AutoModelForAudioClassification.from_pretrained(source)
        network = AutoModel.from_pretrained(source)
        assert type(classifier) is S2EForAudioClassification and type(network) is S2EModel
        assert torch.equal(network(x).embeddings, classifier(x).embeddings)
        assert network.active_adapters() == classifier.active_adapters()


@torch.no_grad()
def test_a_base_is_saved_with_its_adapters(base, tmp_path):
    """Adapters of zeros too: initialisation must not touch what was loaded."""
    base.add_adapter("zeros", labels=LABELS)
    add_scrambled_adapter(base, "std", ["x", "y"], pooling="mean_std")
    add_scrambled_adapter(base, "only", init="source", use_shared=False)
    base.set_adapter("std")
    x = segments(3)
    base.save_pretrained(tmp_path / "all")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "all")
    assert sorted(model.adapter_names) == ["only", "std", "zeros"] and model.active_adapters() == ["std"]
    before, after = base.state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("speaker", "zeros", "std", "only"):
        model.set_adapter(name), base.set_adapter(name)
        assert torch.equal(model(x).logits, base(x).logits)
        assert model.config.id2label == base.config.id2label
    assert model.base_fingerprint == base.base_fingerprint


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_accelerate_saves_and_restores_several_adapters(base, adapter, tmp_path):
    from accelerate import Accelerator

    add_scrambled_adapter(base, "other", ["x", "y"], pooling="mean_std")
    x, names = segments(2), ["emo", "other"]
    expected = base(x, adapter_names=names).logits
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(base)
    accelerator.save_state(tmp_path / "state")
    scramble(base)
    assert not torch.equal(base(x, adapter_names=names).logits, expected)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(base(x, adapter_names=names).logits, expected)


def test_what_an_adapter_repo_holds(base, adapter):
    config = json.loads((adapter / "config.json").read_text())
    assert config["adapter_sha256"] == tensors_sha256(load_file(adapter / WEIGHTS))
    assert config["base_fingerprint"] == base.base_fingerprint
    assert config["base_model_name_or_path"] == "me/tiny-base"
    assert config["base_local_path"] == "../../bases/tiny-base"
    assert (config["method"], config["use_shared"], config["adapter_name"]) == (
        "residual_adapter",
        True,
        "emo",
    )
    files = {path.name for path in adapter.iterdir()}
    assert files >= {"config.json", WEIGHTS, "preprocessor_config.json", "README.md", "modeling_s2e.py"}
    assert not {"adapter_config.json", "model.safetensors"} & files  # PEFT would claim the first


def test_two_processes_write_the_same_bytes(base, tmp_path):
    """Several times each, because what is ordered at random is in the same order now and then."""
    code = (
        "import sys; from pathlib import Path; from hf_s2e import S2EForAudioClassification\n"
        "model = S2EForAudioClassification.from_pretrained(sys.argv[1])\n"
        "for repo in map(Path, sys.argv[2:]):\n"
        "    model.save_adapter(repo, 'emo')\n"
    )
    add_scrambled_adapter(base, "emo")
    base.save_pretrained(tmp_path / "all")
    repos = [tmp_path / str(number) for number in range(10)]
    for part in (repos[:5], repos[5:]):
        subprocess.run([sys.executable, "-c", code, tmp_path / "all", *part], check=True, timeout=120)
    found = [{path.name: path.read_bytes() for path in repo.iterdir()} for repo in repos]
    assert {WEIGHTS, "config.json", "preprocessor_config.json", "README.md"} <= set(found[0])
    assert [name for name in found[0] if any(other[name] != found[0][name] for other in found)] == []


def test_the_card(adapter, base):
    from huggingface_hub import ModelCard

    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model == "me/tiny-base" and card.data.pipeline_tag == "audio-classification"
    assert card.data.to_dict()["base_model_relation"] == "adapter" and card.data.library_name == "transformers"
    assert "Not evaluated" in card.text and all(label in card.text for label in LABELS)
    (adapter / "README.md").write_text("mine")
    base.save_adapter(adapter, "emo")
    assert (adapter / "README.md").read_text() == "mine"


def test_an_adapter_repo_is_light(tmp_path):
    model = S2EForAudioClassification(S2EConfig())
    model.add_adapter("emo", labels=[f"class {i}" for i in range(8)])
    model.save_adapter(tmp_path / "emo")
    assert (tmp_path / "emo" / WEIGHTS).stat().st_size <= 650_000
    assert sum(path.stat().st_size for path in (tmp_path / "emo").rglob("*")) <= 800_000


def test_what_cannot_be_saved(base, adapter, tmp_path):
    with pytest.raises(S2EAdapterError, match="base domain"):
        base.save_adapter(tmp_path / "x", "speaker")
    with pytest.raises(S2EAdapterError, match="no adapter 'nobody'"):
        base.save_adapter(tmp_path / "x", "nobody")
    with pytest.raises(S2EAdapterError, match="holds a base"):
        base.save_adapter(base._base_source, "emo")
    with pytest.raises(S2EAdapterError, match="no classifiers"):
        AutoModel.from_pretrained(adapter).save_adapter(tmp_path / "x")
    with torch.no_grad():
        base.s2e.shared.stem.weight.add_(1)
    with pytest.raises(S2EAdapterError, match=r"filters have changed.*save_pretrained"):
        base.save_adapter(tmp_path / "x", "emo")
    assert not (tmp_path / "x").exists()
    base.save_pretrained(tmp_path / "changed")
    base.save_adapter(tmp_path / "x", "emo")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["base_local_path"] == "../changed"


@torch.no_grad()
def test_a_base_made_here_is_found_where_it_was_saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "made")
    add_scrambled_adapter(model, "emo")
    model.save_adapter(tmp_path / "emo")
    assert torch.equal(
        S2EForAudioClassification.from_pretrained(tmp_path / "emo")(segments(2)).logits,
        model(segments(2)).logits,
    )


# ---- the base ----------------------------------------------------------------------------------------------


def test_the_base_is_found_from_anywhere(base, adapter, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    S2EForAudioClassification.from_pretrained(adapter)
    monkeypatch.chdir(adapter.parent)
    S2EForAudioClassification.from_pretrained("emo")  # a relative path


def test_both_trees_can_move_together(base, adapter, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for tree in ("bases", "adapters"):
        shutil.move(tmp_path / tree, moved)
    S2EForAudioClassification.from_pretrained(moved / "adapters" / "emo")


def test_the_order_in_which_a_base_is_looked_for(base, adapter, tmp_path):
    """base_model=, base_local_path, a sibling, the Hub id; each of the bases here has its own repo_id."""

    def found(**options) -> str:
        return S2EForAudioClassification.from_pretrained(adapter, **options).config.repo_id

    def place(folder: Path, repo_id: str) -> Path:
        shutil.copytree(base._base_source, folder)
        rewrite(folder, repo_id=repo_id)
        return folder

    place(adapter.parent / "tiny-base", "sibling")
    given = place(tmp_path / "given", "given")
    assert found() == "me/tiny-base"
    assert found(base_model=given) == "given"
    in_memory = S2EForAudioClassification.from_pretrained(given)
    assert S2EForAudioClassification.from_pretrained(adapter, base_model=in_memory) is in_memory
    rewrite(adapter, base_local_path=None)
    assert found() == "sibling"
    rewrite(adapter, base_local_path="../gone")
    assert found() == "sibling"
    shutil.rmtree(adapter.parent / "tiny-base")
    with pytest.raises(S2EAdapterError, match=r"needs the base 'me/tiny-base'.*hf download me/tiny-base.*base_model="):
        found(local_files_only=True)
    says = "needs the base 'me/tiny-base'.*but '/nowhere' cannot be loaded.*hf download me/tiny-base"
    with pytest.raises(S2EAdapterError, match=says):
        found(base_model="/nowhere")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"base_model_name_or_path": None}, "does not say which base it needs.*base_model="),
        ({"base_model_name_or_path": "../../etc/passwd"}, "does not say which base it needs"),
        ({"base_model_name_or_path": "a b"}, "does not say which base it needs"),
        ({"base_local_path": "."}, "names .*emo' as its base, but that is an adapter too"),
    ],
)
def test_an_adapter_that_names_no_base(adapter, fields, says):
    rewrite(adapter, **({"base_local_path": None} | fields))
    with pytest.raises(S2EAdapterError, match=says):
        S2EForAudioClassification.from_pretrained(adapter)


def test_a_wrong_base_is_named(base, adapter, tmp_path):
    other = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    says = r"emo' was trained on the base 'me/tiny-base'.*from_pretrained\('me/tiny-base'\)"
    with pytest.raises(S2EAdapterError, match=says):
        other.load_adapter(adapter)
    assert other.adapter_names == [] and other.state_dict().keys() == before.keys()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(S2EAdapterError, match=says):
        S2EForAudioClassification.from_pretrained(adapter, base_model=tmp_path / "other")
    other_front_end = tiny_model(mu=100.0)
    with pytest.raises(S2EAdapterError, match=says):
        other_front_end.load_adapter(adapter)
    with pytest.raises(S2EAdapterError, match="this model is fused"):
        base.fuse().load_adapter(adapter)


def test_a_wrong_base_is_readable_through_the_pipeline(base, adapter):
    scramble(base)
    base.delete_adapter("emo")
    shutil.rmtree(base._base_source)
    base.save_pretrained(base._base_source)  # another base where the adapter's was
    with pytest.raises(S2EAdapterError) as caught:
        pipeline("audio-classification", model=str(adapter))
    assert str(caught.value).startswith("Adapter") and "was trained on the base 'me/tiny-base'" in str(caught.value)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16])
def test_adapters_fit_bases_of_any_dtype(base, adapter, tmp_path, dtype):
    model = S2EForAudioClassification.from_pretrained(base._base_source, dtype=dtype)
    model.load_adapter(adapter)
    assert len({p.dtype for p in model.parameters()}) == 1
    whole = S2EForAudioClassification.from_pretrained(adapter, dtype=dtype)
    assert whole.dtype == model.dtype
    model.save_adapter(tmp_path / "again")  # in float32, with the base's own fingerprint
    again = S2EForAudioClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(segments(2)).logits, base(segments(2)).logits, atol=0.2, rtol=0.1)


def test_a_base_saved_in_half_precision_loses_its_id(base, tmp_path):
    half = S2EForAudioClassification.from_pretrained(base._base_source, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert half.config.repo_id == "me/tiny-base"
    assert json.loads((tmp_path / "half" / "config.json").read_text()).get("repo_id") is None
    whole = S2EForAudioClassification.from_pretrained(base._base_source)
    whole.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["repo_id"] == "me/tiny-base"


def test_a_base_with_trained_filters_loses_its_id(base, tmp_path, caplog):
    with torch.no_grad():
        base.s2e.shared.stem.weight.mul_(2)
    base.save_pretrained(tmp_path / "trained")
    assert base.config.repo_id is None and "another base than 'me/tiny-base'" in caplog.text
    base.config.repo_id = "me/new"
    base.s2e.shared.stem.weight.data.mul_(2)
    base.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["repo_id"] == "me/new"


def test_a_base_trained_from_scratch_keeps_its_id_at_every_checkpoint(tmp_path):
    model = tiny_model(repo_id="me/mine")
    for step in ("1", "2"):
        model.save_pretrained(tmp_path / step)
        model.s2e.shared.stem.weight.data.mul_(2)
        assert json.loads((tmp_path / step / "config.json").read_text())["repo_id"] == "me/mine"


def test_a_whole_model_is_not_saved_over_an_adapter(base, adapter):
    before = (adapter / "config.json").read_bytes()
    with pytest.raises(S2EAdapterError, match="holds an adapter"):
        base.save_pretrained(adapter)
    assert (adapter / "config.json").read_bytes() == before and not (adapter / "model.safetensors").exists()


@torch.no_grad()
def test_an_adapter_whose_base_folder_holds_it_too(base, adapter, tmp_path):
    """As after a training with checkpoints: the whole model is the base of the adapter that was saved last."""
    base.save_pretrained(tmp_path / "checkpoint-500")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "checkpoint-500")
    scramble(model.s2e.domains["emo"])
    model.save_adapter(tmp_path / "saved")
    x = segments(2)
    loaded = S2EForAudioClassification.from_pretrained(tmp_path / "saved")
    assert loaded.adapter_names == ["emo"] and torch.equal(loaded(x).logits, model(x).logits)
    both = S2EForAudioClassification.from_pretrained(tmp_path / "saved", adapter_name="again")
    assert both.adapter_names == ["emo", "again"] and torch.equal(both(x).logits, model(x).logits)
    assert torch.equal(both(x, adapter_names=["emo"] * 2).logits, base(x).logits)


@torch.no_grad()
def test_an_adapter_of_another_aggregation(base, adapter):
    rewrite(adapter, aggregation="max")
    x, model = segments(1, 3), fresh(base)
    before = model(x).logits
    for load in (model.load_adapter, lambda path: type(model).from_pretrained(path, base_model=model)):
        with pytest.raises(S2EAdapterError, match="aggregation='max', but this model has 'mean'"):
            load(adapter)
    assert model.adapter_names == [] and torch.equal(model(x).logits, before)
    whole = S2EForAudioClassification.from_pretrained(adapter)
    model.config.aggregation = "max"
    model.load_adapter(adapter)
    assert torch.equal(whole(x).logits, model(x).logits) and whole.config.aggregation == "max"


def test_a_model_in_memory_is_not_changed_by_what_is_refused_or_asked_of_the_adapter(base, adapter):
    model = fresh(base)
    with pytest.raises(S2EAdapterError, match="but 9 were asked for"):
        S2EForAudioClassification.from_pretrained(adapter, base_model=model, num_labels=9)
    assert model.adapter_names == []
    same = S2EForAudioClassification.from_pretrained(adapter, base_model=model, dtype=torch.bfloat16)
    assert same is model and model.dtype == torch.float32 and model.adapter_names == ["emo"]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, S2EAdapterError, "do not have the shapes"),
        ({"id2label": {"0": "a", "2": "b"}}, ValueError, "must count from 0"),
        ({"domains": {"speaker": {}, "emo": {"labels": 5}}}, ValueError, "labels of domain 'emo' are 5"),
        ({"domains": {"speaker": {}, "emo": {"labels": ["a"], "use_shared": 1}}}, ValueError, "must be a bool"),
        ({"domains": {"speaker": {}, "train": {"labels": ["a"]}}}, S2EAdapterError, "torch uses it itself"),
    ],
)
def test_a_base_whose_config_does_not_fit_is_refused_in_a_sentence(base, fields, error, says):
    rewrite(Path(base._base_source), **fields)
    with pytest.raises(error, match=says):
        S2EForAudioClassification.from_pretrained(base._base_source)


def test_a_base_whose_settings_disagree_is_refused(base):
    rewrite(Path(base._base_source), mu=100.0)
    with pytest.raises(S2EAdapterError, match=r"mu is 255.0 there and 100.0 here"):
        S2EForAudioClassification.from_pretrained(base._base_source)


@torch.no_grad()
def test_what_the_caller_changes_at_loading(base, adapter):
    renamed = S2EForAudioClassification.from_pretrained(adapter, id2label={0: "N", 1: "A", 2: "S"}, aggregation="max")
    assert renamed.config.labels_of("emo") == ["N", "A", "S"] and renamed.config.aggregation == "max"
    with pytest.raises(S2EAdapterError, match="has 3 classes, but 4 were asked for"):
        S2EForAudioClassification.from_pretrained(adapter, num_labels=4)
    model, info = S2EForAudioClassification.from_pretrained(adapter, output_loading_info=True)
    assert model.active_adapters() == ["emo"] and not info["missing_keys"]
    with pytest.raises(S2EAdapterError, match="not an adapter repo"):
        S2EForAudioClassification.from_pretrained(base._base_source, base_model=adapter)


def test_repos_in_subfolders(base, adapter, tmp_path):
    shutil.copytree(base._base_source, tmp_path / "repo" / "base")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "repo", subfolder="base")
    assert model.load_adapter(adapter.parent, subfolder="emo") == "emo"
    model.save_adapter(tmp_path / "repo" / "emo")
    config = json.loads((tmp_path / "repo" / "emo" / "config.json").read_text())
    assert config["base_local_path"] == "../base"
    S2EForAudioClassification.from_pretrained(tmp_path / "repo", subfolder="emo")


def test_peft_makes_no_difference(base, adapter, monkeypatch):
    import transformers.modeling_utils
    import transformers.models.auto.auto_factory

    for available in (True, False):
        for module in (transformers.models.auto.auto_factory, transformers.modeling_utils):
            monkeypatch.setattr(module, "is_peft_available", lambda: available, raising=False)  # noqa: B023
        model = AutoModelForAudioClassification.from_pretrained(adapter)
        assert model.active_adapters() == ["emo"]
        model.delete_adapter("emo")
        model.load_adapter(adapter)
        model.disable_adapters()
        model.enable_adapters()
        assert model.active_adapters() == ["emo"]


# ---- what is never loaded ----------------------------------------------------------------------------------


def test_taken_names(base, adapter):
    model = fresh(base)
    model.load_adapter(adapter)
    with pytest.raises(S2EAdapterError, match=r"'emo' already.*adapter_name="):
        model.load_adapter(adapter)
    with pytest.raises(S2EAdapterError, match="cannot be an adapter's name"):
        model.load_adapter(adapter, adapter_name="../../up")
    rewrite(adapter, adapter_name="../../up")
    with pytest.raises(S2EAdapterError, match=r"config.json cannot be read.*cannot be a domain's name"):
        model.load_adapter(adapter)


def drop(tensors):
    tensors.pop("stages.0.0.conv1.alpha.weight")


def add(tensors):
    tensors["more"] = torch.zeros(2)


def reshape(tensors):
    tensors["classifier.weight"] = tensors["classifier.weight"].T.contiguous()


def cast(tensors):
    tensors["stem.bn.weight"] = tensors["stem.bn.weight"].half()


def negate(tensors):
    tensors["stem.bn.weight"] = -tensors["stem.bn.weight"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop, "missing tensors stages.0.0.conv1.alpha.weight, unknown tensors none"),
        (add, "missing tensors none, unknown tensors more"),
        (reshape, r"classifier.weight is F32 \(8, 3\), expected F32 \(3, 8\)"),
        (cast, "stem.bn.weight is F16"),
        (negate, "adapter_sha256 differs"),
    ],
)
def test_wrong_tensors(base, adapter, damage, says):
    tensors = load_file(adapter / WEIGHTS)
    damage(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    model = fresh(base)
    for load in (model.load_adapter, S2EForAudioClassification.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(S2EAdapterError, match=says):
            load(adapter)
    assert model.adapter_names == [] and list(model.heads) == ["speaker"]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_loaded(base, adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    (adapter / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(S2EAdapterError, match=r"not a whole safetensors file.*pickle.*never loaded"):
        fresh(base).load_adapter(adapter)
    torch.save({"w": Bomb()}, adapter / WEIGHTS)
    with pytest.raises(S2EAdapterError, match="not a whole safetensors file"):
        fresh(base).load_adapter(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter.bin")
    with pytest.raises(S2EAdapterError, match=f"has no {WEIGHTS}"):
        fresh(base).load_adapter(adapter)
    assert not (adapter.parent / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (WEIGHTS, b"", "not a whole safetensors file"),
        (WEIGHTS, struct.pack("<Q", 2**62) + b"{}", "not a whole safetensors file"),
        (WEIGHTS, bytes(300_000), "has 300000 bytes, but at most"),
        ("config.json", b"", "config.json cannot be read"),
        ("config.json", b"[1, 2]", "config.json cannot be read"),
        ("config.json", b"\xff\xfe", "config.json cannot be read"),
        ("config.json", b"[" * 100_000, "config.json cannot be read"),
        ("config.json", b" " * 1_000_001, "more than the 1000000 possible"),
        ("config.json", b'{"model_type": "s2e"}', "not an adapter repo"),
        ("config.json", b'{"model_type": "s2e", "num_labels": 1000000000000}', "not an adapter repo"),
    ],
)
def test_wrong_files(base, adapter, name, content, says):
    (adapter / name).write_bytes(content)
    with pytest.raises(S2EAdapterError, match=says):
        fresh(base).load_adapter(adapter)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id2label": {"0": "a"}}, "does not fit|classifier.weight"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "come twice"),
        ({"id2label": {"0": "a", "1": "b", "7": "c"}}, "cannot be read"),
        ({"id2label": {"0": "a", "x": "b", "2": "c"}}, "cannot be read"),
        ({"id2label": {"0": "a", "1": ["b"], "2": "c"}}, "cannot be read|non-empty strings"),
        ({"id2label": 3}, "cannot be read"),
        ({"adapter_sha256": "0" * 64}, "adapter_sha256 differs"),
        ({"adapter_sha256": 7}, "adapter_sha256 is 7"),
        ({"adapter_sha256": None}, "not an adapter repo"),
        ({"base_fingerprint": None}, "not an adapter repo"),
        ({"base_fingerprint": "0" * 64}, "was trained on the base"),
        ({"pooling": "mean_std"}, r"classifier.weight is F32 \(3, 8\), expected F32 \(3, 16\)"),
        ({"pooling": "max"}, "pooling"),
        ({"use_shared": "no"}, "use_shared is 'no'"),
        ({"mu": 100.0}, "another front end"),
        ({"hop_length": "10"}, "hop_length"),
        ({"base_local_path": ["x"]}, "base_local_path"),
        ({"adapter_name": None}, "cannot be an adapter's name"),
    ],
)
def test_wrong_configs(base, adapter, fields, says):
    rewrite(adapter, **fields)
    with pytest.raises(S2EAdapterError, match=says):
        fresh(base).load_adapter(adapter)


def test_fields_that_would_shadow_the_config_do_nothing(base, adapter):
    rewrite(adapter, labels_of=1, front_end={}, attribute_map={"adapter_sha256": "x"}, num_labels=10**12)
    model = fresh(base)
    model.load_adapter(adapter)
    assert model.config.labels_of("emo") == LABELS


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_incomplete_repos(base, adapter, missing):
    (adapter / missing).unlink()
    with pytest.raises(S2EAdapterError, match=missing):
        fresh(base).load_adapter(adapter)


def test_no_repo_at_all(base, tmp_path):
    for source in (tmp_path, tmp_path / "nothing", "../x", "no/such/repo"):
        with pytest.raises(S2EAdapterError, match=r"config\.json"):
            base.load_adapter(source)
    with pytest.raises(S2EAdapterError, match="there is no such folder, and it cannot be a Hub id"):
        base.load_adapter(tmp_path / "nothing" / "here")
    assert base.adapter_names == []


def test_a_base_is_no_adapter(base):
    with pytest.raises(S2EAdapterError, match="not an adapter repo"):
        base.load_adapter(base._base_source)


# ---- 2,000 mutated repos -----------------------------------------------------------------------------------

HOSTILE = [None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), "", "x" * 10_000, "../../..", "\x00"]
HOSTILE += ["float16", [], {}, [[]], {"0": None}, dict(enumerate("abc")), {str(i): "a" for i in range(200)}]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    fields = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*sorted(fields), "num_labels", "to_dict", "attribute_map", "dtype", "domains"])
        if rng.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = rng.choice(HOSTILE)
    return json.dumps(fields).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A well-formed safetensors header that says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    change = rng.randrange(6)
    if change == 0:
        header[name]["dtype"] = rng.choice(["F16", "F64", "I8", "BOOL", "F8_E4M3", "X", 3])
    elif change == 1:
        header[name]["shape"] = rng.choice([[], [0], [2**40], [2**62, 4], [-1], "x", header[name]["shape"] + [1]])
    elif change == 2:
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [8, 4], [-4, 0], [0], "x"])
    elif change == 3:
        header[rng.choice(["new", "../up", "", "stem.bn.weight "])] = header.pop(name)
    elif change == 4:
        other = rng.choice(sorted(set(header) - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    else:
        header["__metadata__"] = rng.choice([{"a": "b" * 50_000}, 3, {"a": 3}, []])
    text = json.dumps(header).encode()
    return struct.pack("<Q", rng.choice([len(text)] * 4 + [2**62, 0, len(text) - 1, 2**32])) + text + body


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    kind, data = rng.randrange(4), bytearray(data)
    if kind == 0:  # truncated
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:  # longer
        return bytes(data) + rng.randbytes(rng.randint(1, 5000))
    for _ in range(rng.randint(1, 8)):  # flipped, in the header or anywhere
        data[rng.randrange(min(len(data), 4000) if kind == 2 else len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.slow
def test_no_mutated_repo_is_taken_for_a_sound_one(base, adapter):
    """Whatever is done to the files: an error of ours, or a load of exactly the tensors that were saved."""
    model, rng = fresh(base), random.Random(0)
    originals = {name: (adapter / name).read_bytes() for name in ("config.json", WEIGHTS)}
    true_sha256 = json.loads(originals["config.json"])["adapter_sha256"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, sound, slowest = 0, 0, 0.0
    for _ in range(2000):
        target = rng.choice([WEIGHTS, WEIGHTS, "config.json"])
        ways = [mutate_bytes, mutate_header if target == WEIGHTS else mutate_json]
        for name, data in originals.items():
            (adapter / name).write_bytes(rng.choice(ways)(data, rng) if name == target else data)
        start = time.perf_counter()
        try:
            name = model.load_adapter(adapter)
        except S2EAdapterError:
            refused += 1
            assert model.adapter_names == [] and model.config.active_domain == "speaker"
        else:
            sound += 1
            assert tensors_sha256(model.get_adapter_state_dict(name)) == true_sha256
            model.delete_adapter(name)
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"refused {refused}, loaded unharmed {sound}, slowest {slowest * 1000:.0f} ms, {grown:.0f} MB more")
    assert refused > 1500 and slowest < 5 and grown < 200
    for name, data in originals.items():
        (adapter / name).write_bytes(data)
    assert model.load_adapter(adapter) == "emo"


def test_mutated_configs_do_not_harm_from_pretrained(base, adapter):
    """transformers reads config.json first here and may raise its own errors, but memory is bounded."""
    rng, original = random.Random(1), (adapter / "config.json").read_bytes()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    true_sha256 = json.loads(original)["adapter_sha256"]
    for _ in range(150):
        (adapter / "config.json").write_bytes(rng.choice([mutate_bytes, mutate_json])(original, rng))
        try:
            model = S2EForAudioClassification.from_pretrained(adapter, local_files_only=True)
        except Exception as error:
            assert not isinstance(error, (MemoryError, RecursionError)), error
        else:
            if model.adapter_names:
                assert tensors_sha256(model.get_adapter_state_dict()) == true_sha256
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < 200


def test_a_config_for_an_absurd_network_is_refused(tmp_path):
    """A config that asks for an absurd network is refused before anything is built."""
    tiny_config().save_pretrained(tmp_path)
    rewrite(tmp_path, num_labels=10**12, id2label=None)
    with pytest.raises(ValueError, match="num_labels"):
        S2EForAudioClassification.from_pretrained(tmp_path)
