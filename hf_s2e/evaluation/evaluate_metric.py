"""The scores of `metrics.py` as an `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np

from .metrics import class_recalls, confusion_matrix, scores


class SpeechEmotionMetric(evaluate.Metric):
    """UA, WA, macro-F1, per-class recall and confusion matrix; needs no network.

    `compute(predictions=, references=, num_classes=None, label_names=None)` returns a dict: floats `ua`, `wa`,
    `macro_f1`, `recall` (by label name, or by class number; None for a class without utterances) and
    `confusion_matrix` (nested lists, rows true). Without `num_classes` and `label_names` the classes are those up
    to the highest number seen.

    >>> metric = SpeechEmotionMetric()
    >>> metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])["ua"]
    0.75
    """

    def _info(self):
        integers = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Unweighted and weighted accuracy of speech emotion recognition.",
            citation="doi:10.1109/APSIPAASC47483.2019.9023339",
            inputs_description="predictions, references: class numbers, one per utterance",
            features=datasets.Features(integers),
        )

    def _compute(self, predictions, references, num_classes=None, label_names=None):
        if num_classes is None:
            num_classes = len(label_names) if label_names else 1 + max(max(predictions), max(references))
        names = label_names or [str(number) for number in range(num_classes)]
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} label names for {num_classes} classes")
        recalls = class_recalls(references, predictions, num_classes)
        return {
            **scores(references, predictions, num_classes),
            "recall": {name: None if np.isnan(r) else float(r) for name, r in zip(names, recalls)},
            "confusion_matrix": confusion_matrix(references, predictions, num_classes).tolist(),
        }
