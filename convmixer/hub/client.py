"""The Hugging Face Hub both ways: files from it, checked before their first use, and one commit to it.

huggingface_hub's client downloads into the Hub's own cache, resumes, retries 429 and shows progress. This module adds
retries of server errors and checks of the files that arrive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileMetadata,
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from convmixer.errors import HubError, WeightsError
from convmixer.hub.json_limits import header_excess

Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 5
_PATIENCE = 60.0  # seconds; an attempt that fails later is the last one
RESOLVE_PAUSE = 1.0  # seconds between two tries of a name
_TRANSIENT = (429, 500, 502, 503, 504)


# ---- downloads ------------------------------------------------------------------------------------------------------


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    prefer_cache: bool = False,
    size: int = 0,
    sha256: str = "",
) -> Path:
    """Return the local path of a file of a Hub repository; download it unless the Hub's own cache has it.

    Every file is checked before its first use: its size and hash if they are given, else the hash by which the Hub
    names it in the cache. A file that fails is fetched once again.

    Args:
        repo_id: "owner/name".
        filename: Path inside the repository.
        revision: Branch, tag or commit; the default branch if None.
        cache_dir: Cache folder to use instead of the Hub's own.
        token: Access token; by default the one that `hf auth login` stored.
        local_files_only: Never touch the network. `HF_HUB_OFFLINE=1` does the same for the whole process.
        prefer_cache: Take a cached file without asking the Hub whether its branch has moved on.
        size: Bytes that the file must have; 0 if not known.
        sha256: Its hash; "" if not known.

    Raises:
        WeightsError: The file cannot be downloaded, or is not what it should be; the text names it and says what to do.
    """
    file = _File(repo_id, filename, revision, cache_dir, _stripped(token))
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        path = file.cached() if prefer_cache or offline else None
        if path is None and offline:
            in_folder = f" in {str(cache_dir)!r}" if cache_dir else ""
            raise WeightsError(
                f"{file} is not in the local cache{in_folder}, and the network is off "
                f"({'local_files_only=True' if local_files_only else 'HF_HUB_OFFLINE'}). Where there is a network, "
                f"run: {file.command}"
            )
        newest = ""
        if path is None:
            path, newest = file.download()
        problem = _problem(path, size, sha256 or newest)
        if problem and offline:
            raise WeightsError(
                f"{str(path)!r}, the cached copy of {file}, is corrupt: {problem}. Where there is a network, run: "
                f"{file.command} --force-download"
            )
        if problem:
            _LOG.warning("%s, the cached copy of %s, is corrupt: %s. Fetching it once again", path, file, problem)
            if not path.is_symlink():
                path.unlink()  # in a cache without links, the client would leave it there
            path, newest = file.download(force=True)
            problem = _problem(path, size, sha256 or newest)
    except WeightsError:
        raise
    except Exception as error:  # the client's HTTP library has its own errors, and differs between versions
        raise WeightsError(f"cannot get {file}: {_reason(error, token)}") from _harmless(error, token)
    if problem:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise WeightsError(
            f"{file} arrived corrupt twice: {problem}. The server, or a proxy on the way, sends wrong bytes; nothing "
            f"of it was kept. Try later, or another endpoint (HF_ENDPOINT is {constants.ENDPOINT})"
        )
    return path


@dataclass(frozen=True)
class _File:
    """A file of a Hub repository; the arguments are those of `fetch`."""

    repo_id: str
    filename: str
    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None

    def __str__(self) -> str:
        return f"{self.filename!r} of hf-hub:{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    @property
    def command(self) -> str:
        """A command that downloads it."""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        folder = f" --cache-dir {shlex.quote(str(self.cache_dir))}" if self.cache_dir else ""
        return f"hf download {self.repo_id} {self.filename}{revision}{folder}"

    def cached(self) -> Path | None:
        found = try_to_load_from_cache(self.repo_id, self.filename, cache_dir=self.cache_dir, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def download(self, force: bool = False) -> tuple[Path, str]:
        """Return the newest copy, and the hash by which the Hub names it where the cache does not say that."""
        if not (host := _unresolved_host()):
            return self._fetch(force)
        # The client would also take the cached file; without one it would ask for half a minute.
        path = None if force else self.cached()
        if path is None:
            raise WeightsError(
                f"cannot get {self}: the name {host!r} does not resolve, so this machine has no network, or no "
                f"name server. Where there is a network, run: {self.command}. Copy the cache "
                f"({self.cache_dir or constants.HF_HUB_CACHE}) to this machine, and set HF_HUB_OFFLINE=1 to go on "
                "without asking"
            )
        _LOG.warning("The name %r does not resolve: taking the cached copy of %s", host, self)
        return path, ""

    def _fetch(self, force: bool) -> tuple[Path, str]:
        cached, newest = None if force else self.cached(), None
        # The client takes a cached file without a word where the Hub answers with an error, or not at all.
        if cached is not None and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            try:
                newest = self._ask()
            except Exception as error:
                reason = _reason(error, self.token)
                _LOG.warning("cannot ask for %s: %s. The cached copy may not be the newest", self, reason)
            if newest and newest.commit_hash in cached.parts:
                return cached, newest.etag or ""
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        path = Path(_patiently(lambda: hf_hub_download(self.repo_id, self.filename, force_download=force, **options)))
        if cached is None and not path.is_symlink():  # on a file system without links nothing else says the hash
            newest = self._ask()
        return path, newest.etag or "" if newest and newest.commit_hash in path.parts else ""

    def _ask(self) -> HfFileMetadata:
        """Ask the Hub for the commit and the hash of the file."""
        url = hf_hub_url(self.repo_id, self.filename, revision=self.revision)
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return _patiently(lambda: get_hf_file_metadata(url, token=self.token, timeout=timeout))


def _unresolved_host() -> str:
    """Return the Hub's host if its name does not resolve in two tries; else "".

    Behind a proxy, the proxy resolves names.
    """
    address = urlsplit(constants.ENDPOINT)
    host, proxies = address.hostname or "", getproxies()
    proxied = (address.scheme in proxies or "all" in proxies) and not proxy_bypass(host)
    if proxied or not host:
        return ""
    for pause in (RESOLVE_PAUSE, 0.0):
        try:
            socket.getaddrinfo(host, address.port or 443)
            return ""
        except (OSError, UnicodeError):
            time.sleep(pause)
    return host


def _patiently(call: Callable[[], Result], repeat_lost: bool = True) -> Result:
    """Return the call's result; repeat it after server errors and broken connections, with ever longer pauses.

    If a server says when to come back (Retry-After), wait until then. Without `repeat_lost`, repeat only what the
    server said that it did not do.
    """
    started = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            response = _response(error)
            transient = getattr(response, "status_code", None) in (_TRANSIENT if repeat_lost else (429, 503))
            if repeat_lost:
                transient |= any(isinstance(e, ConnectionResetError | ConnectionAbortedError) for e in _chain(error))
                # The client's own error, for a body of another length.
                transient |= type(error) is OSError and error.errno is None
            if not transient or attempt == _ATTEMPTS - 1 or time.monotonic() - started > _PATIENCE:
                raise
            retry_after = str(getattr(response, "headers", {}).get("Retry-After", ""))
            wait = float(retry_after) if retry_after.isdigit() else 2.0**attempt
            _LOG.warning("%s. Again in %g s", _reason(error, None), wait)
        time.sleep(wait)
    raise AssertionError  # the last attempt returns or raises


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it arose from, what that arose from, ...; also what a library hides by `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    """Return the server's reply inside an error or its causes."""
    replies = (getattr(e, "response", None) for e in _chain(error))
    return next((reply for reply in replies if reply is not None), None)


