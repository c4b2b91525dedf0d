"""Publishing, downloading and finding adapters, against a Hub on localhost (local_hub.py)."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from local_hub import head
from safetensors.torch import load_file, save_file
from transformers import pipeline

from hf_s2e import S2EAdapterError, S2EConfig, S2EForAudioClassification
from hf_s2e.cli import main
from hf_s2e.hub import Repo, S2EHubError, list_adapters, pull, push
from hf_s2e.hub.info import describe_repo
from hf_s2e.serving import AdapterCache

TINY = {"hidden_sizes": [2, 4], "depths": [1, 1]}
SEGMENT = torch.linspace(0, 1, 400 * 200).reshape(1, 400, 200)


def make_repos(folder, **sizes):
    """A base `base` and the adapters `calls` and `radio` in folders side by side, none of them published."""
    torch.manual_seed(0)
    S2EForAudioClassification(S2EConfig(**sizes, num_labels=5, repo_id="hf-s2e/base")).save_pretrained(folder / "base")
    model = S2EForAudioClassification.from_pretrained(folder / "base")
    for name, labels in (("calls", ["calm", "upset"]), ("radio", ["neutral", "angry", "sad"])):
        model.add_adapter(name, labels=labels, init="kaiming", method="residual_adapter")
        model.save_adapter(folder / name, name)
        (folder / name / "run").mkdir()  # what training leaves there, and nobody else needs
        (folder / name / "run" / "checkpoint.bin").write_bytes(b"not for the Hub")
    return folder


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    return make_repos(tmp_path_factory.mktemp("repos"), **TINY)


def forget(monkeypatch, tmp_path):
    """From here on the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{time.monotonic_ns()}"))


def config_of(hub, repo_id, revision="main"):
    return json.loads(head(hub, repo_id, revision)["config.json"])


def answer(model):
    with torch.no_grad():
        return model.eval()(SEGMENT).logits


def body_bytes(requests, repo_id):
    """Bytes of this repo's files that were sent."""
    return sum(request.sent for request in requests if f"/{repo_id}/resolve/" in request.path)


# ---- push


def test_push_sends_bases_first_and_writes_their_ids_and_commits(hub, repos):
    before = {path: path.read_bytes() for path in repos.rglob("*") if path.is_file()}
    done = push([repos / "radio", repos / "calls", repos / "base"], "me")
    assert [upload.repo_id for upload, _ in done] == ["me/base", "me/radio", "me/calls"]
    base_commit = hub.repos["me/base"].resolve("main")
    assert config_of(hub, "me/base")["repo_id"] == "me/base"
    config = config_of(hub, "me/calls")
    assert config["base_model_name_or_path"] == "me/base"
    assert config["base_model_revision"] == base_commit
    assert "base_local_path" not in config
    card = head(hub, "me/calls")["README.md"].decode()
    assert "hf-s2e" not in card and base_commit in card
    assert hub.repos["me/calls"].card(hub.repos["me/calls"].resolve("main"))["base_model"] == "me/base"
    assert before == {path: path.read_bytes() for path in repos.rglob("*") if path.is_file()}


def test_push_sends_the_repo_and_its_code_and_nothing_else(hub, repos):
    push([repos / "calls"], "me")
    files = set(head(hub, "me/calls"))
    code = {name for name in files if name.endswith(".py")}
    assert {"configuration_s2e.py", "feature_extraction_s2e.py", "modeling_s2e.py"} <= code
    assert files - code == {
        ".gitattributes", "README.md", "adapter.safetensors", "config.json", "preprocessor_config.json",
    }  # fmt: skip


def test_an_adapter_takes_its_unpublished_base_along(hub, repos):
    assert [upload.repo_id for upload, _ in push([repos / "calls"], "me")] == ["me/base", "me/calls"]


