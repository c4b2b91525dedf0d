"""`Repo`: what a folder holds is what the model loaded from it says, and what is not whole is refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import LABELS, add_scrambled_adapter, tiny_model

from hf_s2e import S2EAdapterError, S2EForAudioClassification
from hf_s2e.hub import Repo
from hf_s2e.hub.repo import as_repo, find_repos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One repo of each kind, side by side; `adapter` belongs to `base`."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model(repo_id="me/base").save_pretrained(folder / "base")
    tiny_model(adapters=False).save_pretrained(folder / "plain")
    tiny_model(seed=1, repo_id="me/base").save_pretrained(folder / "other")
    model = S2EForAudioClassification.from_pretrained(folder / "base")
    add_scrambled_adapter(model, "emo", LABELS, pooling="mean_std")
    model.save_adapter(folder / "adapter")
    model.fuse("emo").save_pretrained(folder / "fused")
    return folder


@pytest.fixture
def repos(made, tmp_path) -> Path:
    """A copy, to damage."""
    return shutil.copytree(made, tmp_path / "repos")


def rewrite(folder: Path, name: str = "config.json", **fields) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(repo: Repo, change) -> None:
    tensors = load_file(repo.weights)
    change(tensors)
    save_file(tensors, repo.weights, metadata={"format": "pt"})


# ---- what it is


@pytest.mark.parametrize(
    ("name", "kind"), [("base", "base"), ("plain", "plain base"), ("fused", "fused"), ("adapter", "adapter")]
)
def test_facts_are_those_of_the_loaded_model(made, name, kind):
    repo = Repo(made / name)
    repo.check()
    model = S2EForAudioClassification.from_pretrained(repo.folder)
    assert (repo.kind, repo.is_adapter) == (kind, kind == "adapter")
    assert repo.labels == [model.config.id2label[i] for i in range(model.config.num_labels)]
    assert repo.weights_bytes == repo.weights.stat().st_size
    assert repo.fingerprint == (None if kind == "fused" else model.base_fingerprint)
    if repo.is_adapter:
        model.train_adapter("emo")
    assert repo.parameters == model.num_parameters(only_trainable=repo.is_adapter)


def test_an_adapter_knows_its_base_and_its_hub_id(made, tmp_path):
    adapter, base = Repo(made / "adapter"), Repo(made / "base")
    assert adapter.base == base and base.base is None
    adapter.check(adapter.base)
    assert (adapter.hub_id, base.hub_id, Repo(made / "plain").hub_id) == ("me/adapter", "me/base", "your-name/plain")
    alone = Repo(shutil.copytree(made / "adapter", tmp_path / "alone"))
    assert alone.base is None and alone.config.base_model_name_or_path == "me/base"
    rewrite(alone.folder, base_model_name_or_path=None, base_local_path=None)
    with pytest.raises(S2EAdapterError, match="does not say which base it needs"):
        _ = Repo(alone.folder).base


def test_one_folder_is_one_repo_however_it_is_spelled(made, monkeypatch):
    monkeypatch.chdir(made)
    spellings = {Repo("base"), Repo("plain/../base"), Repo(made / "base")}
    assert len(spellings) == 1 and Repo("base") != Repo("plain") and Repo("base") != "base"
    assert Repo("base").name == "base" and str(Repo("base").folder) == "base"  # messages name what was given
    repo = Repo("base")
    assert as_repo(repo) is repo and as_repo("base") == repo and repr(repo) == "Repo('base')"


def test_what_is_read_is_kept(repos):
    repo = Repo(repos / "adapter")
    repo.check(repo.base)
    before = (repo.config, repo.labels, repo.parameters, repo.base, repo.base.fingerprint)
    shutil.rmtree(repos)
    (repos / "adapter").mkdir(parents=True)
    (repos / "adapter" / "adapter.safetensors").touch()
    assert (repo.config, repo.labels, repo.parameters, repo.base, repo.base.fingerprint) == before


def test_repos_are_found_bases_first(made, tmp_path):
    assert [repo.name for repo in find_repos(made)] == ["base", "fused", "other", "plain", "adapter"]
    assert find_repos(made / "base") == [Repo(made / "base")]
    repo = Repo(made / "base")
    assert find_repos(repo)[0] is repo
    with pytest.raises(ValueError, match="no repo here"):
        find_repos(tmp_path)


# ---- its training


def test_training_is_written_whole_or_not_at_all(repos, monkeypatch):
    repo = Repo(repos / "base")
    assert repo.training == {} and repo.results is None
    repo.write_training({"method": "x", "results": "../summary.json"})
    assert repo.training["method"] == "x" and repo.results == repos / "base" / "../summary.json"
    assert Repo(repos / "base").training == repo.training
    before = (repos / "base" / "training.json").read_bytes()

    def half(path, text, **options):
        path.write_bytes(text[:5].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        repo.write_training({"method": "y"})
    assert (repos / "base" / "training.json").read_bytes() == before and repo.training["method"] == "x"
    assert not list((repos / "base").glob("*.part"))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"mu": "\\n"}'])
def test_a_damaged_file_is_named_in_one_line(repos, content):
    repo = Repo(repos / "base")
    (repos / "base" / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(S2EAdapterError, match=r"^[^\n]*preprocessor_config\.json is damaged[^\n]*$"):
        repo.check()
    if content != b'{"mu": "\\n"}':
        (repos / "base" / "training.json").write_bytes(content)
        with pytest.raises(S2EAdapterError, match=r"^[^\n]*training\.json is damaged[^\n]*$"):
            _ = repo.training


# ---- what is refused


def drop(tensors):
    for name in [name for name in tensors if "conv2" in name]:
        del tensors[name]


def add(tensors):
    tensors["more"] = tensors[min(tensors)].clone()


def reshape(tensors):
    name = max(tensors)
    tensors[name] = tensors[name].unsqueeze(0)


@pytest.mark.parametrize("name", ["base", "plain", "fused", "adapter"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, r"missing (tensors )?\S+, \S+, \S+ and \d+ more"),
        (add, "(unexpected|unknown tensors) more"),
        (reshape, "another shape|expected F32"),
    ],
)
def test_other_tensors_than_the_config_describes(repos, name, change, says):
    repo = Repo(repos / name)
    retensor(repo, change)
    with pytest.raises(S2EAdapterError, match=says) as error:
        repo.check()
    assert str(repo.folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_other_classes_than_the_weights_have(repos, name):
    rewrite(repos / name, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(S2EAdapterError, match=r"another shape heads\.speaker|classifier\.weight is F32"):
        Repo(repos / name).check()


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_part_of_the_weights(repos, name):
    repo = Repo(repos / name)
    repo.weights.write_bytes(repo.weights.read_bytes()[:-1])
    with pytest.raises(S2EAdapterError, match="not a whole safetensors file"):
        repo.check()
    with pytest.raises(S2EAdapterError, match="not a whole safetensors file"):
        _ = repo.parameters


def test_changed_numbers_of_an_adapter(repos):
    retensor(Repo(repos / "adapter"), lambda tensors: tensors["stem.bn.weight"].mul_(2))
    with pytest.raises(S2EAdapterError, match="adapter_sha256 differs"):
        Repo(repos / "adapter").check()


def test_a_base_that_is_incompatible(repos):
    adapter = Repo(repos / "adapter")
    with pytest.raises(S2EAdapterError, match=r"incompatible with the base .*other: expected the fingerprint"):
        adapter.check(Repo(repos / "other"))
    with pytest.raises(S2EAdapterError, match="is an adapter too"):
        adapter.check(adapter)
    with pytest.raises(S2EAdapterError, match="incompatible with the base"):
        adapter.check(Repo(repos / "fused"))
    retensor(Repo(repos / "base"), add)
    with pytest.raises(S2EAdapterError, match="unexpected more"):
        adapter.check(adapter.base)


def test_files_that_disagree(repos):
    rewrite(repos / "base", "preprocessor_config.json", mu=100.0)
    with pytest.raises(S2EAdapterError, match=r"disagree about the front end \(mu\)"):
        Repo(repos / "base").check()
    (repos / "adapter" / "adapter.safetensors").rename(repos / "adapter" / "model.safetensors")
    with pytest.raises(S2EAdapterError, match=r"lacks adapter\.safetensors, but its config\.json describes an adapter"):
        Repo(repos / "adapter").check()
    (repos / "plain" / "model.safetensors").rename(repos / "plain" / "adapter.safetensors")
    with pytest.raises(S2EAdapterError, match=r"holds adapter\.safetensors, but its config\.json describes a base"):
        Repo(repos / "plain").check()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"model_type": "wav2vec2"}', "a model of type 'wav2vec2'; expected 's2e'"),
        ('{"model_type": "s2e", "depths": [1, 2, 3, 4]}', "damaged .*one entry a stage"),
        ('{"model_type": "s2e", "adapter_sha256": 7}', "damaged .*adapter_sha256 is 7"),
    ],
)
def test_a_config_that_cannot_be_one(repos, text, says):
    (repos / "base" / "config.json").write_text(text)
    with pytest.raises(S2EAdapterError, match=says):
        Repo(repos / "base").check()


def test_a_config_that_shadows_what_is_asked_of_it(repos):
    rewrite(repos / "base", labels_of=1)
    with pytest.raises(S2EAdapterError, match=r"config\.json is damaged .*not callable"):
        Repo(repos / "base").check()


def test_no_repo(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        _ = Repo(tmp_path).config