def _problem(path: Path, size: int, sha256: str) -> str:
    """Return what is wrong with a cached file, or "". It is hashed once; a note in the Hub's assets cache says so."""
    found = path.stat()
    if size and found.st_size != size:
        return f"{found.st_size} bytes, expected {size}"
    # Not the resolved path: a blob may itself be a link into a store that goes by other hashes.
    blob = os.readlink(path) if path.is_symlink() else ""
    expected = sha256 or (Path(blob).name if Path(blob).parent.name == "blobs" else "")
    key = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino} {expected}"
    note: Path | None = None
    with contextlib.suppress(OSError):  # where nothing can be written, the file is hashed every time
        note = cached_assets_path("convmixer", "verified") / hashlib.sha256(key.encode()).hexdigest()
        if note.exists():
            return ""
    problem = ""
    if len(expected) in (40, 64):
        hashes = _hashes(path, found.st_size, expected)
        if expected not in hashes:
            problem = f"its hash is {hashes[0]}, expected {expected}"
    elif path.suffix == ".safetensors":
        try:
            problem = header_excess(path)
            if not problem:
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, OSError, ValueError) as error:
            problem = str(error)
    if note and not problem:
        with contextlib.suppress(OSError):
            note.touch()
    return problem


def _hashes(path: Path, size: int, expected: str) -> list[str]:
    """Return the hashes by which the Hub or its cache may know a file, of the kind of the expected one.

    That is sha256 of large files; of others git's, or a mirror's sha1.
    """
    kinds = [hashlib.sha256()] if len(expected) == 64 else [hashlib.sha1(b"blob %d\0" % size), hashlib.sha1()]
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for kind in kinds:
                kind.update(chunk)
    return [kind.hexdigest() for kind in kinds]


