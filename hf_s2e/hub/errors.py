"""What the Hub answers, as one line that says what to do.

Tokens come from where huggingface_hub looks for them (`hf auth login`, HF_TOKEN) or from a `token=` argument;
they are handed on to it and neither printed nor written.
"""

import contextlib

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..model.adapter_files_s2e import httpx

_FAILURES = (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError)


class S2EHubError(OSError):
    """The Hub refused, or could not be reached; one line that says what to do."""


@contextlib.contextmanager
def asking_the_hub(doing: str):
    """Turn what huggingface_hub raises inside into one line that begins with `doing`."""
    try:
        yield
    except (*_FAILURES, RuntimeError) as error:  # an upload's failure comes wrapped in a RuntimeError
        failure = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(failure, _FAILURES):
            raise
        raise S2EHubError(f"{doing}: {_reason(failure)}") from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return "the repo is gated; ask for access on its page, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repo, or it is private; `hf auth login` as one who may see it."
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such branch, tag or commit."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "the Hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not hold it."
    if status == 401:
        return "the Hub does not accept the token, or there is none: `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the token may not do that: log in with one that may write to this namespace."
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{said.rstrip('.')}; try again, what is finished is not sent twice."
