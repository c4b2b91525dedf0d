"""Figures: confusion matrix, methods with error bars, and what the leakage audit saw.

Needs matplotlib (`pip install 'hf-s2e[plots]'`). The kind of file follows the path's ending (png, pdf, svg).
"""

import numpy as np

from .reports import origin

UA_COLOUR, WA_COLOUR, GREY = "#1b6ca8", "#9ec5e3", "#8a8a8a"
MAX_COLOURS = 20  # classes that can be told apart
MAX_NAMED = 40  # speakers whose names still fit on an axis


def plot_confusion(matrix, classes, path, *, title=""):
    """Rows are true labels: the share of each in percent by colour and number, the count on the axis.

    matrix: counts (classes, classes), e.g. `summary["methods"][name]["confusion"]`.
    """
    matrix = np.asarray(matrix)
    if matrix.shape != (len(classes), len(classes)):
        raise ValueError(f"a matrix of shape {matrix.shape} for {len(classes)} classes")
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 2.2 + 0.62 * len(classes)
    figure, axes = _figure(size + 0.6, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 55 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), [f"{name} ({n})" for name, n in zip(classes, matrix.sum(1))])
    axes.set(xlabel="predicted", ylabel="true (count)", title=title)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class, %")
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_bars(summary, path, *, title=None):
    """UA and WA of a summary's methods and, hatched, of its references; 95 % intervals where they are known."""
    methods, references = summary["methods"], summary["references"]
    names = [*methods, *(f"{name}\n({origin(reference)})" for name, reference in references.items())]
    figure, axes = _figure(7.5, 1.6 + 0.62 * len(names))
    rows = np.arange(len(names))
    for key, offset, colour in (("ua", -0.19, UA_COLOUR), ("wa", 0.19, WA_COLOUR)):
        means = [m[f"{key}_mean"] for m in methods.values()]
        means += [reference.get(key) or np.nan for reference in references.values()]
        ends = [one.get(f"{key}_ci95", (np.nan, np.nan)) for one in (*methods.values(), *references.values())]
        means, ends, places = np.array(means), np.array(ends).T, rows + offset
        own, others = np.split(np.arange(len(names)), [len(methods)])
        axes.barh(places[own], means[own], 0.36, color=colour, label=key.upper())
        hatched = {"alpha": 0.6, "hatch": "///", "edgecolor": "white"}
        axes.barh(places[others], means[others], 0.36, color=colour, **hatched)
        whiskers = np.abs(ends - means)
        axes.errorbar(means, places, xerr=whiskers, fmt="none", ecolor="black", capsize=3, lw=1)
        for place, mean, end in zip(places, means, np.fmax(means, ends[1])):
            if not np.isnan(mean):
                axes.text(end + 0.8, place, f"{mean:.1f}", va="center", fontsize=8)
    chance = 100 / len(summary["classes"])
    axes.axvline(chance, color=GREY, ls=":", lw=1, label="chance (UA)")
    axes.set_yticks(rows, names)
    axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.65), xlabel="%, with 95 % interval")
    protocol = summary["protocol"]
    warning = "" if protocol["speaker_disjoint"] else ", NOT speaker-disjoint"
    axes.set_title(title or f"{summary['corpus']}, {protocol['name']}{warning}", loc="left", pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_audit(report, path, *, title=""):
    """A report of `hf_s2e.evaluation.audit.audit`: durations, speakers by class, and what predicts the label alone."""
    counts = report["counts"]
    figure, (left, middle, right) = _figure(15, 4.6, panels=3, ratios=(1.2, 1.2, 1))
    classes = [name for name, number in counts["classes"].items() if number]
    if "duration_s" in counts:
        _duration_panel(left, counts["duration_s"], classes)
    _speaker_panel(middle, counts["speakers"], classes)
    _accuracy_panel(right, counts)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    kinds = sorted({finding["kind"] for finding in report["findings"]})
    found = f"findings: {', '.join(kinds) or 'none'}"
    figure.suptitle(f"{title}, {found}" if title else found, fontsize=11)
    figure.savefig(path, dpi=150)


def _duration_panel(axes, durations, classes):
    from matplotlib import colormaps

    edges, heights = np.array(durations["histogram_edges"]), durations["histogram"]
    if len(classes) > MAX_COLOURS:
        heights = {"all": np.sum(list(heights.values()), axis=0)}
    colours = colormaps["tab20" if len(heights) > 10 else "tab10"]
    below = np.zeros(len(edges) - 1)
    for number, (name, of_class) in enumerate(heights.items()):
        look = {"align": "edge", "color": colours(number), "label": name or "no label"}
        axes.bar(edges[:-1], of_class, np.diff(edges), bottom=below, **look)
        below += of_class
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="duration, s", ylabel="files", title="Durations")


def _speaker_panel(axes, speakers, classes):
    axes.set_title("Utterances by speaker and class")
    if not speakers:
        axes.text(0.5, 0.5, "no speaker ids", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    table = np.array([[labels.get(name, 0) for name in classes] for labels in speakers.values()])
    image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
    axes.set_xticks([])
    axes.set_yticks([])
    if len(classes) <= MAX_COLOURS:
        axes.set_xticks(range(len(classes)), classes, **slanted)
    if len(speakers) <= MAX_NAMED:
        axes.set_yticks(range(len(speakers)), speakers, fontsize=8 if len(speakers) <= 20 else 6)
    axes.set(xlabel=f"{len(classes)} classes", ylabel=f"{len(speakers)} speakers")


def _accuracy_panel(axes, counts):
    bars = {
        "speaker,\nrandom split": counts.get("ua_by_speaker"),
        "speaker,\nprotocol": counts.get("ua_by_speaker_in_protocol"),
        "duration": counts.get("ua_by_duration"),
    }
    bars = {name: value for name, value in bars.items() if value is not None}
    axes.set_title("Trivial baselines")
    if not bars:
        axes.text(0.5, 0.5, "does not apply", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    places = axes.bar(list(bars), list(bars.values()), 0.6, color=UA_COLOUR)
    axes.bar_label(places, fmt="%.1f", padding=2)
    axes.axhline(counts["chance_ua"], color="black", ls=":", lw=1, label="chance")
    axes.legend(frameon=False, fontsize=8)
    axes.set(ylim=(0, 105), ylabel="UA, %")


def _figure(width, height, panels=1, ratios=None):
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing kept open

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    return figure, figure.subplots(1, panels, width_ratios=ratios)
