"""The methods of Table II: what each starts from and what it trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..model.configuration_s2e import S2EConfig
from ..model.modeling_s2e import S2EForAudioClassification
from .recipe import Recipe


@dataclass(frozen=True)
class Method:
    """
    parts: what is trained: "shared" (the 7x7 and 3x3 filters), "alpha", "bn", "fc".
    makes_adapter: whether the result is an adapter repo, not a full model.
    from_scratch: only the front end and the sizes are taken from the base.
    adapter_inits: where alpha may start; the first that the base allows is the default. "source" is the base
        domain's alpha, which a plain base does not have.
    """

    parts: tuple[str, ...]
    makes_adapter: bool = False
    from_scratch: bool = False
    use_shared: bool = True
    adapter_inits: tuple[str, ...] = ()

    def adapter_init(self, wanted: str | None, base: S2EConfig) -> str:
        """Where alpha starts with this method, recipe and base; ValueError where they do not go together."""
        possible = [start for start in self.adapter_inits if base.adapters or start != "source"]
        if "alpha" not in self.parts and not possible:
            possible = ["zero"]  # what is kept of a network without alpha
        if not possible:
            raise ValueError(
                "alpha is to start as the base domain's, but the base is a plain network: start from one that was "
                "trained with adapters (pretrain.py --adapters)."
            )
        if wanted is None or wanted in possible:
            return wanted or possible[0]
        why = "from zero alpha would get no gradient without the 3x3 filters" if not self.use_shared else ""
        why = why or "with this method and base alpha starts there by definition"
        raise ValueError(f"adapter_init is {wanted!r}, but must be {' or '.join(map(repr, possible))}: {why}.")


METHODS = {
    "plain": Method(("shared", "bn", "fc"), from_scratch=True),
    "feature_extractor": Method(("fc",)),
    "fine_tune": Method(("shared", "bn", "fc")),
    "residual_adapter": Method(("alpha", "bn", "fc"), makes_adapter=True, adapter_inits=("zero", "source", "kaiming")),
    # the literal reading of the paper, so that one table can show both
    "residual_adapter_source": Method(("alpha", "bn", "fc"), makes_adapter=True, adapter_inits=("source",)),
    "adapter_only": Method(
        ("alpha", "bn", "fc"), makes_adapter=True, use_shared=False, adapter_inits=("source", "kaiming")
    ),
    "bn_only": Method(("bn", "fc"), makes_adapter=True, adapter_inits=("source",)),
}
MAIN_METHODS = ("plain", "fine_tune", "residual_adapter")  # the paper's claim is about these
TABLE_METHODS = tuple(name for name in METHODS if name != "residual_adapter_source")


def check_method(method: str, base: str | None) -> None:
    """ValueError unless there is such a method, and a base where it needs one."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(METHODS)}.")
    if base is None and not METHODS[method].from_scratch:
        raise ValueError(f"{method} starts from a speaker-trained network: give --model_name_or_path.")


def build_model(
    method: str, base: str | None, domain: str, labels: Sequence[str], recipe: Recipe, **from_pretrained
) -> S2EForAudioClassification:
    """The network of a method before training, with exactly that method's parameters requiring a gradient.

    One base serves all methods: with alpha at zero a plain network is the same function, and where the filters
    themselves learn, a base's own alpha is added to them first.

    Args:
        method: a key of `METHODS`.
        base: folder or Hub id of the speaker-trained network; `plain` may do without.
        domain: the name of the new domain.
        labels: its classes, in the order of the logits.

    Raises:
        ValueError: an unknown method, no base or a fused one, or an `adapter_init` that the method cannot start
            from; the message names the remedy.
    """
    check_method(method, base)
    chosen = METHODS[method]
    if chosen.from_scratch:
        model = S2EForAudioClassification(_plain_config(base, domain, labels, recipe, from_pretrained))
    else:
        model = S2EForAudioClassification.from_pretrained(base, **from_pretrained)
        if model.config.fused:
            raise ValueError(f"{base!r} is a fused model: it can only classify. Start {method} from its base.")
        for name in model.adapter_names:  # of other domains, resident in the base
            model.delete_adapter(name)
    model.keep_statistics = recipe.bn_statistics == "source" and not chosen.from_scratch
    if chosen.makes_adapter:
        init = chosen.adapter_init(recipe.adapter_init, model.config)
        options = {"use_shared": chosen.use_shared, "pooling": recipe.pooling, "head": recipe.head, "method": method}
        model.add_adapter(domain, labels, init=init, adapt_from=recipe.adapt_from, **options)
        model.heads[domain].dropout = recipe.dropout
        model.train_adapter(domain, parts=chosen.parts)
        return model
    if not chosen.from_scratch:
        model.merge_base_adapter()
        model.replace_base_domain(domain, labels, pooling=recipe.pooling, head=recipe.head)
    model.heads[domain].dropout = recipe.dropout
    model.requires_grad_("shared" in chosen.parts)
    model.heads.requires_grad_(True)
    return model.train()


def _plain_config(base, domain, labels, recipe, from_pretrained) -> S2EConfig:
    """A plain network with the base's front end and sizes, so that only the weights differ."""
    kept = {}
    if base is not None:
        config = S2EConfig.from_pretrained(base, **from_pretrained)
        sizes = ("backbone", "hidden_sizes", "depths", "shortcut", "stem_kernel_size")
        kept = config.front_end | {name: getattr(config, name) for name in sizes}
    spec = {"labels": list(labels), "pooling": recipe.pooling, "head": recipe.head, "method": "plain"}
    return S2EConfig(**kept, adapters=False, base_domain=domain, domains={domain: spec})
