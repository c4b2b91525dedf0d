"""S2EPipeline: any input, any length in blocks, and the same answer however it is asked."""

import io
import json
import os
import subprocess
import sys
import textwrap
import threading

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from hf_s2e import S2EAdapterError, S2EConfig, S2EFeatureExtractor, S2EForAudioClassification, S2EPipeline
from hf_s2e import pipeline as pipeline_module
from hf_s2e.audio import AudioError, load_audio

RATE = 16_000
LABELS = ["anger", "boredom", "fear", "joy", "neutral", "sadness"]


def tiny_model(**settings) -> S2EForAudioClassification:
    """Random weights with spread-out answers, so that differences show."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [2, 4], "depths": [1, 1], "num_bins": 100}
    config = S2EConfig(**sizes, id2label=dict(enumerate(LABELS)), **settings)
    model = S2EForAudioClassification(config).eval()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return model


def voice(samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose level changes along the way, so that neighbouring segments differ."""
    rng = np.random.default_rng(seed)
    level = 0.05 + 0.3 * np.abs(np.sin(np.arange(samples) / 20_000))
    return (level * rng.standard_normal(samples)).astype(np.float32)


def sound(samples: int, seed: int = 0) -> dict:
    return {"array": voice(samples, seed), "sampling_rate": RATE}


def scores(answer: list[dict]) -> list[float]:
    by_label = {entry["label"]: entry["score"] for entry in answer}
    return [by_label[label] for label in LABELS]


@torch.no_grad()
def whole(model, waveform) -> np.ndarray:
    """The posterior when all segments are held at once."""
    extractor = S2EFeatureExtractor.from_model_config(model.config)
    inputs = extractor(waveform, sampling_rate=RATE, return_tensors="pt")
    return model(**inputs).logits.softmax(-1)[0].numpy()


@pytest.fixture(scope="module")
def pipe():
    return S2EPipeline(tiny_model(), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base as from_pretrained takes it."""
    path = tmp_path_factory.mktemp("repos") / "base"
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "voice.wav"
    soundfile.write(path, voice(40_000), RATE, subtype="FLOAT")
    return path


# -- blocks


@pytest.mark.parametrize("normalization", ["segment", "utterance", "none"])
@pytest.mark.parametrize("drop_tail", [False, True])
@pytest.mark.parametrize("segment_hop", [16_000, 32_000])
def test_blocks_give_the_posterior_of_the_whole(monkeypatch, normalization, drop_tail, segment_hop):
    monkeypatch.setattr(pipeline_module, "SEGMENTS_ON_CPU", 3)  # many borders
    model = tiny_model(normalization=normalization, drop_tail=drop_tail, segment_hop=segment_hop)
    pipe = S2EPipeline(model, device="cpu")

    @settings(max_examples=5, deadline=None)
    @given(st.integers(1, 12 * RATE) | st.integers(0, 12).flatmap(lambda s: st.integers(-1, 1).map(
        lambda d: max(1, s * RATE + d)
    )))  # fmt: skip
    def check(samples):
        np.testing.assert_allclose(scores(pipe(sound(samples))), whole(model, voice(samples)), atol=1e-6)

    check()


def test_blocks_when_half_a_window_spans_several_segments(monkeypatch):
    monkeypatch.setattr(pipeline_module, "SEGMENTS_ON_CPU", 5)
    model = tiny_model(segment_length=3200, segment_hop=160, normalization="utterance")
    pipe = S2EPipeline(model, device="cpu")
    np.testing.assert_allclose(scores(pipe(sound(12_345))), whole(model, voice(12_345)), atol=1e-6)


def test_utterance_maximum_far_from_the_segment(monkeypatch):
    """The loudest sample decides about the first segment too, also when the sound can be read only once."""
    monkeypatch.setattr(pipeline_module, "SEGMENTS_ON_CPU", 2)
    model = tiny_model(normalization="utterance")
    waveform = voice(12 * RATE)
    waveform[-5000:] *= 3
    content = io.BytesIO()
    soundfile.write(content, waveform, RATE, format="WAV", subtype="FLOAT")

    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer, inner=io.BytesIO(content.getvalue())):  # noqa: B008
            return inner.readinto(buffer)

    expected = whole(model, waveform)
    pipe = S2EPipeline(model, device="cpu")
    np.testing.assert_allclose(scores(pipe(content)), expected, atol=1e-6)
    np.testing.assert_allclose(scores(pipe(Pipe())), expected, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean", "geometric", "max"])
def test_aggregation_of_the_model_is_used(aggregation):
    model = tiny_model(aggregation=aggregation)
    pipe = S2EPipeline(model, device="cpu")
    np.testing.assert_allclose(scores(pipe(sound(7 * RATE))), whole(model, voice(7 * RATE)), atol=1e-6)


MEMORY = """
import resource, sys
import numpy as np, soundfile, torch
from hf_s2e import S2EConfig, S2EForAudioClassification, S2EPipeline

torch.set_num_threads(1)
path, minutes = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
with soundfile.SoundFile(path, "w", 22050, 2, subtype="PCM_16") as file:
    for _ in range(minutes):
        file.write((0.1 * rng.standard_normal((22050 * 60, 2))).astype(np.float32))
pipe = S2EPipeline(S2EForAudioClassification(S2EConfig(hidden_sizes=[2], depths=[1])).eval(), device="cpu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
pipe({"array": np.ones(16000 * 30), "sampling_rate": 16000})
before = peak()
chunks = pipe(path, return_timestamps=True)["chunks"]
print(len(chunks), peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    minutes = 10  # whose spectrograms would take 192 MB
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "long.wav"), str(minutes)],
        capture_output=True, text=True, check=True, timeout=300,
    ).stdout.split()  # fmt: skip
    assert int(output[0]) == minutes * 60 - 1
    assert float(output[1]) < 60, f"{output[1]} MB more than for half a minute"


