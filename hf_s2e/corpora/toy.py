"""A toy corpus that the package makes itself, to try things out without data. Never report a result on it.

A source-filter voice: a pulse train whose spectral tilt is a parameter, breath noise, and three formants that
move from vowel to vowel. Speakers differ in pitch, vocal tract length, loudness and liveliness; the emotions
in pitch contour, energy, rate and voice quality, with enough scatter that they overlap. The same options give
the same samples. Files are written to ``data_dir``, or to the cache folder, once.
"""

import os
import re
import shutil
import wave
from pathlib import Path

import datasets
import numpy as np

from ..model.atomic_write_s2e import beside
from .base import About, Corpus

RATE = 16_000  # samples per second
HOP = 128  # samples between filter frames, 8 ms
FRAME = 4 * HOP
# Factors on pitch and its range, slope (octaves per second), energy (dB), syllables per second, tilt, breath
VOICES = {
    "neutral": (1.00, 0.8, -0.05, 0.0, 4.0, 0.88, 0.010),
    "happy": (1.30, 2.0, 0.15, 3.0, 4.4, 0.91, 0.010),
    "sad": (0.92, 0.4, -0.10, -6.0, 3.1, 0.78, 0.040),
    "angry": (1.15, 1.4, -0.25, 7.0, 4.9, 0.96, 0.004),
}
VOWELS = np.array(  # Hz, three formants each, of a, i, u, e, o
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]]
)
BANDWIDTHS = np.array([80.0, 110.0, 160.0])  # Hz, of the three formants
TOY_OPTIONS = {"num_speakers": 6, "utterances_per_label": 6, "seed": 0}


class Toy(Corpus):
    ABOUT = About(
        title="generated toy voices",
        language="not stated",
        license="apache-2.0",
        terms="made by this package; a toy for trying things out, whose scores mean nothing for speech",
    )
    LAYOUT = "spk00/spk00_neutral_00.wav"
    PATTERN = re.compile(r"spk\d+/(?P<speaker>spk\d+)_(?P<label>[a-z]+)_\d+")
    CLASSES = tuple(VOICES)
    COLUMNS = ("gender",)
    OPTIONS = TOY_OPTIONS

    def locate(self, data_dir):
        """The folder of these options; it is made first where it is missing."""
        parent = Path(data_dir or self.cache_dir_root or datasets.config.HF_DATASETS_CACHE).expanduser()
        sizes = [self.options[name] for name in TOY_OPTIONS]
        folder = parent.absolute() / "s2e-toy-{}-speakers-{}-each-seed-{}".format(*sizes)
        if not folder.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            unfinished = beside(folder)
            unfinished.mkdir()
            try:
                write_toy(unfinished, *sizes)
                os.rename(unfinished, folder)  # whole or not at all
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    def row(self, name):
        gender = "female" if int(name["speaker"][3:]) % 2 else "male"
        return {"label": name["label"], "speaker": name["speaker"], "gender": gender}

    def expected(self):
        each = self.options["num_speakers"] * self.options["utterances_per_label"]
        return {"label": dict.fromkeys(self.classes, each)}


def write_toy(folder: Path, num_speakers: int, utterances_per_label: int, seed: int) -> None:
    """Write ``spkNN/spkNN_label_NN.wav``, 16 kHz, 16 bit, mono."""
    for number in range(num_speakers):
        speaker = draw_speaker(number, seed)
        name = f"spk{number:02d}"
        (folder / name).mkdir()
        for index, label in enumerate(VOICES):
            for take in range(utterances_per_label):
                random = np.random.default_rng([seed, number, index, take])
                samples = np.round(synthesise(speaker, label, random) * 32767).astype("<i2")
                with wave.open(str(folder / name / f"{name}_{label}_{take:02d}.wav"), "wb") as file:
                    file.setparams((1, 2, RATE, len(samples), "NONE", ""))
                    file.writeframes(samples.tobytes())


