"""Many domains from one resident network: the adapters used last stay in memory, the others are let go."""

import contextlib
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

Source = str | tuple[str, str] | None  # a repo, a repo and its revision, or None for the base itself


class AdapterCache:
    """A bounded set of adapters over one base, for a server with more domains than it wants in memory.

    Only one thread at a time is inside `resident`, so that no adapter is let go while a batch is using it:
    collect what arrives into mixed batches rather than calling from many threads. Adapters that were loaded
    in other ways are neither counted nor touched. A repo without a revision is fetched when it is first
    needed, and not asked again for newer versions while it stays in memory.

    Args:
        model: an `S2EForAudioClassification` with adapters.
        max_adapters: how many this cache keeps; each takes about 0.64 MB at fp32.
        **fetching: `cache_dir`, `local_files_only`, `token`, as `model.load_adapter` takes them.

    Raises:
        ValueError: max_adapters is less than 1.

    Example:
        >>> import torch
        >>> from hf_s2e import S2EConfig, S2EForAudioClassification
        >>> model = S2EForAudioClassification(S2EConfig()).eval()
        >>> for name in ("calls", "radio"):  # two repos; Hub ids and ("me/s2e-calls", "v2") do as well
        ...     model.add_adapter(name, labels=["calm", "upset"])
        ...     model.save_adapter(f"s2e-{name}", name)
        ...     model.delete_adapter(name)
        >>> cache = AdapterCache(model, max_adapters=1)
        >>> with cache.resident(["s2e-calls", None, "s2e-calls"]) as names, torch.inference_mode():
        ...     logits = model(torch.rand(3, 400, 200), adapter_names=names).logits
        >>> "s2e-calls" in cache
        True
        >>> with cache.resident(["s2e-radio"]):  # which takes the place of the other
        ...     "s2e-calls" in cache, "s2e-radio" in cache
        (False, True)
    """

    def __init__(self, model: Any, max_adapters: int = 100, **fetching):
        if max_adapters < 1:
            raise ValueError(f"max_adapters is {max_adapters}, but must be at least 1.")
        self.model, self.max_adapters = model, max_adapters
        self._fetching = fetching
        self._names: OrderedDict[tuple[str, str | None], str] = OrderedDict()  # used longest ago first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, source: Source) -> bool:
        return _key(source) in self._names

    @contextlib.contextmanager
    def resident(self, sources: Iterable[Source]) -> Iterator[list[str | None]]:
        """Have these adapters in memory inside the block.

        Args:
            sources: one for each row of a batch; folders or Hub ids, with or without a revision.

        Returns:
            What `model(adapter_names=)` takes: the name of each row's adapter, None for the base.

        Raises:
            ValueError: more different adapters than the cache may hold.
            S2EAdapterError: one cannot be loaded; those that were asked for before it are.
        """
        keys = [_key(source) for source in sources]
        needed = list(dict.fromkeys(key for key in keys if key is not None))
        if len(needed) > self.max_adapters:
            raise ValueError(
                f"{len(needed)} different adapters in one batch, but max_adapters is {self.max_adapters}: "
                "split the batch, or raise it."
            )
        with self._lock:
            for key, name in list(self._names.items()):
                if name not in self.model.config.domains:  # deleted by somebody else
                    del self._names[key]
            for key in needed:  # first, so that none of them is let go for another
                if key in self._names:
                    self._names.move_to_end(key)
            for key in needed:
                if key not in self._names:
                    self._load(key)
            yield [None if key is None else self._names[key] for key in keys]

    def _load(self, key: tuple[str, str | None]) -> None:
        while len(self._names) >= self.max_adapters:
            _, name = self._names.popitem(last=False)
            self.model.delete_adapter(name)
        active = self.model.config.active_domain
        source, revision = key
        self._names[key] = self.model.load_adapter(source, _name(key), revision, **self._fetching)
        self.model.set_adapter(active)  # loading made the new one the active one


def _key(source: Source) -> tuple[str, str | None] | None:
    if source is None:
        return None
    repo, revision = source if isinstance(source, tuple) else (source, None)
    return str(repo), revision


def _name(key: tuple[str, str | None]) -> str:
    """A name that an adapter can have, readable and different for each repo and revision."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", key[0].rstrip("/").rpartition("/")[2])[:40].lstrip("-_")
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    return f"{readable or 'adapter'}-{digest}"