# -- inputs


def test_every_kind_of_input_gets_the_same_answer(pipe, wav):
    expected = scores(pipe(sound(40_000)))
    waveform = voice(40_000)
    inputs = [
        wav,
        str(wav),
        wav.read_bytes(),
        io.BytesIO(wav.read_bytes()),
        {"raw": waveform, "sampling_rate": RATE},
        {"array": torch.from_numpy(waveform), "sampling_rate": RATE},
        {"array": np.stack([waveform, waveform]), "sampling_rate": RATE},
        {"array": np.stack([waveform, waveform], axis=1).astype(np.float64), "sampling_rate": RATE},
        {"path": str(wav), "bytes": None},
    ]
    for one in inputs:
        np.testing.assert_allclose(scores(pipe(one)), expected, atol=1e-6)
    np.testing.assert_allclose(scores(pipe(waveform, sampling_rate=RATE)), expected, atol=1e-6)
    assert sum(expected) == pytest.approx(1)


@pytest.mark.parametrize("normalization", ["segment", "utterance"])  # the latter reads twice
def test_a_pipes_path_is_read(normalization, wav, tmp_path):
    pipe, fifo = S2EPipeline(tiny_model(normalization=normalization)), tmp_path / "fifo"
    expected = scores(pipe(wav))
    os.mkfifo(fifo)
    for source in (str(fifo), {"path": str(fifo), "bytes": None}):
        writer = threading.Thread(target=lambda: fifo.write_bytes(wav.read_bytes()), daemon=True)
        writer.start()
        answers = pipe([source, str(wav)])
        writer.join()
        assert [scores(answer) for answer in answers] == [expected] * 2


def test_a_model_in_training_is_taken_out_of_it(wav):
    model = tiny_model()
    model.add_adapter("emo", labels=LABELS)
    statistics = model.s2e.domains["emo"].stem.bn.running_mean.clone()
    pipe, sounds = S2EPipeline(model), [sound(n, n) for n in (30_000, 50_000)]
    model.train_adapter("emo")
    together = pipe(sounds, batch_size=2)
    for one, answer in zip(sounds, together):
        np.testing.assert_allclose(scores(pipe(one)), scores(answer), atol=1e-6)
    assert torch.equal(model.s2e.domains["emo"].stem.bn.running_mean, statistics)


