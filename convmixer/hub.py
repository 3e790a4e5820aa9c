"""Files from the Hugging Face Hub: the only import of huggingface_hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from convmixer.errors import WeightsError


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    prefer_cache: bool = False,
) -> Path:
    """The local path of a file of a Hub repository, downloaded unless the Hub's own cache has it.

    Args:
        repo_id: "owner/name".
        filename: Path inside the repository.
        revision: Branch, tag or commit; the default branch if None.
        cache_dir: In place of the Hub's own cache folder.
        token: Access token; by default the one that `hf auth login` stored.
        local_files_only: Never touch the network. `HF_HUB_OFFLINE=1` does the same for the whole process.
        prefer_cache: Take a cached file without asking the Hub whether its branch has moved on.

    Raises:
        WeightsError: The file cannot be had; the text says which one and how to get it.
    """
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        if prefer_cache or offline:
            cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
        if not offline:
            return Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir, token=token))
    except Exception as error:  # the client's HTTP library has its own errors, and differs between versions
        reason = " ".join(str(error).split())  # the Hub's texts have several lines
        raise WeightsError(f"cannot get {_describe(repo_id, filename, revision)}: {reason}") from error
    where = f" in {str(cache_dir)!r}" if cache_dir else ""
    option = f" --revision {shlex.quote(revision)}" if revision else ""
    option += f" --cache-dir {shlex.quote(str(cache_dir))}" if cache_dir else ""
    raise WeightsError(
        f"{_describe(repo_id, filename, revision)} is not in the local cache{where}, and the network is off "
        f"({'local_files_only=True' if local_files_only else 'HF_HUB_OFFLINE'}). Where there is a network, run: "
        f"hf download {repo_id} {filename}{option}"
    )


def _describe(repo_id: str, filename: str, revision: str | None) -> str:
    return f"{filename!r} of hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
