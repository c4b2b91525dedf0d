"""Distillation: a teacher's targets are what its network says, a student learns them, and resuming is exact."""

import shutil

import numpy as np
import pytest
import torch
from tiny import tiny_config
from training_tools import FRONT_END, Workbench, forget_accelerator, fresh_accelerator, read, same_tensors, script
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_s2e import S2EConfig, S2EForAudioClassification, S2EFrontEnd
from hf_s2e.training.data import SegmentDataset, Task
from hf_s2e.training.loop import train
from hf_s2e.training.recipe import Recipe
from hf_s2e.training.teachers import S2EStudent, Teacher, TeacherError, TeacherTargets, segment_waves, steps_of

SECONDS = 2
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (80, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Tiny networks of every kind, as folders."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = {"d_model": 16, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    small |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 8}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = WhisperForConditionalGeneration(WhisperConfig(num_mel_bins=80, **small))
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder / "whisper")
    for name, config, network in (
        ("wav2vec2", Wav2Vec2Config, Wav2Vec2Model),
        ("hubert", HubertConfig, HubertModel),
        ("wavlm", WavLMConfig, WavLMModel),
    ):
        network(config(**SMALL)).save_pretrained(folder / name)
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / name)
    cam = S2EConfig(backbone="campplus", hidden_sizes=[2, 8, 2], depths=[2, 3], num_labels=1)
    S2EForAudioClassification(cam).save_pretrained(folder / "campplus")
    return {place.name: str(place) for place in folder.iterdir()}


def waves(count: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(count, SECONDS * 16_000, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("name, network", [("wav2vec2", Wav2Vec2Model), ("hubert", HubertModel), ("wavlm", WavLMModel)])
def test_hidden_states_are_what_transformers_gives(teachers, name, network):
    sound = waves(3)
    own, extract = network.from_pretrained(teachers[name]).eval(), Wav2Vec2FeatureExtractor(do_normalize=True)
    inputs = extract(list(sound.numpy()), sampling_rate=16_000, return_tensors="pt")
    states = own(**inputs, output_hidden_states=True).hidden_states
    for layer in (1, 3):
        torch.testing.assert_close(Teacher(f"{teachers[name]}:{layer}").hidden_states(sound), states[layer])
    assert Teacher(teachers[name]).layer == 2  # half of its blocks


@torch.inference_mode()
def test_whisper_on_a_short_piece(teachers):
    """Its first positions and no padding to 30 s; the pieces before the padding are not what it hears otherwise."""
    sound, whisper = waves(2), WhisperForConditionalGeneration.from_pretrained(teachers["whisper"]).eval()
    extract = WhisperFeatureExtractor(feature_size=80)
    features = extract(
        list(sound.numpy()), sampling_rate=16_000, return_tensors="pt", padding="do_not_pad", truncation=False
    )["input_features"]
    encoder = whisper.model.encoder
    x = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(features)))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers[:2]:
        x = layer(x, None)
    found = Teacher(f"{teachers['whisper']}:2").hidden_states(sound)
    assert found.shape == (2, 100, 16)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_base_of_this_package_is_a_teacher(teachers):
    model = S2EForAudioClassification.from_pretrained(teachers["campplus"]).eval()
    sound, front_end = waves(2), S2EFrontEnd(**model.config.front_end)
    maps = model.s2e.shared(torch.cat([front_end(wave) for wave in sound]), model.s2e.domains["speaker"])
    for layer, one in enumerate(maps, start=1):
        found = Teacher(f"{teachers['campplus']}:{layer}").hidden_states(sound)
        torch.testing.assert_close(found, one.flatten(2).transpose(1, 2))
    assert torch.equal(Teacher(teachers["campplus"]).hidden_states(sound), found)  # the last by default
    assert Teacher(teachers["campplus"])(sound, 13).shape == (2, 13, model.config.embedding_size)