def test_other_rates_and_integers_are_converted(pipe):
    waveform = (voice(60_000) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
    expected = whole(pipe.model, load_audio(waveform, sampling_rate=44100))
    np.testing.assert_allclose(scores(pipe({"array": waveform, "sampling_rate": 44100})), expected, atol=1e-6)


def test_agrees_with_the_stock_pipeline(pipe):
    stock = transformers.AudioClassificationPipeline(
        model=pipe.model, feature_extractor=pipe.feature_extractor, device="cpu"
    )
    ours, theirs = pipe(sound(50_000)), stock(sound(50_000))
    assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
    np.testing.assert_allclose(scores(ours), scores(theirs), atol=1e-6)


def test_a_single_bad_input_raises(pipe, tmp_path):
    with pytest.raises(AudioError, match="No such file"):
        pipe(tmp_path / "absent.wav")
    with pytest.raises(AudioError, match="sampling rate"):
        pipe(voice(100))
    with pytest.raises(AudioError, match="empty"):
        pipe({"array": voice(0), "sampling_rate": RATE})
    with pytest.raises(AudioError, match="NaN"):
        pipe({"array": np.array([np.nan] * 100), "sampling_rate": RATE})


def test_one_sample_and_silence_are_answered(pipe):
    assert sum(scores(pipe({"array": np.array([0.5]), "sampling_rate": 96000}))) == pytest.approx(1)
    with pytest.warns(UserWarning, match="silence"):
        assert sum(scores(pipe({"array": np.zeros(50_000), "sampling_rate": RATE}))) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_bad_file_in_a_list_leaves_the_others(pipe, wav, tmp_path, batch_size):
    broken = tmp_path / "broken.wav"
    samples = voice(20 * RATE)
    samples[-1] = np.nan  # met after blocks of it have been classified
    soundfile.write(broken, samples, RATE, subtype="FLOAT")
    inputs = [sound(20_000), str(tmp_path / "absent.wav"), wav, str(broken), sound(90_000)]
    answers = pipe(inputs, batch_size=batch_size)
    assert len(answers) == len(inputs)
    for index in (0, 2, 4):
        np.testing.assert_allclose(scores(answers[index]), scores(pipe(inputs[index])), atol=1e-6)
    for index, found in ((1, "No such file"), (3, "NaN")):
        assert set(answers[index]) == {"file", "error"}
        assert answers[index]["file"] == inputs[index]
        assert found in answers[index]["error"]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=6), st.integers(1, 7))
def test_neighbours_and_batch_size_change_nothing(pipe, lengths, batch_size):
    together = pipe([sound(n, seed) for seed, n in enumerate(lengths)], batch_size=batch_size)
    for seed, (n, answer) in enumerate(zip(lengths, together)):
        np.testing.assert_allclose(scores(answer), whole(pipe.model, voice(n, seed)), atol=1e-5)


def test_lists_generators_and_datasets(pipe, wav):
    expected = scores(pipe(wav))
    assert pipe([]) == []
    assert [scores(answer) for answer in pipe((str(wav), str(wav)))] == [expected] * 2
    rows = [{"audio": str(wav)}, {"audio": "absent.wav"}, {"audio": str(wav)}]
    answers = list(pipe(KeyDataset(rows, "audio")))
    assert [scores(answers[0]), scores(answers[2])] == [expected] * 2
    assert answers[1]["file"] == "absent.wav"

    def endless():
        while True:
            yield str(wav)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([str(wav)] * len(self))

        def __len__(self):
            return 3

    assert [scores(answer) for answer in pipe(Stream())] == [expected] * 3

    recordings = datasets.Dataset.from_dict({"audio": [{"path": str(wav)}] * 3})
    assert [scores(answer) for answer in pipe(recordings["audio"])] == [expected] * 3
    with pytest.raises(TypeError, match=r"its column of sounds, dataset\['audio'\]"):
        pipe(recordings)

    stream = pipe(endless(), batch_size=2)
    assert [scores(next(stream)) for _ in range(3)] == [expected] * 3


# -- parameters


def test_top_k_at_construction_and_in_a_call(pipe):
    two = S2EPipeline(pipe.model, top_k=2, device="cpu")
    everything = pipe(sound(20_000))
    assert len(everything) == len(LABELS)
    assert [entry["score"] for entry in everything] == sorted(scores(everything), reverse=True)
    assert two(sound(20_000)) == everything[:2]
    assert two([sound(20_000)]) == [everything[:2]]
    assert two(sound(20_000), top_k=3) == everything[:3]
    assert two(sound(20_000), top_k=None) == everything
    assert two(sound(20_000), top_k=99) == everything
    assert two(sound(20_000)) == everything[:2]  # a call does not change the pipeline


def test_wrong_parameters_are_refused(pipe):
    for top_k in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="top_k"):
            pipe(sound(100), top_k=top_k)
    with pytest.raises(ValueError, match="function_to_apply"):
        pipe(sound(100), function_to_apply="argmax")
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe([sound(100)], batch_size=0)
    with pytest.raises(TypeError, match="chunk_length_s"):
        pipe(sound(100), chunk_length_s=10)


def test_function_to_apply(pipe):
    logs = scores(pipe(sound(50_000), function_to_apply="none"))
    np.testing.assert_allclose(np.exp(logs), scores(pipe(sound(50_000))), atol=1e-6)


