"""Scores of speech emotion recognition: UA, WA, macro-F1, their uncertainty, and a paired test.

Conventions of the paper: WA (weighted accuracy) is plain accuracy, UA (unweighted accuracy) is the mean of
the classes' recalls. Everything here is a fraction in 0..1; only reports turn them into percent.

They need numpy alone; `evaluate_metric.py` has them as an `evaluate.Metric`.
"""

import numpy as np

EXACT_SPEAKERS = 14  # up to 2**14 sign patterns the permutation test enumerates them all
PERMUTATIONS = 10_000  # drawn at random beyond that
RESAMPLES = 4_000
CHUNK = 10_000_000  # bootstrap weights held at a time (160 MB)


def confusion_matrix(labels, predictions, num_classes):
    """Counts (num_classes, num_classes): rows are true labels, columns predictions.

    labels, predictions: integers (utterances,) in 0..num_classes-1. Raises ValueError for anything else.
    """
    labels = _classes(labels, num_classes, "labels")
    predictions = _classes(predictions, num_classes, "predictions")
    if labels.shape != predictions.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"labels have shape {labels.shape} and predictions {predictions.shape}: "
            "expected one prediction per label, and at least one"
        )
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_recalls(labels, predictions, num_classes):
    """Recall of each class (num_classes,); NaN for a class that has no utterance."""
    return _recalls(confusion_matrix(labels, predictions, num_classes))


def unweighted_accuracy(labels, predictions, num_classes):
    """UA: mean recall over the classes that occur among the labels (scikit-learn's balanced accuracy)."""
    return scores(labels, predictions, num_classes)["ua"]


def weighted_accuracy(labels, predictions, num_classes):
    """WA: the share of utterances that are right."""
    return scores(labels, predictions, num_classes)["wa"]


def macro_f1(labels, predictions, num_classes):
    """Mean F1 over the classes that occur among labels or predictions (scikit-learn's `average="macro"`)."""
    return scores(labels, predictions, num_classes)["macro_f1"]


def scores(labels, predictions, num_classes):
    """All scores of one run as a dict of floats: `ua`, `wa`, `macro_f1`.

    >>> scores(labels=[0, 0, 0, 0, 1, 1], predictions=[0, 0, 0, 1, 1, 0], num_classes=2)
    {'ua': 0.625, 'wa': 0.6666666666666666, 'macro_f1': 0.625}
    """
    matrix = confusion_matrix(labels, predictions, num_classes)
    hits, support = np.diag(matrix), matrix.sum(1) + matrix.sum(0)
    f1 = 2 * hits[support > 0] / support[support > 0]
    return {
        "ua": float(np.nanmean(_recalls(matrix))),
        "wa": float(hits.sum() / matrix.sum()),
        "macro_f1": float(f1.mean()),
    }


def mean_std(values):
    """Mean and sample standard deviation (n - 1) over runs; the deviation of a single run is None."""
    values = np.asarray(values, float)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"expected one value per run, found shape {values.shape}")
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None


def bootstrap_ci(
    labels, predictions, num_classes, speakers=None, *, metric="ua", level=0.95, resamples=RESAMPLES, seed=0
):
    """Interval (low, high) of UA or WA over new speakers.

    Speakers are drawn with replacement, each with all utterances: one speaker's utterances are alike, so
    drawing utterances gives intervals that are too narrow, and drawing them within the drawn speakers as well
    gives too wide ones, as their chance is in the speakers' scores already (Davison and Hinkley 1997, section
    3.8). Few speakers show too little of their spread; the interval is widened as Student's t is for it.
    Without `speakers`, and with one, the utterances are drawn. Several runs are averaged per utterance first
    (share of the runs in which it is right), so the interval is that of the mean over runs, for the models at
    hand; the spread of the runs is `mean_std`. A resample without a class averages over the others.

    predictions: (utterances,) or (runs, utterances); speakers: (utterances,) of any hashable ids.
    """
    right = _right(labels, predictions, num_classes)
    if metric not in ("ua", "wa"):
        raise ValueError(f"metric {metric!r}: expected 'ua' or 'wa'")
    groups = np.asarray(labels) if metric == "ua" else np.zeros(len(right), int)
    values = _bootstrap(groups, right[:, None], speakers, resamples, seed)
    low, high = _interval(values[:, 0], level)
    return max(0.0, low), min(1.0, high)