def test_an_adapter_of_a_published_base_goes_alone(hub, repos, tmp_path):
    push([repos / "base"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.add_adapter("own", labels=["a", "b"])
    model.save_adapter(tmp_path / "own", "own")
    assert [upload.repo_id for upload, _ in push([tmp_path / "own"], "me")] == ["me/own"]
    assert config_of(hub, "me/own")["base_model_revision"] == hub.repos["me/base"].resolve("main")


def test_pushing_again_without_a_change_makes_no_commit(hub, repos):
    first = push([repos], "me")
    commits = {name: len(repo.trees) for name, repo in hub.repos.items()}
    assert [url for _, url in push([repos], "me")] == [url for _, url in first]
    assert {name: len(repo.trees) for name, repo in hub.repos.items()} == commits


def test_a_push_reads_each_config_once(hub, repos, monkeypatch):
    read, from_file = [], S2EConfig.from_json_file
    monkeypatch.setattr(S2EConfig, "from_json_file", lambda path: read.append(path.parent.name) or from_file(path))
    push([Repo(repos / "calls")], "me")
    assert sorted(read) == ["base", "calls"]


def test_dry_run_says_everything_and_sends_nothing(hub, repos, capsys):
    assert main(["push", str(repos), "--to", "me", "--dry-run"]) == 0
    assert hub.requests == [] and hub.repos == {}
    out = capsys.readouterr().out
    assert f"{(repos / 'calls' / 'adapter.safetensors').stat().st_size:,}  adapter.safetensors" in out
    assert "repo_id: 'hf-s2e/base' -> 'me/base'" in out
    assert "base_local_path: '../base' -> None" in out
    assert "left out: run" in out


def test_a_damaged_or_foreign_adapter_is_not_published(hub, repos, tmp_path):
    copy = make_repos(tmp_path, **TINY)
    weights = bytearray((copy / "calls" / "adapter.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "calls" / "adapter.safetensors").write_bytes(weights)
    with pytest.raises(S2EAdapterError, match="adapter_sha256 differs"):
        push([copy / "calls"], "me")
    torch.manual_seed(1)
    other = S2EForAudioClassification(S2EConfig(**TINY, num_labels=5, repo_id="hf-s2e/base"))
    other.save_pretrained(copy / "base")
    with pytest.raises(S2EAdapterError, match="incompatible with the base"):
        push([copy / "radio"], "me")
    assert hub.repos == {}


@pytest.mark.parametrize("change", ["missing heads.speaker.bias", "unexpected more"])
def test_a_base_of_other_tensors_is_neither_shown_nor_pushed_nor_pulled(hub, repos, tmp_path, capsys, change):
    copy, name = make_repos(tmp_path, **TINY), change.split()[1]
    push([copy], "me")
    before = {repo_id: repo.resolve("main") for repo_id, repo in hub.repos.items()}
    tensors = load_file(copy / "base" / "model.safetensors")
    if change.startswith("missing"):
        del tensors[name]
    else:
        tensors[name] = torch.zeros(1)
    save_file(tensors, copy / "base" / "model.safetensors", metadata={"format": "pt"})
    for pushed in (copy / "base", copy / "calls"):  # which takes its base along
        with pytest.raises(S2EAdapterError, match=change):
            push([pushed], "me")
    assert before == {repo_id: repo.resolve("main") for repo_id, repo in hub.repos.items()}

    api = HfApi(endpoint=hub.endpoint)  # by other means
    api.upload_file(
        path_or_fileobj=copy / "base" / "model.safetensors", path_in_repo="model.safetensors", repo_id="me/base"
    )
    config = config_of(hub, "me/calls") | {"base_model_revision": hub.repos["me/base"].resolve("main")}
    api.upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id="me/calls")
    for pulled in ("me/base", "me/calls"):
        with pytest.raises(S2EAdapterError, match=change):
            pull(pulled)
        with pytest.raises(S2EAdapterError, match=change):
            pull(pulled, to=tmp_path / "pulled")
    for shown in ("me/base", str(copy / "base")):
        assert main(["info", shown]) == 1
        assert change in capsys.readouterr().err


def test_an_adapter_that_names_a_folder_of_this_machine_does_not_publish_it(hub, repos, tmp_path):
    """Bases go first, but what is wrong with an adapter is found before anything is sent."""
    copy = make_repos(tmp_path / "received", **TINY)
    torch.manual_seed(1)
    S2EForAudioClassification(S2EConfig(**TINY, num_labels=5)).save_pretrained(tmp_path / "private")
    config = json.loads((copy / "calls" / "config.json").read_text())
    (copy / "calls" / "config.json").write_text(json.dumps(config | {"base_local_path": "../../private"}))
    with pytest.raises(S2EAdapterError, match="incompatible with the base"):
        push([copy / "calls"], "me")
    assert hub.repos == {}


def test_a_base_and_an_adapter_do_not_overwrite_each_other(hub, repos, tmp_path):
    push([repos], "me")
    before = {name: head(hub, name) for name in hub.repos}
    model = S2EForAudioClassification.from_pretrained("me/calls")
    with pytest.raises(S2EAdapterError, match="'me/calls' holds an adapter"):
        model.push_to_hub("me/calls")
    with pytest.raises(S2EAdapterError, match="'me/base' holds a base"):
        model.push_adapter_to_hub("me/base", "calls")
    with pytest.raises(S2EAdapterError, match="holds an adapter"):
        model.save_pretrained(tmp_path / "elsewhere", push_to_hub=True, repo_id="me/radio")
    assert before == {name: head(hub, name) for name in hub.repos}
    model.push_to_hub("whole")  # of the one who is logged in
    assert S2EForAudioClassification.from_pretrained("me/whole").active_adapter() == "calls"


def test_only_the_main_process_uploads(hub, repos, tmp_path):
    model = S2EForAudioClassification.from_pretrained(repos / "base")
    model.save_pretrained(tmp_path / "rank1", is_main_process=False, push_to_hub=True, repo_id="me/rank1")
    assert hub.repos == {}
    model.save_pretrained(tmp_path / "rank0", push_to_hub=True, repo_id="me/rank0")
    assert {"model.safetensors", "preprocessor_config.json"} <= set(head(hub, "me/rank0"))


@pytest.mark.parametrize("namespace", ["a/b", "../me", "me me", ""])
def test_a_namespace_that_cannot_be_one_is_refused_before_anything_is_sent(hub, repos, namespace):
    with pytest.raises(ValueError):
        push([repos / "base"], namespace)
    assert hub.requests == []


def test_two_folders_of_one_name_are_refused(hub, repos, tmp_path):
    with pytest.raises(ValueError, match="several folders are called base"):
        push([repos / "base", make_repos(tmp_path, **TINY) / "base"], "me")


# ---- private, branches, tags, pull requests


def test_private_repos_are_for_their_owner_only(hub, repos, monkeypatch, tmp_path):
    push([repos / "calls"], "me", private=True)
    assert hub.repos["me/calls"].private and hub.repos["me/base"].private
    assert S2EForAudioClassification.from_pretrained("me/calls").active_adapter() == "calls"
    for token in (hub.other_token, ""):  # somebody else, and nobody
        forget(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(S2EHubError, match="no such repo, or it is private"):
            pull("me/calls")
        with pytest.raises((S2EAdapterError, OSError)):
            S2EForAudioClassification.from_pretrained("me/calls")
        assert list_adapters() == []


def test_revisions_branch_tag_commit_and_pull_request(hub, repos):
    model = S2EForAudioClassification.from_pretrained(repos / "base")
    push([repos / "base"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.add_adapter("x", labels=["a", "b"], init="kaiming")
    answers = {}

    def change_and_push(**where):
        with torch.no_grad():
            model.heads["x"].bias.normal_()
        url = model.push_adapter_to_hub("me/x", "x", **where)
        return url, answer(model)

    url, answers["v1"] = change_and_push()
    commit = url.rpartition("/")[2]
    api = HfApi(endpoint=hub.endpoint)
    api.create_tag("me/x", tag="v1")
    api.create_branch("me/x", branch="dev")
    _, answers["dev"] = change_and_push(revision="dev")
    url, answers["refs/pr/1"] = change_and_push(create_pr=True)
    assert url.endswith("/discussions/1")
    _, answers["main"] = change_and_push()
    for revision, expected in {**answers, commit: answers["v1"]}.items():
        loaded = S2EForAudioClassification.from_pretrained("me/x", revision=revision)
        torch.testing.assert_close(answer(loaded), expected, msg=revision)
        fresh = S2EForAudioClassification.from_pretrained("me/base")
        fresh.load_adapter("me/x", revision=revision)
        torch.testing.assert_close(answer(fresh), expected, msg=revision)
    with pytest.raises((S2EAdapterError, OSError), match="nowhere"):
        S2EForAudioClassification.from_pretrained("me/x", revision="nowhere")
    with pytest.raises(S2EHubError, match="no such branch, tag or commit"):
        pull("me/x", revision="nowhere")


def test_names_and_revisions_that_leave_the_cache_are_refused(hub, repos, tmp_path):
    push([repos / "calls"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    with hub.watch() as requests:
        for revision in ("../../x", "/etc/passwd", "a b", "..", "x\n"):
            with pytest.raises(S2EAdapterError, match="cannot be a revision"):
                model.load_adapter("me/calls", revision=revision)
            with pytest.raises(S2EAdapterError, match="cannot be a revision"):
                pull("me/calls", revision=revision)
        for repo_id in ("../../x", "me/../x", "a/b/c", "me/x\ny"):
            with pytest.raises((S2EAdapterError, ValueError)):
                pull(repo_id)
            with pytest.raises((S2EAdapterError, OSError, ValueError)):
                model.load_adapter(repo_id)
    assert requests == []
    assert model.adapter_names == []


def test_the_base_revision_of_a_hostile_adapter_is_checked(hub, repos):
    push([repos / "calls"], "me")
    tree = hub.repos["me/calls"].trees[hub.repos["me/calls"].resolve("main")]
    config = json.loads(tree["config.json"].data) | {"base_model_revision": "../../../../evil"}
    HfApi(endpoint=hub.endpoint).upload_file(
        path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id="me/calls"
    )
    with pytest.raises(S2EAdapterError, match="cannot be a revision"):
        pull("me/calls")
    with pytest.raises(S2EAdapterError, match="cannot be a revision"):
        S2EForAudioClassification.from_pretrained("me/calls")


# ---- download


def test_from_pretrained_and_pipeline_take_an_adapters_id(hub, repos, monkeypatch, tmp_path):
    push([repos], "me")
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "radio"))
    model = S2EForAudioClassification.from_pretrained("me/radio")
    torch.testing.assert_close(answer(model), expected)
    assert model.config.id2label == {0: "neutral", 1: "angry", 2: "sad"}
    sound = 0.1 * np.sin(np.arange(40_000, dtype=np.float32) / 9)
    local = pipeline("audio-classification", model=str(repos / "radio"))(sound)
    assert pipeline("audio-classification", model="me/radio")(sound) == local
    base = S2EForAudioClassification.from_pretrained("me/base")
    base.load_adapter("me/calls")
    assert base.active_adapters() == ["calls"]


def test_the_base_is_taken_at_its_recorded_revision(hub, repos):
    push([repos / "calls"], "me")
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "calls"))
    torch.manual_seed(1)  # the base's main branch moves on to other weights
    S2EForAudioClassification(S2EConfig(**TINY, num_labels=5, repo_id="me/base")).push_to_hub("me/base")
    torch.testing.assert_close(answer(S2EForAudioClassification.from_pretrained("me/calls")), expected)
    with pytest.raises(S2EAdapterError, match="me/base"):
        S2EForAudioClassification.from_pretrained("me/base").load_adapter("me/calls")


def test_offline_from_the_cache(hub, repos, monkeypatch):
    push([repos / "calls"], "me")
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "calls"))
    pull("me/calls")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.watch() as requests:
        torch.testing.assert_close(answer(S2EForAudioClassification.from_pretrained("me/calls")), expected)
        assert pull("me/calls").is_dir()
        with pytest.raises(S2EHubError, match="HF_HUB_OFFLINE"):
            pull("me/radio")
        with pytest.raises((S2EAdapterError, OSError)):
            S2EForAudioClassification.from_pretrained("me/radio")
    assert requests == []


def test_pull_to_a_folder_works_without_the_hub(hub, repos, tmp_path, monkeypatch):
    push([repos / "calls"], "me")
    folder = pull("me/calls", to=tmp_path / "here")
    assert folder == tmp_path / "here" / "calls" and (tmp_path / "here" / "base").is_dir()
    hub.down = True
    forget(monkeypatch, tmp_path)
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "calls"))
    torch.testing.assert_close(answer(S2EForAudioClassification.from_pretrained(folder)), expected)