def test_timeline(pipe):
    samples = 5 * RATE + 8000
    answer = pipe(sound(samples), return_timestamps=True, top_k=None)
    times = [chunk["timestamp"] for chunk in answer["chunks"]]
    assert times == [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.0, 5.0), (4.0, 5.5)]
    mean = np.mean([scores(chunk["scores"]) for chunk in answer["chunks"]], axis=0)
    np.testing.assert_allclose(scores(answer["scores"]), mean, atol=1e-6)
    assert answer["scores"] == pipe(sound(samples))
    first = whole(pipe.model, voice(samples)[: 2 * RATE + 320])  # the window's half beyond it counts
    assert np.abs(np.array(scores(answer["chunks"][0]["scores"])) - first).max() < 0.5
    short = pipe({"array": voice(4410), "sampling_rate": 44100}, return_timestamps=True, top_k=1)
    assert [chunk["timestamp"] for chunk in short["chunks"]] == [(0.0, 0.1)]
    assert len(short["chunks"][0]["scores"]) == 1


def test_the_active_adapter_answers():
    model = tiny_model()
    model.add_adapter("phone", labels=["calm", "upset"])
    pipe = S2EPipeline(model, device="cpu", top_k=3)
    model.set_adapter("phone")
    assert {entry["label"] for entry in pipe(sound(1000))} == {"calm", "upset"}
    model.disable_adapters()
    assert len(pipe(sound(1000))) == 3


def test_other_models_are_refused():
    config = transformers.ASTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    other = transformers.ASTForAudioClassification(config)
    with pytest.raises(TypeError, match="S2EForAudioClassification"):
        S2EPipeline(other, feature_extractor=S2EFeatureExtractor(), device="cpu")
    with pytest.raises(TypeError, match="got a S2EModel"):
        S2EPipeline(tiny_model().s2e, device="cpu")


# -- the factory of transformers


def test_factory_with_our_class_and_with_our_task(folder, wav):
    direct = S2EPipeline(S2EForAudioClassification.from_pretrained(folder), device="cpu")(wav)
    by_class = transformers.pipeline(
        "audio-classification", model=str(folder), pipeline_class=S2EPipeline, device="cpu", top_k=2
    )
    by_task = transformers.pipeline("speech-emotion-recognition", model=str(folder), device="cpu", top_k=2)
    for made in (by_class, by_task):
        assert isinstance(made, S2EPipeline)
        assert made(wav) == direct[:2]


@pytest.mark.slow
def test_the_task_audio_classification_is_left_alone():
    code = """
        from transformers.pipelines import PIPELINE_REGISTRY
        before = dict(PIPELINE_REGISTRY.check_task("audio-classification")[1])
        import hf_s2e.pipeline
        assert PIPELINE_REGISTRY.check_task("audio-classification")[1] == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
    assert "speech-emotion-recognition" in PIPELINE_REGISTRY.get_supported_tasks()


def test_saving_does_not_ask_for_remote_code(pipe, tmp_path, wav):
    pipe.save_pretrained(tmp_path / "saved")
    assert "custom_pipelines" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = transformers.pipeline("speech-emotion-recognition", model=str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(scores(again(wav)), scores(pipe(wav)), atol=1e-6)


def test_adapter_repo_through_the_factory_and_a_wrong_base(folder, wav, tmp_path):
    model = S2EForAudioClassification.from_pretrained(folder)
    model.add_adapter("phone", labels=["calm", "upset"])
    model.save_adapter(tmp_path / "phone", "phone")
    task = "speech-emotion-recognition"
    made = transformers.pipeline(task, model=str(tmp_path / "phone"), device="cpu")
    assert {entry["label"] for entry in made(wav)} == {"calm", "upset"}

    torch.manual_seed(1)
    other = S2EForAudioClassification(S2EConfig(hidden_sizes=[2, 4], depths=[1, 1]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(S2EAdapterError, match="base"):
        transformers.pipeline(task, model=str(tmp_path / "phone"), model_kwargs={"base_model": str(tmp_path / "other")})


def test_real_speech(pipe, s2e_data):
    files = sorted((s2e_data / "emodb").rglob("*.flac"))[:3]
    if not files:
        pytest.skip(f"no flac files under {s2e_data}/emodb")
    for path, answer in zip(files, pipe([str(path) for path in files], batch_size=3)):
        np.testing.assert_allclose(scores(answer), whole(pipe.model, load_audio(path)), atol=1e-5)