def draw_speaker(number: int, seed: int) -> dict[str, float]:
    """A voice: pitch in Hz, formant factor (1 = long vocal tract), loudness in dB, liveliness (factor)."""
    random = np.random.default_rng([seed, number])
    woman = number % 2
    return {
        "pitch": random.uniform(175, 235) if woman else random.uniform(95, 140),
        "formants": random.uniform(1.10, 1.25) if woman else random.uniform(0.95, 1.08),
        "loudness": random.normal(0, 1.5),
        "liveliness": random.uniform(0.7, 1.3),
        "tilt": random.normal(0, 0.012),
    }


def synthesise(speaker: dict[str, float], label: str, random: np.random.Generator) -> np.ndarray:
    """One utterance of 1.5-3 s: float64 samples in [-1, 1]."""
    pitch, spread, slope, energy, rate, tilt, breath = _scattered(VOICES[label], speaker, random)
    syllables = int(np.clip(random.integers(6, 11), np.ceil(1.5 * rate), np.floor(2.9 * rate)))
    length = int(RATE * syllables / rate)
    seconds = np.arange(length) / RATE
    place = seconds * rate  # counted in syllables
    accents = np.interp(place, np.arange(syllables + 1), random.normal(0, 0.11 * spread, syllables + 1))
    octaves = accents + slope * (seconds - seconds[-1] / 2) + 0.01 * np.cumsum(random.normal(0, 0.02, length))
    frequency = speaker["pitch"] * pitch * 2.0**octaves
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    # The sum of harmonics k with amplitudes tilt**k in closed form: strong overtones where tilt is near 1.
    pulses = (tilt * np.cos(phase) - tilt**2) / (1 - 2 * tilt * np.cos(phase) + tilt**2)
    loudness = 0.15 + 0.85 * np.sin(np.pi * (place % 1)) ** 2  # rises and falls with each syllable
    loudness *= random.uniform(0.6, 1.0, syllables + 1)[place.astype(int)]
    source = (pulses + 6 * breath * random.normal(size=length)) * loudness
    formants = VOWELS[random.integers(len(VOWELS), size=syllables + 1)] * speaker["formants"]
    voice = _filter(source, formants, rate)
    gain = 0.05 * 10 ** ((energy + speaker["loudness"]) / 20)
    voice = voice * gain / np.sqrt(np.mean(voice**2)) + 0.001 * random.normal(size=length)
    return np.clip(voice, -1, 1)


def _scattered(voice: tuple, speaker: dict[str, float], random: np.random.Generator) -> tuple:
    """An emotion's parameters as this speaker shows them in this utterance."""
    neutral = np.array(VOICES["neutral"])
    shown = neutral + speaker["liveliness"] * (np.array(voice) - neutral)
    pitch, spread, slope, energy, rate, tilt, breath = shown
    return (
        pitch * random.normal(1, 0.05),
        max(spread * random.normal(1, 0.25), 0.2),
        slope + random.normal(0, 0.08),
        energy + random.normal(0, 1.5),
        rate * random.normal(1, 0.10),
        float(np.clip(tilt + speaker["tilt"] + random.normal(0, 0.010), 0.7, 0.97)),
        max(breath * random.normal(1, 0.4), 0.002),
    )


def _filter(source: np.ndarray, formants: np.ndarray, rate: float) -> np.ndarray:
    """Three resonances, moving between the syllables' formants (syllables + 1, 3), by overlapping frames."""
    padded = np.pad(source, FRAME)
    starts = np.arange(0, len(padded) - FRAME, HOP)
    window = np.hanning(FRAME + 1)[:FRAME]
    frames = np.fft.rfft(padded[starts[:, None] + np.arange(FRAME)] * window)
    place = (starts - FRAME / 2) / RATE * rate
    bins = np.fft.rfftfreq(FRAME, 1 / RATE)
    for formant, bandwidth in zip(formants.T, BANDWIDTHS):
        centre = np.interp(place, np.arange(len(formant)), formant)[:, None]
        frames = frames * (centre**2 / np.sqrt((bins**2 - centre**2) ** 2 + (bandwidth * bins) ** 2))
    voice = np.zeros(len(padded) + FRAME)
    for start, frame in zip(starts, np.fft.irfft(frames, FRAME)):
        voice[start : start + FRAME] += frame
    return voice[FRAME : FRAME + len(source)]
