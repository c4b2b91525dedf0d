"""Trivial baselines: the UA that something other than emotion reaches alone, who speaks or how long it takes.

A fold is (name, train, validation, test) with row numbers. Accuracies are in percent, over the test parts of
all folds together.
"""

import numpy as np

from ..corpora.index import shuffled
from .metrics import unweighted_accuracy

FOLDS = 5
DURATION_BINS = 20


def ua_by_speaker(index, folds):
    """UA of naming the class by who speaks, as any model can that knows the voices.

    For each speaker, the class with the largest share of its own training utterances is the guess. In random
    folds this is what a split of utterances gives away; in folds that keep speakers apart it is chance. Where
    all speakers say the same, the class held out is the one that training has fewest of: what falls below
    chance for that reason is given as chance.
    """
    ua = _ua(index, np.unique(index.speakers, return_inverse=True)[1], folds)
    return None if ua is None else max(ua, chance_ua(index)[0])


def ua_by_duration(index, seconds, folds):
    """UA of naming the class by the duration, in 20 bins with equal numbers of training utterances.

    For each bin, the class with the largest share of its own training utterances is the guess. Sad speech is
    slow: some points above chance are honest. seconds: one per utterance, NaN leaves an utterance out.
    """
    return _ua(index, np.asarray(seconds, float), folds, bins=DURATION_BINS)


def chance_ua(index):
    """UA of guessing, and its standard error, in percent."""
    labels = [label for label in index.labels if label >= 0]
    chance = 1 / max(1, len(set(labels)))
    return round(100 * chance, 2), 100 * np.sqrt(chance * (1 - chance) / max(1, len(labels)))


def random_folds(index):
    """Five folds of utterances, each with its share of every class, whoever speaks."""
    order = shuffled(range(len(index.labels)), 0, "utterances")
    order.sort(key=index.labels.__getitem__)
    return _folds([order[i::FOLDS] for i in range(FOLDS)])


def speaker_folds(index):
    """Five folds of speakers (fewer where there are fewer speakers); none where speakers are unknown."""
    speakers = shuffled(set(index.speakers or ()), 0, "speakers")
    if len(speakers) < 2:
        return []
    fold_of = {speaker: number % FOLDS for number, speaker in enumerate(speakers)}
    tests = [[] for _ in range(FOLDS)]
    for row, speaker in enumerate(index.speakers):
        tests[fold_of[speaker]].append(row)
    return _folds(tests)


def _folds(tests):
    rows = {row for test in tests for row in test}
    return [(f"fold{i}", sorted(rows - set(test)), [], test) for i, test in enumerate(tests, 1) if test]


def _ua(index, feature, folds, bins=None):
    """Percent, or None where no fold has anything to learn and to test."""
    labels = np.array(index.labels)
    usable = (labels >= 0) & ~np.isnan(feature)
    truth, guesses = [], []
    for _, train, _, test in folds:
        train, test = (np.array([row for row in part if usable[row]], int) for part in (train, test))
        if not train.size or not test.size:
            continue
        cells = feature
        if bins:
            edges = np.unique(np.quantile(feature[train], np.linspace(0, 1, bins + 1)[1:-1]))
            cells = np.searchsorted(edges, feature, side="right")
        shares = np.zeros((cells.max() + 1, len(index.classes)))
        np.add.at(shares, (cells[train], labels[train]), 1)
        # one more in every cell, so that a single utterance does not decide
        shares = (shares + 1) / (shares.sum(0) + len(shares))
        truth.append(labels[test])
        guesses.append(shares.argmax(1)[cells[test]])
    if not truth:
        return None
    ua = unweighted_accuracy(np.concatenate(truth), np.concatenate(guesses), len(index.classes))
    return round(100 * ua, 2)