def test_pull_does_not_take_away_another_adapters_base(hub, repos, tmp_path):
    push([repos], "me")
    pull("me/calls", to=tmp_path / "models")
    other = make_repos(tmp_path / "other", **TINY)
    model = S2EForAudioClassification.from_pretrained(other / "base")
    with torch.no_grad():
        model.s2e.shared.stem.weight.mul_(2)
    model.save_pretrained(tmp_path / "changed" / "base")
    model.add_adapter("third", labels=["a", "b"])
    model.save_adapter(tmp_path / "changed" / "third")
    push([tmp_path / "changed"], "me")  # the base gets a new commit
    with pytest.raises(FileExistsError, match="holds another base"):
        pull("me/third", to=tmp_path / "models")
    assert S2EForAudioClassification.from_pretrained(tmp_path / "models" / "calls").active_adapter() == "calls"
    S2EForAudioClassification.from_pretrained(pull("me/third", to=tmp_path / "more"))
    pull("me/calls", to=tmp_path / "models")  # again


def test_a_base_is_not_pulled_over_an_adapter_of_its_name(hub, repos, tmp_path, monkeypatch):
    push([repos / "base"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    for name in ("x", "y"):
        model.add_adapter(name, labels=["a", "b"])
        model.push_adapter_to_hub(f"me/{name}", name)
    monkeypatch.setenv("HF_TOKEN", hub.other_token)
    model.push_adapter_to_hub(f"{hub.other}/base", "x")
    shutil.copytree(pull(f"{hub.other}/base"), tmp_path / "models" / "base")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        pull("me/y", to=tmp_path / "models")
    assert Repo(tmp_path / "models" / "base").is_adapter


def test_an_adapter_called_as_its_base_is_pulled_to_the_cache(hub, repos, tmp_path, monkeypatch):
    push([repos / "base"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.add_adapter("x", labels=["a", "b"])
    monkeypatch.setenv("HF_TOKEN", hub.other_token)
    theirs = f"{hub.other}/base"
    model.push_adapter_to_hub(theirs, "x")
    assert S2EForAudioClassification.from_pretrained(pull(theirs), base_model="me/base").active_adapter() == "x"
    with pytest.raises(FileExistsError, match="holds the adapter itself"):
        pull(theirs, to=tmp_path / "models")


def test_what_a_download_costs(hub, tmp_path):
    """Full size: at most 0.8 MB for an adapter, and with the base cached no byte of the base."""
    torch.manual_seed(0)
    S2EForAudioClassification(S2EConfig(num_labels=50, repo_id="hf-s2e/base")).save_pretrained(tmp_path / "base")
    model = S2EForAudioClassification.from_pretrained(tmp_path / "base")
    model.add_adapter("eight", labels=list("abcdefgh"))
    model.save_adapter(tmp_path / "eight", "eight")
    push([tmp_path / "eight"], "me")
    with hub.watch() as requests:
        pull("me/base")
    assert body_bytes(requests, "me/base") > 6e6
    with hub.watch() as requests:
        pull("me/eight")
    assert not any("me/base" in request.path for request in requests)  # not even asked for
    with hub.watch() as more:
        S2EForAudioClassification.from_pretrained("me/eight")
    requests += more
    assert (tmp_path / "eight" / "adapter.safetensors").stat().st_size < 0.65e6
    assert 0.6e6 < sum(request.sent for request in requests) < 0.8e6
    assert body_bytes(requests, "me/base") == 0
    with hub.watch() as requests:
        S2EForAudioClassification.from_pretrained("me/eight")
    assert body_bytes(requests, "me/eight") == body_bytes(requests, "me/base") == 0


# ---- refusals


def test_refusals_are_one_line_that_says_what_to_do(hub, repos, monkeypatch, tmp_path):
    push([repos / "calls"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    hub.repos["me/calls"].gated_to = set()
    cases = [
        (hub.other_token, "me/none", "no such repo"),  # 404
        ("hf_wrong", "me/calls", "does not accept the token"),  # 401
        (hub.other_token, "me/calls", "gated"),  # 403
    ]
    for token, repo_id, reason in cases:
        forget(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(S2EHubError, match=reason) as error:
            pull(repo_id)
        assert "\n" not in str(error.value) and repo_id in str(error.value)
        with pytest.raises(S2EAdapterError) as error:
            model.load_adapter(repo_id)
        assert "\n" not in str(error.value) and repo_id in str(error.value)
    assert model.adapter_names == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(S2EHubError, match="may not do that"):
        push([repos / "base"], "someone")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(S2EHubError, match=r"no such repo|does not accept the token"):
        push([repos / "base"], "me")


def test_info_of_what_is_on_the_hub(hub, repos, monkeypatch, tmp_path):
    push([repos / "calls"], "me")
    forget(monkeypatch, tmp_path)
    found = describe_repo("me/calls")
    assert (found["kind"], found["labels"], found["base"]) == ("adapter", ["calm", "upset"], "me/base")
    assert found["base_revision"] == hub.repos["me/base"].resolve("main")
    assert describe_repo("me/base") | {"source": "", "repo_id": ""} == describe_repo(str(repos / "base")) | {
        "source": "", "repo_id": "",
    }  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert describe_repo("me/calls") == found
    with pytest.raises(S2EHubError, match=r"me/none: no such folder, and it cannot be fetched: .*HF_HUB_OFFLINE"):
        describe_repo("me/none")


def test_a_repo_that_is_none_of_ours(hub, repos):
    api = HfApi(endpoint=hub.endpoint)
    api.create_repo("me/empty")
    with pytest.raises(S2EHubError, match=r"no config\.json"):
        pull("me/empty")
    with pytest.raises(S2EAdapterError, match="not an adapter repo"):
        S2EForAudioClassification.from_pretrained(repos / "base").load_adapter("me/empty")


# ---- failures in the middle


@pytest.mark.parametrize("file", ["config.json", "adapter.safetensors", "model.safetensors"])
def test_a_download_that_dies_leaves_nothing_and_the_retry_succeeds(hub, repos, file):
    push([repos / "calls"], "me")
    size = len(head(hub, "me/base" if file.startswith("model") else "me/calls")[file])
    hub.fail(rf"GET .*/{file}", after=size // 2)
    for _ in range(2):  # the second meets what the first has left
        with pytest.raises((S2EAdapterError, OSError)):
            S2EForAudioClassification.from_pretrained("me/calls")
        with pytest.raises(S2EHubError, match="cannot pull"):
            pull("me/calls")
    hub.heal()
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "calls"))
    torch.testing.assert_close(answer(S2EForAudioClassification.from_pretrained("me/calls")), expected)
    pull("me/calls")


def test_a_load_that_fails_leaves_the_model_as_it_was(hub, repos):
    push([repos], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.load_adapter("me/radio")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hub.fail(r"GET .*adapter.safetensors", after=100)
    with pytest.raises(S2EAdapterError, match="me/calls"):
        model.load_adapter("me/calls")
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert model.active_adapters() == ["radio"]


def test_a_hub_that_is_down(hub, repos):
    push([repos / "base"], "me")
    hub.down = True
    for call in (lambda: pull("me/x"), lambda: push([repos / "calls"], "me"), list_adapters):
        with pytest.raises(S2EHubError):
            call()
    with pytest.raises((S2EAdapterError, OSError)):
        S2EForAudioClassification.from_pretrained("me/x")


@pytest.mark.parametrize("request_line", ["PUT /lfs-upload", "POST .*/commit/main", "POST /me/calls.git/"])
def test_an_upload_that_dies_publishes_nothing_and_the_retry_succeeds(hub, repos, request_line):
    push([repos / "base"], "me")
    hub.fail(request_line, after=50)
    with pytest.raises(S2EHubError, match="cannot push me/calls"):
        push([repos / "calls"], "me")
    assert set(head(hub, "me/calls")) == {".gitattributes"}
    hub.heal()
    push([repos / "calls"], "me")
    expected = answer(S2EForAudioClassification.from_pretrained(repos / "calls"))
    torch.testing.assert_close(answer(S2EForAudioClassification.from_pretrained("me/calls")), expected)


def test_a_corrupted_download_is_named_and_pull_repairs_it(hub, repos):
    push([repos / "calls"], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    hub.corrupt = "adapter.safetensors"
    with pytest.raises(S2EAdapterError, match=r"'me/calls'.*adapter\.safetensors"):
        model.load_adapter("me/calls")
    with pytest.raises(S2EAdapterError, match=r"adapter\.safetensors"):
        pull("me/calls")
    assert model.adapter_names == []
    hub.heal()
    with pytest.raises(S2EAdapterError):  # the cache still holds it
        model.load_adapter("me/calls")
    pull("me/calls")
    assert model.load_adapter("me/calls") == "calls"


# ---- other processes: a real environment, the token, two pulls at once


def run_process(hub, tmp_path, code, **environment):
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub.token,
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
        env.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


PULL = "from hf_s2e.cli import main; raise SystemExit(main(['pull', 'me/calls']))"
LOAD = """
from hf_s2e import S2EForAudioClassification
print(S2EForAudioClassification.from_pretrained("me/calls").active_adapters())
"""


@pytest.mark.slow
def test_two_processes_pull_at_once_then_one_offline(hub, repos, tmp_path):
    push([repos / "calls"], "me", private=True)
    both = [run_process(hub, tmp_path, PULL) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    hub.down = True
    offline = run_process(hub, tmp_path, LOAD, HF_HUB_OFFLINE="1")
    output = offline.communicate(timeout=120)[0].decode()
    assert offline.returncode == 0 and "['calls']" in output
    assert_no_token(hub, tmp_path, *outputs, output)


def assert_no_token(hub, folder, *outputs):
    token = hub.token
    for output in outputs:
        assert token not in output
    for path in folder.rglob("*"):
        assert token not in str(path)
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    assert all(token not in request.path for request in hub.requests)
    for repo in hub.repos.values():
        for tree in repo.trees.values():
            assert all(token.encode() not in blob.data for blob in tree.values())


def test_the_token_is_neither_printed_nor_written(hub, repos, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    errors = []
    assert main(["push", str(repos), "--to", "me", "--private"]) == 0
    assert main(["push", str(repos / "base"), "--to", "someone"]) == 1
    assert main(["pull", "me/calls", "--to", str(tmp_path / "pulled")]) == 0
    assert main(["pull", "me/none"]) == 1
    assert main(["adapters"]) == 0
    hub.fail("PUT /lfs-upload", after=10)
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.add_adapter("own", labels=["a", "b"])
    for call in (
        lambda: model.push_adapter_to_hub("me/own", "own", token=hub.token),
        lambda: pull("someone/none", token=hub.token),
        lambda: model.load_adapter("me/none", token=hub.token),
    ):
        with pytest.raises(Exception) as error:  # whatever it is, it must not tell
            call()
        errors.append(repr(error.value))
    printed = capfd.readouterr()
    assert "cannot push someone/base" in printed.err
    assert any(request.token == hub.token for request in hub.requests)  # it was used
    assert_no_token(hub, tmp_path, printed.out, printed.err, caplog.text, *errors)
    model.save_pretrained(tmp_path / "saved")
    model.save_adapter(tmp_path / "saved-adapter", "own")
    assert_no_token(hub, tmp_path)


# ---- list


def test_adapters_are_found_by_their_base(hub, repos):
    push([repos], "me")
    model = S2EForAudioClassification.from_pretrained("me/base")
    model.add_adapter("third", labels=["a", "b"])
    model.push_adapter_to_hub("me/third", "third")
    HfApi(endpoint=hub.endpoint).create_repo("me/unrelated")
    found = {entry.repo_id: entry for entry in list_adapters("me/base")}
    assert set(found) == {"me/calls", "me/radio", "me/third"}
    assert found["me/radio"].labels == ["neutral", "angry", "sad"]
    assert found["me/radio"].base == "me/base"
    assert found["me/radio"].base_revision == hub.repos["me/base"].resolve("main")
    assert {entry.repo_id for entry in list_adapters()} == set(found)
    assert list_adapters("me/other") == []


def test_no_revision_may_be_said_of_an_adapter_that_records_its_bases(hub, repos):
    """As transformers' pipeline said it, up to 5.17, to a model class with a config in hand."""
    push([repos], "me")
    config = S2EConfig.from_pretrained("me/calls")
    assert config.base_model_revision
    loaded = S2EForAudioClassification.from_pretrained("me/calls", config=config, revision=None, subfolder=None)
    assert loaded.active_adapters() == ["calls"]


def test_a_pushed_adapter_leaves_its_owners_card(hub, repos):
    push([repos / "base"], "me")
    model, api = S2EForAudioClassification.from_pretrained("me/base"), HfApi(endpoint=hub.endpoint)
    model.add_adapter("x", labels=["a", "b"])
    model.push_adapter_to_hub("me/x", "x")
    assert b"Not evaluated" in head(hub, "me/x")["README.md"]
    model.delete_adapter("x")
    model.add_adapter("x", labels=["a", "c"])
    model.push_adapter_to_hub("me/x", "x")
    card = head(hub, "me/x")["README.md"]
    assert b"Classes: a, c." in card  # nobody wrote the one before
    mine = card + b"\n## How it was recorded\n"
    api.upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="me/x")
    model.push_adapter_to_hub("me/x", "x")
    assert head(hub, "me/x")["README.md"] == mine
    api.upload_file(path_or_fileobj=b"my card", path_in_repo="README.md", repo_id="me/x")
    model.push_adapter_to_hub("me/x", "x")
    assert head(hub, "me/x")["README.md"] == b"my card"


@pytest.mark.parametrize("config", ['{"id2label": {"5": "x"}}', '{"id2label": ["a", "b"]}', "[1]", "{"])
def test_one_strangers_config_does_not_hide_the_others(hub, repos, config):
    push([repos], "me")
    HfApi(endpoint=hub.endpoint).upload_file(
        path_or_fileobj=config.encode(), path_in_repo="config.json", repo_id="me/radio"
    )
    found = {entry.repo_id: entry for entry in list_adapters("me/base")}
    assert found["me/radio"].problem and found["me/radio"].labels == []
    assert found["me/calls"].problem is None and found["me/calls"].labels == ["calm", "upset"]


@pytest.mark.parametrize("config", ['{"base_model_name_or_path": ["a"]}', "[1]"])
def test_an_adapter_whose_config_is_nonsense_is_not_pulled(hub, repos, config):
    push([repos], "me")
    HfApi(endpoint=hub.endpoint).upload_file(
        path_or_fileobj=config.encode(), path_in_repo="config.json", repo_id="me/radio"
    )
    with pytest.raises(S2EAdapterError):
        pull("me/radio")


def test_adapters_shows_results_and_what_cannot_be_read(hub, repos, tmp_path, capsys, monkeypatch):
    push([repos], "me")
    card = head(hub, "me/calls")["README.md"].decode()
    results = (
        "model-index:\n- name: calls\n  results:\n  - task: {type: audio-classification}\n"
        "    dataset: {name: EmoDB, type: emodb}\n    metrics:\n    - {type: recall, name: UA, value: 73.7}\n"
    )
    api = HfApi(endpoint=hub.endpoint)
    with_results = card.replace("---\n", f"---\n{results}", 1).encode()
    api.upload_file(path_or_fileobj=with_results, path_in_repo="README.md", repo_id="me/calls")
    api.upload_file(path_or_fileobj=b"{", path_in_repo="config.json", repo_id="me/radio")
    assert main(["adapters", str(repos / "base")]) == 0
    assert "no adapters found" in capsys.readouterr().err  # that folder's base is hf-s2e/base
    assert main(["adapters", "me/base", "--json"]) == 0
    calls, radio = sorted(json.loads(capsys.readouterr().out), key=lambda entry: entry["repo_id"])
    assert calls["results"] == {"EmoDB UA": 73.7} and calls["labels"] == ["calm", "upset"]
    assert radio["labels"] == [] and radio["problem"]
    assert main(["adapters", "me/base"]) == 0
    assert "me/calls  calm, upset  EmoDB UA 73.7  (base me/base)" in capsys.readouterr().out


# ---- many domains in one server


@pytest.fixture
def cache(repos):
    return AdapterCache(S2EForAudioClassification.from_pretrained(repos / "base"), max_adapters=2)


@pytest.fixture(scope="module")
def three(repos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    model = S2EForAudioClassification.from_pretrained(repos / "base")
    for name in ("a", "b", "c"):
        model.add_adapter(name, labels=["x", "y"], init="kaiming")
        model.save_adapter(folder / name, name)
    return [str(folder / name) for name in "abc"]


def test_cache_answers_as_each_adapter_alone(cache, three, repos):
    for source in (*three, *three):  # more than it holds: each is let go and comes back
        expected = answer(S2EForAudioClassification.from_pretrained(source, base_model=repos / "base"))
        with cache.resident([source]) as names:
            torch.testing.assert_close(cache.model(SEGMENT, adapter_names=names).logits, expected)
        assert len(cache.model.adapter_names) == len(cache) <= 2
    assert cache.model.active_adapters() == []  # loading changes nothing for those who do not ask


def test_cache_lets_go_what_was_used_longest_ago(cache, three):
    a, b, c = three
    for source in (a, b, a, c):
        with cache.resident([source]):
            pass
    assert a in cache and c in cache and b not in cache


def test_cache_loads_again_what_was_deleted(cache, three):
    with cache.resident([three[0]]) as (name,):
        pass
    cache.model.delete_adapter(name)
    with cache.resident([three[0]]) as names:
        assert names == cache.model.adapter_names == [name]


def test_cache_keeps_what_the_batch_needs(cache, three):
    a, b, c = three
    with cache.resident([a, b]):
        pass
    with cache.resident([c, None, a, c]) as names:  # b goes, though a was used longer ago
        assert names[1] is None and names[0] == names[3] != names[2]
        out = cache.model(SEGMENT.expand(4, -1, -1), adapter_names=names)
        assert [len(labels) for labels in out.row_labels] == [2, 5, 2, 2]
    assert b not in cache
    with pytest.raises(ValueError, match="3 different adapters"), cache.resident([a, b, c]):
        pass


def test_cache_keeps_revisions_apart_and_survives_a_failed_load(hub, repos):
    push([repos / "calls"], "me")
    HfApi(endpoint=hub.endpoint).create_tag("me/calls", tag="v1")
    cache = AdapterCache(S2EForAudioClassification.from_pretrained("me/base"))
    with cache.resident([("me/calls", "v1"), "me/calls"]) as names:
        assert names[0] != names[1]
    with pytest.raises(S2EAdapterError, match="me/none"), cache.resident(["me/none"]):
        pass
    assert len(cache) == 2 == len(cache.model.adapter_names)
    with pytest.raises(ValueError, match="max_adapters"):
        AdapterCache(cache.model, max_adapters=0)


def test_saved_tensors_are_those_that_were_pushed(hub, repos, tmp_path):
    push([repos / "calls"], "me")
    folder = pull("me/calls", to=tmp_path / "pulled")
    pulled, own = (
        load_file(folder / "adapter.safetensors"),
        load_file(repos / "calls" / "adapter.safetensors"),
    )
    assert list(pulled) == list(own) and all(torch.equal(pulled[name], own[name]) for name in own)
