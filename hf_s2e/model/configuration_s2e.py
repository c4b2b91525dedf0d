"""Configuration of the residual-adapter ResNet20 and of its front end.

The defaults are those of Xi et al., "Speaker to Emotion: Domain Adaptation for Speech Emotion Recognition
with Residual Adapters" (APSIPA ASC 2019): section IV-A for the front end, Table I for the network.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

# Settings of the front end (section IV-A). They belong to the network: an adapter trained on other
# spectrograms is useless, so they are part of the base's fingerprint, and `preprocessor_config.json` is
# written from them.
FRONT_END_DEFAULTS: dict[str, Any] = {
    "sampling_rate": 16_000,  # Hz
    "window_length": 640,  # samples: 40 ms, Hamming
    "hop_length": 160,  # samples: 10 ms
    "n_fft": 1600,  # points: bins of 10 Hz
    "num_bins": 400,  # bins kept from 0 Hz: 0-4 kHz
    "segment_length": 32_000,  # samples: 2 s, 200 frames
    "segment_hop": 16_000,  # samples: 1 s overlap
    "mu": 255.0,
    "normalization": "segment",
    "drop_tail": False,
    "features": "mu_law_spectrogram",
    "fill": "zero",
    "remove_dc": False,
}
# Kaldi's log mel energies, as CAM++ takes them; `num_bins` are mel bands from 20 Hz to 8 kHz
FBANK_DEFAULTS: dict[str, Any] = {
    "window_length": 400,  # samples: 25 ms
    "n_fft": 512,
    "num_bins": 80,
    "features": "fbank",
    "fill": "repeat",
}
FEATURES = {"mu_law_spectrogram": {}, "fbank": FBANK_DEFAULTS}  # what differs from the defaults
FILLS = ("zero", "repeat")
# The backbones: their features, and the sizes that they have by default
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet20": {"features": "mu_law_spectrogram", "hidden_sizes": (32, 64, 128), "depths": (3, 3, 3)},
    "campplus": {"features": "fbank", "hidden_sizes": (32, 128, 32), "depths": (12, 24), "adapters": False},
}
# The settings that the first fingerprints were made of. Never to be changed: published adapters hold those.
FIRST_SETTINGS = (
    *("sampling_rate", "window_length", "hop_length", "n_fft", "num_bins", "segment_length", "segment_hop"),
    *("mu", "normalization", "drop_tail"),
)
BATCH_NORM_EPS = 1e-5
NORMALIZATIONS = ("segment", "utterance", "none")
SHORTCUTS = ("pool", "projection")
AGGREGATIONS = ("mean", "geometric", "max")
POOLINGS = ("mean", "mean_std")
HEADS = ("linear", "standardized")
ADAPT_FROM = ("tdnn", "head")  # where a domain's half of campplus begins
# Where a repo's own code is, for those who load it with trust_remote_code=True
AUTO_MAP = {
    "AutoConfig": "configuration_s2e.S2EConfig",
    "AutoModel": "modeling_s2e.S2EModel",
    "AutoModelForAudioClassification": "modeling_s2e.S2EForAudioClassification",
}
BASE_DOMAIN = "speaker"
# What the config of an adapter repo says beside the base's own settings; a base's config has none of these.
ADAPTER_FIELDS = (
    "adapter_name",
    "adapter_sha256",
    "method",
    "use_shared",
    "pooling",
    "adapter_kind",
    "adapter_options",
    "adapt_from",
    "head",
    "base_model_name_or_path",
    "base_model_revision",
    "base_local_path",
    "base_fingerprint",
)
# Those of them that are the settings of its domain
DOMAIN_FIELDS = ("method", "use_shared", "pooling", "adapter_kind", "adapter_options", "adapt_from", "head")
_TYPES = {"use_shared": bool, "adapter_options": dict}  # of the fields of an adapter; the others are text
_BASE_FIELDS = ("domains", "base_domain", "active_domain", "repo_id")  # and these are only a base's
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a key of nn.ModuleDict, and safe in any path
NAME_RULE = "expected 1 to 64 letters, digits, '-' or '_', beginning with a letter or digit"
MAX_LABELS = 10_000
MAX_SIZE = 10_000_000  # of any whole number here; a config from the Hub cannot ask for more
MAX_NUMBER = 1e300  # of any other number
MAX_BLOCKS = 100  # of a stage
MAX_DOMAINS = 1_000  # of a base


class S2EConfig(PretrainedConfig):
    """Configuration of [`S2EModel`] and [`S2EForAudioClassification`].

    A model holds one shared network and any number of *domains*: a domain is everything that one corpus owns,
    that is its adapters (alpha), its batch norms and its classifier. `domains` maps each domain's name to
    `{"labels": [...], "use_shared": bool, "pooling": str, "method": str, "adapter_kind": str, "adapter_options":
    dict}`, where what is left out has its default (see `add_adapter`). The domain the network itself was
    trained on is `base_domain`; `id2label` and `num_labels` always describe the active domain, whose entry
    has no `labels` of its own (`labels_of` answers for each).

    Args:
        backbone: `"resnet20"`, the paper's, or `"campplus"`; the features follow from it.
        hidden_sizes: of the ResNet20 the width of each stage, which its last convolution doubles; of CAM++ see
            `S2ECampPlus`.
        depths: number of basic blocks in each stage; of layers in each dense block.
        adapters: whether the convolutions of the base domain have parallel adapters. `False` is the plain ResNet20;
            the domains that are added to it have theirs.
        adapt_stem: give the 7x7 convolution an adapter too.
        shortcut: `"pool"` (2x2 average pooling and zero channels) or `"projection"` (1x1 stride-2
            convolution, shared and frozen like the 3x3 filters, with the domain's batch norm) where width and
            stride change.
        aggregation: how the segments' posteriors become the utterance's: `"mean"`, `"geometric"` or `"max"`.
        domains, base_domain, active_domain: see above. Without `domains` there is one, the base domain, with
            the labels of `id2label` or `num_labels`.
        fused: adapter and batch norm are folded into the convolutions (see `fuse`).
        repo_id: the Hub id under which this base is published.
        adapter_name, adapter_sha256, method, use_shared, pooling, adapter_kind, adapter_options, adapt_from, head:
            set in the config of an adapter repo only; they describe its one domain (its labels are `id2label`).
        base_model_name_or_path, base_model_revision, base_local_path, base_fingerprint: likewise; they say
            which base the adapter needs.
        **kwargs: front-end settings (`sampling_rate`, `window_length`, `hop_length`, `n_fft`, `num_bins`,
            `segment_length`, `segment_hop`, `mu`, `normalization`, `drop_tail`, `fill`, `remove_dc`) and whatever
            `PretrainedConfig` takes.

    Raises:
        ValueError: a setting has a value that the network or the front end cannot have.

    Example:
        >>> config = S2EConfig(num_labels=250)  # the paper's network, trained on 250 speakers
        >>> config.frames_per_segment, config.num_bins, config.embedding_size
        (200, 400, 256)
        >>> S2EConfig(id2label={0: "calm", 1: "upset"}, num_bins=80).labels_of("speaker")
        ['calm', 'upset']
        >>> S2EConfig(segment_hop=100)
        Traceback (most recent call last):
        ValueError: segment_length=32000 and segment_hop=100 must be multiples of hop_length=160, ...
    """

    model_type = "s2e"
    # so that Trainer's predictions are the logits alone
    keys_to_ignore_at_inference = ["segment_logits", "embeddings", "row_labels"]  # noqa: RUF012
    _auto_class = "AutoConfig"

    def __init__(
        self,
        *,
        backbone: str = "resnet20",
        hidden_sizes: list[int] | None = None,
        depths: list[int] | None = None,
        stem_kernel_size: int = 7,
        adapters: bool | None = None,
        adapt_stem: bool = False,
        shortcut: str = "pool",
        aggregation: str = "mean",
        batch_norm_eps: float = BATCH_NORM_EPS,
        batch_norm_momentum: float = 0.1,
        domains: dict[str, dict[str, Any]] | None = None,
        base_domain: str = BASE_DOMAIN,
        active_domain: str | None = None,
        fused: bool = False,
        repo_id: str | None = None,
        adapter_name: str | None = None,
        adapter_sha256: str | None = None,
        method: str | None = None,
        use_shared: bool | None = None,
        pooling: str | None = None,
        adapter_kind: str | None = None,
        adapter_options: dict[str, Any] | None = None,
        adapt_from: str | None = None,
        head: str | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_local_path: str | None = None,
        base_fingerprint: str | None = None,
        **kwargs,
    ):
        _one_of("backbone", backbone, tuple(BACKBONES))
        usual = BACKBONES[backbone]
        settings = front_end_settings({"features": usual["features"], **kwargs})
        for name, value in settings.items():
            setattr(self, name, value)
            kwargs.pop(name, None)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.backbone = backbone
        self.hidden_sizes = _sizes("hidden_sizes", hidden_sizes or usual["hidden_sizes"])
        self.depths = _sizes("depths", depths or usual["depths"])
        self.stem_kernel_size = stem_kernel_size
        self.adapters = usual.get("adapters", True) and not fused if adapters is None else adapters
        self.adapt_stem = adapt_stem
        self.shortcut = shortcut
        self.aggregation = aggregation
        self.batch_norm_eps = batch_norm_eps
        self.batch_norm_momentum = batch_norm_momentum
        self.fused = fused
        self.repo_id = repo_id
        self.adapter_name = adapter_name
        self.adapter_sha256 = adapter_sha256
        self.method = method
        self.use_shared = use_shared
        self.pooling = pooling
        self.adapter_kind = adapter_kind
        self.adapter_options = adapter_options
        self.adapt_from = adapt_from
        self.head = head
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_local_path = base_local_path
        self.base_fingerprint = base_fingerprint
        if self.is_adapter:  # the fields above are its one domain
            base_domain = active_domain = adapter_name or BASE_DOMAIN
            settings = {name: getattr(self, name) for name in DOMAIN_FIELDS}
            domains = {base_domain: {name: value for name, value in settings.items() if value is not None}}
        self.base_domain = base_domain
        self.active_domain = active_domain or base_domain
        self.domains = domains or {self.base_domain: {}}
        self._validate(kwargs)
        self.domains = {name: dict(spec) for name, spec in self.domains.items()}
        labels = self.domains[self.active_domain].pop("labels", None)
        if labels and "id2label" not in kwargs and "num_labels" not in kwargs:
            kwargs.update(label_maps(labels))
        super().__init__(**kwargs)
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"id2label numbers the classes {sorted(self.id2label)!r:.100}, but must count from 0.")

    def _validate(self, kwargs: Mapping[str, Any]) -> None:
        validate_front_end(self.front_end)
        _one_of("shortcut", self.shortcut, SHORTCUTS)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _whole("stem_kernel_size", self.stem_kernel_size)
        if not _is_number(self.batch_norm_eps) or self.batch_norm_eps <= 0:
            raise ValueError(f"batch_norm_eps is {self.batch_norm_eps!r:.100}, but must be a finite number above 0.")
        if self.stem_kernel_size % 2 == 0:
            raise ValueError(f"stem_kernel_size is {self.stem_kernel_size}, but must be odd: alpha is its centre tap.")
        if max(self.depths) > MAX_BLOCKS:
            raise ValueError(f"depths={self.depths}: a stage may have {MAX_BLOCKS} blocks at most.")
        if self.features != BACKBONES[self.backbone]["features"]:
            raise ValueError(
                f"features is {self.features!r}, but the backbone {self.backbone!r} takes "
                f"{BACKBONES[self.backbone]['features']!r}."
            )
        if self.backbone == "campplus":
            self._validate_campplus()
        elif len(self.depths) != len(self.hidden_sizes):
            raise ValueError(f"depths={self.depths} and hidden_sizes={self.hidden_sizes} must have one entry a stage.")
        elif any(wide != 2 * narrow for narrow, wide in zip(self.hidden_sizes, self.hidden_sizes[1:])):
            raise ValueError(f"hidden_sizes={self.hidden_sizes}: each stage must be twice as wide as the one before.")
        if self.fused and self.adapters:
            raise ValueError("fused=True goes with adapters=False: a fused network has no adapters any more.")
        for name in ADAPTER_FIELDS:
            expected = _TYPES.get(name, str)
            if not isinstance(getattr(self, name), expected | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be a {expected.__name__}.")
        self._validate_domains()
        count = kwargs.get("num_labels")
        if count is not None and not 1 <= count <= MAX_LABELS:
            raise ValueError(f"num_labels is {count}, but must be 1 to {MAX_LABELS}.")

    def _validate_campplus(self) -> None:
        if len(self.hidden_sizes) != 3:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes}: campplus has three, the channels of its first part, of the "
                "convolution after it, and of what each layer of a dense block adds."
            )
        if self.num_bins % 8:
            raise ValueError(f"num_bins is {self.num_bins}, but must be a multiple of 8, by which campplus divides it.")
        _, width, growth = self.hidden_sizes
        for depth in self.depths:
            if (width + growth * depth) % 2:
                raise ValueError(
                    f"hidden_sizes={self.hidden_sizes}, depths={self.depths}: a dense block must end in an even number "
                    "of channels, which are halved after it."
                )
            width = (width + growth * depth) // 2
        for name in ("adapt_stem", "adapters"):
            if getattr(self, name):
                raise ValueError(f"{name}=True is of the ResNet20: the domains that are added to campplus are adapted.")

    def _validate_domains(self) -> None:
        if not isinstance(self.domains, Mapping) or not all(isinstance(s, Mapping) for s in self.domains.values()):
            raise ValueError(f"domains is {self.domains!r:.200}, but must map names to their settings.")
        for what in ("base_domain", "active_domain"):
            if getattr(self, what) not in self.domains:
                raise ValueError(f"{what} {getattr(self, what)!r} is not among the domains {sorted(self.domains)}.")
        if len(self.domains) > MAX_DOMAINS:
            raise ValueError(f"domains has {len(self.domains)} entries, but a base may have {MAX_DOMAINS} at most.")
        for name, spec in self.domains.items():
            if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r:.100} cannot be a domain's name: {NAME_RULE}.")
            _one_of(f"pooling of domain {name!r}", spec.get("pooling", "mean"), POOLINGS)
            _one_of(f"adapt_from of domain {name!r}", spec.get("adapt_from", "tdnn"), ADAPT_FROM)
            _one_of(f"head of domain {name!r}", spec.get("head", "linear"), HEADS)
            if not isinstance(spec.get("use_shared", True), bool):
                raise ValueError(f"use_shared of domain {name!r} is {spec['use_shared']!r}, but must be a bool.")
            labels = spec.get("labels", [])
            if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
                raise ValueError(f"labels of domain {name!r} are {labels!r:.100}, but must be a list of names.")
            if "labels" not in spec and name != self.active_domain:
                raise ValueError(f"domain {name!r} has no labels; only the active domain's are in id2label.")

    @property
    def is_adapter(self) -> bool:
        """Whether this is the config of an adapter repo."""
        return self.adapter_sha256 is not None or self.base_model_name_or_path is not None

    @property
    def front_end(self) -> dict[str, Any]:
        """The settings of the front end, as [`S2EFeatureExtractor`] takes them."""
        return {name: getattr(self, name) for name in FRONT_END_DEFAULTS}

    @property
    def fingerprinted(self) -> dict[str, Any]:
        """The settings that are part of the base's fingerprint beside its shared filters.

        These are the front end's first settings always, and any later one only where it is not at its default, so
        that a setting which comes new into the package leaves the fingerprint of every base as it is.
        """
        settings = self.front_end
        later = {name: value for name, value in settings.items() if value != FRONT_END_DEFAULTS[name]}
        if self.batch_norm_eps != BATCH_NORM_EPS:
            later["batch_norm_eps"] = self.batch_norm_eps
        return {name: settings[name] for name in FIRST_SETTINGS} | later

    @property
    def frames_per_segment(self) -> int:
        """Frames of features in a segment (200: 2 s at a 10 ms shift; 198 of fbank, which has whole windows only)."""
        return frames_of(self.front_end)

    @property
    def embedding_size(self) -> int:
        """Channels after the last stage (256; 512 of campplus)."""
        if self.backbone == "resnet20":
            return 2 * self.hidden_sizes[-1]
        _, width, growth = self.hidden_sizes
        for depth in self.depths:
            width = (width + growth * depth) // 2
        return width

    def adapted(self, domain: str) -> bool:
        """Whether a domain has adapters: all have that were added to a base, its own only if it was trained so."""
        return not self.fused and (self.adapters or self.is_adapter or domain != self.base_domain)

    def labels_of(self, domain: str) -> list[str]:
        """The class names of a domain, in the order of its logits."""
        if domain == self.active_domain:  # id2label is what users and transformers change
            return [self.id2label[i] for i in range(self.num_labels)]
        return list(self.domains[domain]["labels"])

    def activate(self, domain: str) -> None:
        """Make `id2label`, `label2id` and `num_labels` describe `domain`."""
        if domain == self.active_domain:
            return
        self.domains[self.active_domain]["labels"] = self.labels_of(self.active_domain)
        maps = label_maps(self.domains[domain].pop("labels"))
        self.id2label, self.label2id = maps["id2label"], maps["label2id"]
        self.active_domain = domain

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; an adapter's config says each thing once, a base's has no adapter fields."""
        output = super().to_dict()
        unused = _BASE_FIELDS if self.is_adapter else ADAPTER_FIELDS
        for name in unused:
            output.pop(name, None)
        return output


def front_end_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a front end: those that are given, and the defaults of its features for the others.

    Raises:
        ValueError: features that are not known.
    """
    features = given.get("features", FRONT_END_DEFAULTS["features"])
    _one_of("features", features, tuple(FEATURES))
    defaults = FRONT_END_DEFAULTS | FEATURES[features]
    return {name: given.get(name, default) for name, default in defaults.items()}


def frames_of(settings: Mapping[str, Any]) -> int:
    """Frames in a segment."""
    length, hop = settings["segment_length"], settings["hop_length"]
    if settings["features"] == "fbank":  # whole windows only, as Kaldi has them
        return 1 + (length - settings["window_length"]) // hop
    return length // hop


def validate_front_end(settings: Mapping[str, Any]) -> None:
    """Check the settings of a front end.

    Raises:
        ValueError: a value that it cannot have, or two that do not go together.
    """
    for name in ("window_length", "hop_length", "n_fft", "num_bins", "segment_length", "segment_hop"):
        _whole(name, settings[name])
    if settings["sampling_rate"] != FRONT_END_DEFAULTS["sampling_rate"]:
        raise ValueError(
            f"sampling_rate is {settings['sampling_rate']!r:.100}, but must be "
            f"{FRONT_END_DEFAULTS['sampling_rate']} Hz: every sound is brought to that rate."
        )
    _one_of("normalization", settings["normalization"], NORMALIZATIONS)
    _one_of("features", settings["features"], tuple(FEATURES))
    _one_of("fill", settings["fill"], FILLS)
    if settings["features"] == "fbank" and settings["normalization"] == "utterance":
        raise ValueError("normalization is 'utterance', but fbank takes 'segment' (the mean over it) or 'none'.")
    window, hop, n_fft, bins = (settings[n] for n in ("window_length", "hop_length", "n_fft", "num_bins"))
    length, step, mu = (settings[n] for n in ("segment_length", "segment_hop", "mu"))
    if window > settings["segment_length"]:
        raise ValueError(f"window_length={window} must be at most segment_length={settings['segment_length']}.")
    if window > n_fft or bins > n_fft // 2 + 1:
        raise ValueError(
            f"n_fft={n_fft} is too small for window_length={window} and num_bins={bins}: it must be at least "
            "the window and at least 2 (num_bins - 1)."
        )
    if length % hop or step % hop:
        raise ValueError(
            f"segment_length={length} and segment_hop={step} must be multiples of hop_length={hop}, so that "
            "segments begin on a frame."
        )
    if step > length:
        raise ValueError(f"segment_hop={step} must be at most segment_length={length}: no sample may be skipped.")
    if not _is_number(mu) or not 0 < mu < MAX_SIZE:
        raise ValueError(f"mu is {mu!r}, but must be a positive number.")
    for name in ("drop_tail", "remove_dc"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} is {settings[name]!r:.100}, but must be true or false.")
    if settings["remove_dc"] and settings["features"] == "fbank":
        raise ValueError("remove_dc is true, but fbank takes the mean of each frame away already: leave it out.")


def label_maps(labels: list[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of class names in the order of the logits."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r:.100}, but must be one of {', '.join(map(repr, allowed))}.")


def _sizes(name: str, sizes: Any) -> list[int]:
    if not isinstance(sizes, list | tuple):
        raise ValueError(f"{name} is {sizes!r:.100}, but must be a list with one entry a stage.")
    for size in sizes:
        _whole(f"an entry of {name}", size)
    return list(sizes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
        raise ValueError(f"{name} is {value!r:.100}, but must be a positive whole number, at most {MAX_SIZE}.")