def paired_test(labels, predictions_a, predictions_b, num_classes, speakers=None, *, resamples=RESAMPLES, seed=0):
    """Is method a better than method b on the same utterances? A dict with the difference in UA, a minus b.

    `ua_diff`: difference of the mean UA over runs; `ci95`: its interval from the bootstrap of `bootstrap_ci`,
    the same resamples for both methods; `p`: two-sided, from swapping the two methods speaker by speaker
    (under the null hypothesis their names mean nothing), all 2**speakers patterns where there are at most 14
    speakers and 10,000 random ones otherwise; `test`: which of these it was. With n speakers p cannot be
    under 2 / 2**n. Without `speakers`, and with one, the methods are swapped utterance by utterance.

    Runs are averaged per utterance (share of the runs in which it is right) before anything is compared, so
    the numbers of runs may differ and no run of a is paired with a run of b. The p value is for the models at
    hand and is not corrected for the number of comparisons made.

    predictions_a, predictions_b: (utterances,) or (runs, utterances), in the order of labels and speakers.

    >>> labels, speakers = np.tile([0, 1], 20), np.repeat(["a", "b", "c", "d", "e"], 8)
    >>> right, constant = labels, np.zeros(40, int)
    >>> test = paired_test(labels, right, constant, num_classes=2, speakers=speakers)
    >>> test["ua_diff"], test["p"], test["test"]  # 2 / 2**5: with five speakers no p is smaller
    (0.5, 0.0625, 'permutation over 5 speakers, exact')
    """
    right = np.stack([_right(labels, p, num_classes) for p in (predictions_a, predictions_b)], axis=1)
    labels = np.asarray(labels)
    values = _bootstrap(labels, right, speakers, resamples, seed)
    # UA is a weighted sum over utterances: weight 1 / (classes x utterances of the class)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    difference = (right[:, 0] - right[:, 1]) / (len(counts) * counts[inverse])
    by_speaker = np.bincount(_speaker_numbers(speakers, len(labels)), difference)
    p, kind = _sign_flip(by_speaker, seed)
    low, high = _interval(values[:, 0] - values[:, 1], 0.95)
    unit = "utterances" if len(by_speaker) == len(labels) else "speakers"
    return {
        "ua_diff": float(difference.sum()),
        "ci95": [max(-1.0, low), min(1.0, high)],
        "p": p,
        "test": f"permutation over {len(by_speaker)} {unit}, {kind}",
    }


def _classes(values, num_classes, what):
    values = np.asarray(values)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{what} are {values.dtype}: expected class numbers 0..{num_classes - 1}")
    outside = values[(values < 0) | (values >= num_classes)]
    if outside.size:
        raise ValueError(f"{what} hold {outside[0]}: expected class numbers 0..{num_classes - 1}")
    return values.astype(np.int64)


def _recalls(matrix):
    support = matrix.sum(1)
    return np.where(support > 0, np.diag(matrix) / np.maximum(support, 1), np.nan)


def _right(labels, predictions, num_classes):
    """Share of the runs in which each utterance is right (utterances,)."""
    labels = _classes(labels, num_classes, "labels")
    predictions = np.atleast_2d(_classes(predictions, num_classes, "predictions"))
    if labels.ndim != 1 or not labels.size or predictions.shape[1:] != labels.shape or predictions.ndim != 2:
        raise ValueError(
            f"labels have shape {labels.shape} and predictions {predictions.shape}: "
            "expected (utterances,) and (runs, utterances)"
        )
    return (predictions == labels).mean(0)


def _speaker_numbers(speakers, size):
    """The number of each row's speaker, from 0; of the utterance itself where less than two are known."""
    if speakers is None or (len(set(map(str, speakers))) == 1 and len(speakers) == size):
        return np.arange(size)
    if len(speakers) != size:
        raise ValueError(f"{len(speakers)} speakers for {size} utterances")
    return np.unique(np.asarray(speakers).astype(str), return_inverse=True)[1]


def _bootstrap(groups, right, speakers, resamples, seed):
    """Mean over groups of the share that is right, per resample of speakers: (resamples, methods).

    groups: class of each utterance (utterances,), or zeros for plain accuracy; right: (utterances, methods).
    """
    rng = np.random.default_rng(seed)
    who, group = _speaker_numbers(speakers, len(groups)), np.unique(groups, return_inverse=True)[1]
    count, width = 1 + who.max(), 1 + group.max()
    counted = [np.bincount(who * width + group, weights, count * width) for weights in (None, *right.T)]
    by_speaker = np.stack(counted, axis=1).reshape(count, width, -1).swapaxes(1, 2)  # (speakers, 1 + methods, groups)

    def mean_shares(weights):
        sums = np.tensordot(weights, by_speaker, axes=1)
        support, hits = sums[:, :1], sums[:, 1:]
        return np.nanmean(np.where(support > 0, hits / np.maximum(support, 1), np.nan), axis=2)

    estimate = mean_shares(np.ones((1, count)))
    if count == 1:
        return np.repeat(estimate, resamples, axis=0)
    drawn, step = [], max(1, CHUNK // count)
    for start in range(0, resamples, step):
        drawn.append(mean_shares(rng.multinomial(count, np.full(count, 1 / count), min(step, resamples - start))))
    # what makes a normal deviate one of Student's t, and the sample's variance an unbiased one
    wider = np.sqrt(count / rng.chisquare(count - 1, (resamples, 1)))
    return estimate + (np.concatenate(drawn) - estimate) * wider


def _interval(values, level):
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign_flip(differences, seed):
    """Two-sided p of their sum when each difference may as well have the other sign, and how it was found."""
    observed = abs(differences.sum()) - 1e-12  # sums in another order differ in the last bits
    if len(differences) <= EXACT_SPEAKERS:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ differences) >= observed)), "exact"
    rng = np.random.default_rng(seed)
    extreme = 0
    step = max(1, CHUNK // len(differences))
    for start in range(0, PERMUTATIONS, step):
        signs = rng.integers(0, 2, (min(step, PERMUTATIONS - start), len(differences)), dtype=np.int8)
        extreme += int(np.sum(np.abs((1 - 2 * signs) @ differences) >= observed))
    # the observed pattern is one of the possible ones, so p is never 0
    return (1 + extreme) / (1 + PERMUTATIONS), f"{PERMUTATIONS} random sign patterns"
