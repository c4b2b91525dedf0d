"""The methods of Table II: what each starts from and what it trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..model.configuration_s2e import S2EConfig
from ..model.modeling_s2e import S2EForAudioClassification
from .recipe import Recipe


@dataclass(frozen=True)
class Method:
    """
    base: "plain" or "adapter", the kind of speaker-trained network it starts from; `from_scratch` only takes
        the front end from it.
    parts: what is trained: "shared" (the 7x7 and 3x3 filters), "alpha", "bn", "fc".
    adapter_inits: where alpha may start; the first is the default.
    """

    base: str
    parts: tuple[str, ...]
    from_scratch: bool = False
    use_shared: bool = True
    adapter_inits: tuple[str, ...] = ()

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter repo, not a full model."""
        return self.base == "adapter"

    def adapter_init(self, wanted: str | None) -> str:
        """Where alpha starts with this method and recipe; ValueError where the two do not go together."""
        if wanted is None or wanted in self.adapter_inits:
            return wanted or self.adapter_inits[0]
        why = "from zero alpha would get no gradient without the 3x3 filters" if not self.use_shared else ""
        why = why or "with this method alpha starts there by definition"
        raise ValueError(
            f"adapter_init is {wanted!r}, but must be {' or '.join(map(repr, self.adapter_inits))}: {why}."
        )


METHODS = {
    "plain": Method("plain", ("shared", "bn", "fc"), from_scratch=True),
    "feature_extractor": Method("plain", ("fc",)),
    "fine_tune": Method("plain", ("shared", "bn", "fc")),
    "residual_adapter": Method("adapter", ("alpha", "bn", "fc"), adapter_inits=("zero", "source", "kaiming")),
    # the literal reading of the paper, so that one table can show both
    "residual_adapter_source": Method("adapter", ("alpha", "bn", "fc"), adapter_inits=("source",)),
    "adapter_only": Method("adapter", ("alpha", "bn", "fc"), use_shared=False, adapter_inits=("source", "kaiming")),
    "bn_only": Method("adapter", ("bn", "fc"), adapter_inits=("source",)),
}
MAIN_METHODS = ("plain", "fine_tune", "residual_adapter")  # the paper's claim is about these
TABLE_METHODS = tuple(name for name in METHODS if name != "residual_adapter_source")


def build_model(
    method: str, base: str | None, domain: str, labels: Sequence[str], recipe: Recipe, **from_pretrained
) -> S2EForAudioClassification:
    """The network of a method before training, with exactly that method's parameters requiring a gradient.

    Args:
        method: a key of `METHODS`.
        base: folder or Hub id of the speaker-trained network; `plain` may do without.
        domain: the name of the new domain.
        labels: its classes, in the order of the logits.

    Raises:
        ValueError: an unknown method, a base of the wrong kind, or an `adapter_init` that the method cannot
            start from; the message names the remedy.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(METHODS)}.")
    chosen = METHODS[method]
    if base is None and not chosen.from_scratch:
        raise ValueError(f"{method} starts from a speaker-trained network: give --model_name_or_path.")
    init = chosen.adapter_init(recipe.adapter_init) if chosen.makes_adapter else None
    if chosen.from_scratch:
        model = S2EForAudioClassification(_plain_config(base, domain, labels, recipe, from_pretrained))
    else:
        model = S2EForAudioClassification.from_pretrained(base, **from_pretrained)
        _check_base(model.config, method, base)
        if chosen.makes_adapter:
            model.add_adapter(
                domain,
                labels,
                init=init,
                use_shared=chosen.use_shared,
                pooling=recipe.pooling,
                method=method,
            )
        else:
            model.replace_base_domain(domain, labels, pooling=recipe.pooling)
    if chosen.makes_adapter:
        model.train_adapter(domain, parts=chosen.parts)
    else:
        model.requires_grad_("shared" in chosen.parts)
        model.heads.requires_grad_(True)
        model.train()
    return model


def _plain_config(base, domain, labels, recipe, from_pretrained) -> S2EConfig:
    """A plain ResNet20 with the base's front end and widths, so that only the weights differ."""
    kept = {}
    if base is not None:
        config = S2EConfig.from_pretrained(base, **from_pretrained)
        kept = config.front_end | {"hidden_sizes": config.hidden_sizes, "depths": config.depths}
        kept |= {"shortcut": config.shortcut, "stem_kernel_size": config.stem_kernel_size}
    spec = {"labels": list(labels), "pooling": recipe.pooling, "method": "plain"}
    return S2EConfig(**kept, adapters=False, base_domain=domain, domains={domain: spec})


def _check_base(config: S2EConfig, method: str, base: str) -> None:
    wanted = METHODS[method].base
    found = "adapter" if config.adapters else "plain"
    if config.fused:
        raise ValueError(f"{base!r} is a fused model: it can only classify. Start {method} from its base.")
    if found != wanted:
        remedy = (
            "one trained with adapters (pretrain.py --adapters, or hf-s2e/s2e-resnet20-adapter)"
            if wanted == "adapter"
            else "a plain one (pretrain.py --no-adapters, or hf-s2e/s2e-resnet20-plain)"
        )
        kind = "has adapters" if found == "adapter" else "is a plain network"
        raise ValueError(f"{method} does not fit the base {base!r}, which {kind}: start from {remedy}.")