@pytest.mark.parametrize(
    "name, said",
    [
        ("/nowhere/at/all", "cannot be loaded"),
        ("whisper:5", "layer 5 was asked for, but it has 1 to 4"),
        ("campplus:3", "layer 3 was asked for, but it has 1 to 2"),
        ("lacking:1", "1 of its tensors are missing, such as encoder.layers.0.fc1.weight"),
    ],
)
def test_a_missing_or_wrong_teacher_is_one_sentence(teachers, tmp_path, name, said):
    if name.startswith("lacking"):
        from safetensors.torch import load_file, save_file

        for file in ("config.json", "preprocessor_config.json"):
            shutil.copy(f"{teachers['whisper']}/{file}", tmp_path)
        tensors = load_file(f"{teachers['whisper']}/model.safetensors")
        del tensors["model.encoder.layers.0.fc1.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        name = f"{tmp_path}:1"
    source, colon, layer = name.partition(":")
    with pytest.raises(TeacherError, match=said) as caught:
        Teacher(teachers.get(source, source) + colon + layer)
    assert "\n" not in str(caught.value)


# ---- targets


def segments(work: Workbench, rows=range(6), speeds=(1.0, 0.8)) -> SegmentDataset:
    return SegmentDataset(work.store, list(work.corpus["label"]), list(rows), S2EFrontEnd(**FRONT_END), speeds=speeds)


def test_every_speed_has_its_own_segments(work):
    data, plain = segments(work), segments(work, speeds=(1.0,))
    count = len(plain)
    assert torch.equal(data.starts[:count], plain.starts) and (data.speeds[:count] == 1).all()
    assert (data.speeds[count:] == np.float32(0.8)).all() and len(data) > 2 * count - 6
    heard = segment_waves(data, torch.arange(len(data)))
    own = work.store.cut(data.utterances[:count], data.starts[:count], 32_000)
    assert torch.equal(heard[:count], own) and heard.isfinite().all() and heard[count:].any(dim=1).all()


def test_targets_are_kept_and_gone_on_with(work, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_s2e.training.teachers.SEGMENTS_AT_ONCE", 4)
    monkeypatch.setattr("hf_s2e.training.teachers.SAVE_EVERY", 1)
    data, teacher = segments(work), Teacher(f"{teachers['wav2vec2']}:2")
    whole = TeacherTargets.build(teacher, data, 5, tmp_path / "whole", progress=False)
    raw = torch.cat([teacher(segment_waves(data, torch.tensor([row])), 5) for row in range(len(data))])
    assert whole.values.shape == (len(data), 5, 16)
    np.testing.assert_allclose(whole.values, raw.numpy(), atol=2e-3)
    of = whole.of(torch.arange(len(data)))
    torch.testing.assert_close(of.mean((0, 1)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(of.std((0, 1), correction=0), torch.ones(16), atol=1e-2, rtol=0)

    calls = []

    def stop_after_two(self, sound, steps):
        calls.append(len(sound))
        if len(calls) == 4:  # the first only asks for the width
            raise KeyboardInterrupt
        return original(self, sound, steps)

    original = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        TeacherTargets.build(teacher, data, 5, tmp_path / "parted", progress=False)
    calls.clear()
    calls += [0] * 10
    parted = TeacherTargets.build(teacher, data, 5, tmp_path / "parted", progress=False)
    assert sum(calls) == 1 + len(data) - 8  # the width, and what was not done
    assert np.array_equal(parted.values, whole.values) and parted.key == whole.key
    other = TeacherTargets.build(teacher, segments(work, rows=range(1, 7)), 5, tmp_path / "whole", progress=False)
    assert other.key != whole.key  # of other audio


# ---- students


def learn(work, teachers, tmp_path, rows, recipe, **options):
    config = tiny_config(**FRONT_END, adapters=False, num_labels=3)
    torch.manual_seed(0)
    task = Task(work.store, [0] * len(work.corpus), list(rows), S2EFrontEnd(**config.front_end))
    data = segments(work, rows)
    teacher = TeacherTargets.build(
        Teacher(f"{teachers['wav2vec2']}:2"), data, steps_of(config), tmp_path, progress=False
    )
    student = S2EStudent(config, [teacher.width])
    history = train(fresh_accelerator(), student, task, recipe, teachers=[teacher], **options)
    return student, [row["loss"] for row in history]


def test_a_student_overfits_a_few_segments(work, teachers, tmp_path):
    recipe = Recipe(
        num_train_epochs=60, per_device_train_batch_size=8, learning_rate=0.03, loss="none", optimizer="adamw"
    )
    student, losses = learn(work, teachers, tmp_path, range(4), recipe)
    assert losses[-1] < 0.6 * losses[0]
    base = student.base()
    assert not any("regressors" in name for name in base.state_dict())
    x = torch.rand(2, 20, 20)
    torch.testing.assert_close(base.eval()(x).logits.exp(), student.eval()(x).logits.softmax(1))


def test_speakers_and_teachers_are_learnt_beside_each_other(work, teachers, tmp_path):
    recipe = Recipe(num_train_epochs=2, per_device_train_batch_size=8, speeds=[1.0, 0.8])
    student, _ = learn(work, teachers, tmp_path, range(8), recipe)
    alone = Recipe(num_train_epochs=2, per_device_train_batch_size=8, speeds=[1.0, 0.8], loss="none")
    other, _ = learn(work, teachers, tmp_path, range(8), alone)
    assert not torch.equal(student.s2e.shared.stem.weight, other.s2e.shared.stem.weight)


def test_resuming_is_exact(work, teachers, tmp_path, one_thread):
    recipe = Recipe(num_train_epochs=2, per_device_train_batch_size=5, speeds=[1.0, 0.8])
    options = {"checkpoint_dir": tmp_path / "run", "checkpointing_steps": 3}
    whole, losses = learn(work, teachers, tmp_path, range(8), recipe)
    forget_accelerator()
    learn(work, teachers, tmp_path, range(8), recipe, max_train_steps=4, **options)
    forget_accelerator()
    found = sorted((tmp_path / "run").glob("step_*"))[-1]
    again, resumed = learn(work, teachers, tmp_path, range(8), recipe, resume_from=found)
    assert resumed == losses
    assert same_tensors(whole, again)


def test_the_script(work, teachers, tmp_path, monkeypatch):
    """From a corpus and two teachers to a base that takes adapters."""
    monkeypatch.setattr("hf_s2e.model.configuration_s2e.BACKBONES", small_backbones())
    flags = {"output_dir": tmp_path / "base", "num_train_epochs": 1, "per_device_train_batch_size": 5}
    flags |= {"min_seconds": 0.5, "held_out_speakers": 0, "max_train_samples": 4, "repo_id": "me/taught"}
    words = ["--no-adapters", "--remove_dc", "--speeds", "0.8", "1.0"]
    words += ["--teacher", f"{teachers['whisper']}:1", "--teacher", teachers["campplus"]]
    script("pretrain").main(work.flags(**flags) + words)
    model = S2EForAudioClassification.from_pretrained(tmp_path / "base")
    assert model.config.remove_dc and not model.config.adapters
    model.add_adapter("emo", labels=["a", "b"])
    method = read(tmp_path / "base" / "training.json")["method"]
    assert method.startswith("speaker classification, distilled from") and "whisper" in method and "campplus" in method
    forget_accelerator()
    again = [*words, "--model_name_or_path", str(tmp_path / "base"), "--loss", "none"]
    script("pretrain").main(work.flags(**flags | {"output_dir": tmp_path / "second"}) + again)
    assert read(tmp_path / "second" / "training.json")["method"] == "distillation"
    for wrong, said in ((["--speeds", "0.9"], "2"), (["--random_crop"], "fixed segments")):
        forget_accelerator()
        with pytest.raises(SystemExit, match=said):
            script("pretrain").main(work.flags(**flags | {"output_dir": tmp_path / "x"}) + words + wrong)


def small_backbones():
    from hf_s2e.model.configuration_s2e import BACKBONES

    return BACKBONES | {"resnet20": BACKBONES["resnet20"] | {"hidden_sizes": (2, 4), "depths": (1, 1)}}