# ---- errors ---------------------------------------------------------------------------------------------------------


def _reason(error: BaseException, token: str | bool | None) -> str:
    """Return the reason in one line, without any token."""
    *_, last = _chain(error)
    text, cause = (" ".join(str(e).split()) or type(e).__name__ for e in (error, last))  # the Hub's have several lines
    return _without_token(text if cause in text else f"{text} {cause}", token)


def _stripped(token: str | bool | None) -> str | bool | None:
    """Return the token without the line break at the end of a file that it was read from."""
    return token.strip() if isinstance(token, str) else token


def _without_token(text: str, token: str | bool | None) -> str:
    for secret in (token, get_token()):
        for part in secret.split() if isinstance(secret, str) else ():
            text = text.replace(part, "***")
    return text


def _harmless(error: BaseException, token: str | bool | None) -> BaseException | None:
    """Return the error as a cause, unless a traceback that shows it would show the token."""
    return error if _without_token(repr(error), token) == repr(error) else None


# ---- uploads --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """Where a commit goes.

    Attributes:
        repo_id: "owner/name".
        revision: Branch; None is the main one.
        token: Access token.
        head: Its newest commit; None if there is no such repository or branch.
        card: Text of its README.md, or "".
        hashes: Of each file, by its path: sha256 of large files, git's hash of others.
    """

    repo_id: str
    revision: str | None
    token: str | bool | None
    head: str | None
    card: str
    hashes: Mapping[str, str]

    def changed(self, files: Mapping[str, Path]) -> list[str]:
        """Return the paths of those files that the branch does not have, or not with this content."""
        found = ((path, file, self.hashes.get(path, "")) for path, file in files.items())
        return [
            path for path, file, known in found if not known or known not in _hashes(file, file.stat().st_size, known)
        ]


def read_branch(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Branch:
    """Return the state of a branch, and change nothing. With `HF_HUB_OFFLINE=1` it counts as missing.

    Raises:
        HubError: The Hub does not answer, or not with what was asked for.
    """
    token = _stripped(token)
    if constants.HF_HUB_OFFLINE:
        return Branch(repo_id, revision, token, None, "", {})
    api = HfApi(token=token)
    options: dict[str, Any] = {"revision": revision, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    try:
        info = _patiently(lambda: api.model_info(repo_id, files_metadata=True, **options))
        hashes = {f.rfilename: (f.lfs.sha256 if f.lfs else f.blob_id) or "" for f in info.siblings or ()}
        card = ""
        if "README.md" in hashes:
            path = _patiently(lambda: hf_hub_download(repo_id, "README.md", revision=info.sha, token=token))
            card = Path(path).read_text(encoding="utf-8-sig")
        return Branch(repo_id, revision, token, info.sha, card, hashes)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return Branch(repo_id, revision, token, None, "", {})
    except Exception as error:
        raise _refusal(repo_id, error, token) from _harmless(error, token)


def ensure_branch(branch: Branch, *, private: bool | None, create_pr: bool) -> Branch:
    """Create the repository or the branch if it is missing; return the branch as it is then.

    Raises:
        HubError: The Hub does not allow it, or cannot be reached.
    """
    api = HfApi(token=branch.token)
    try:
        if branch.head is None:
            _patiently(lambda: api.create_repo(branch.repo_id, private=private, exist_ok=True))
        if branch.head is None and branch.revision and not create_pr:
            name = branch.revision
            _patiently(lambda: api.create_branch(branch.repo_id, branch=name, exist_ok=True))
    except Exception as error:
        raise _refusal(branch.repo_id, error, branch.token) from _harmless(error, branch.token)
    return read_branch(branch.repo_id, revision=branch.revision, token=branch.token) if branch.head is None else branch


def commit(branch: Branch, files: Mapping[str, Path], message: str, *, create_pr: bool = False) -> Commit:
    """Upload files, by their paths in the repository, as one commit. If all are there already, nothing is committed.

    Raises:
        HubError: The Hub refuses or cannot be reached.
    """
    operations = [CommitOperationAdd(path, file) for path, file in files.items()]
    try:
        # Only what was refused unread is sent again: nobody knows what became of a commit whose answer was lost.
        done = _patiently(
            lambda: HfApi(token=branch.token).create_commit(
                branch.repo_id,
                operations,
                commit_message=message,
                revision=branch.revision,
                create_pr=create_pr,
                parent_commit=branch.head,  # what others wrote meanwhile is not overwritten
            ),
            repeat_lost=False,
        )
    except Exception as error:
        raise _refusal(branch.repo_id, error, branch.token) from _harmless(error, branch.token)
    return Commit(str(done.oid), str(done.pr_url or done.commit_url))


@dataclass(frozen=True)
class Commit:
    """A commit: its hash, and the address of it or of its pull request."""

    sha: str
    url: str


def head(branch: Branch) -> Commit | None:
    """Return the newest commit of a branch, if it has one."""
    url = f"{constants.ENDPOINT}/{branch.repo_id}/commit/{branch.head}"
    return Commit(branch.head, url) if branch.head else None


def read_json(branch: Branch, filename: str) -> Any:
    """Return the content of a JSON file of a branch; None if it has no such file, or one that is not JSON.

    Raises:
        HubError: The Hub does not answer.
    """
    if filename not in branch.hashes:
        return None
    token = branch.token
    try:
        path = _patiently(lambda: hf_hub_download(branch.repo_id, filename, revision=branch.head, token=token))
    except Exception as error:
        raise _refusal(branch.repo_id, error, token) from _harmless(error, token)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def collect(
    owner: str,
    title: str,
    description: str,
    repo_ids: Sequence[str],
    *,
    private: bool,
    token: str | None,
    dry_run: bool,
) -> tuple[str, list[str]]:
    """Put model repositories into a collection of that title, which is made if the owner has none.

    With `HF_HUB_OFFLINE=1` it counts as missing.

    Args:
        owner: Of the collection.
        title: Of the collection.
        description: Of a new collection, up to 150 characters.
        repo_ids: Repositories; those that the collection has already are left as they are.
        private: Whether a new collection is.
        token: Access token.
        dry_run: Change nothing.

    Returns:
        The address of the collection, "" if a dry run finds none; and the repositories that it did not have.

    Raises:
        HubError: The Hub refuses or cannot be reached.
    """
    if constants.HF_HUB_OFFLINE and dry_run:
        return "", list(repo_ids)
    api = HfApi(token=_stripped(token))
    name = f"{owner}, collection {title!r}"
    try:
        found = next((c for c in _patiently(lambda: list(api.list_collections(owner=owner))) if c.title == title), None)
        if found is not None:
            slug = found.slug
            found = _patiently(lambda: api.get_collection(slug))  # the list has four of its items
        elif not dry_run:
            about: dict[str, Any] = {"title": title, "namespace": owner, "description": description, "private": private}
            found = _patiently(lambda: api.create_collection(**about, exists_ok=True))
        has = {item.item_id for item in found.items if item.item_type == "model"} if found else set()
        new = [repo_id for repo_id in repo_ids if repo_id not in has]
        if found is not None and not dry_run:
            slug = found.slug
            for repo_id in new:
                _patiently(partial(api.add_collection_item, slug, repo_id, "model", exists_ok=True))
        return found.url if found else "", new
    except Exception as error:
        raise _refusal(name, error, token) from _harmless(error, token)


def _refusal(repo_id: str, error: Exception, token: str | bool | None) -> HubError:
    status = getattr(_response(error), "status_code", None)
    changed = "Nothing was committed. It was changed meanwhile: run this again"
    advice = {
        401: "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write",
        403: f"The token may not write to {repo_id}: make one that may, at {constants.ENDPOINT}/settings/tokens",
        404: "Check the name; a private repository needs a token of its owner",
        409: changed,
        412: changed,
    }.get(status or 0, f"Check the network and HF_ENDPOINT ({constants.ENDPOINT}), and run this again")
    return HubError(f"hf-hub:{repo_id}: {_reason(error, token).rstrip('.')}. {advice}")
