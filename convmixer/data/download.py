"""Download one image, within limits of size and time."""

from __future__ import annotations

import http.client
import string
import time
import urllib.error
import urllib.parse
import urllib.request

from convmixer.errors import ImageError, brief

MOST_BYTES = 64 * 2**20
MOST_SILENCE, MOST_SECONDS = 10, 60  # seconds without a byte, and in all


def download(url: str) -> bytes:
    """Return what an http or https URL answers.

    Raises:
        ImageError: It does not answer, or more than `MOST_BYTES`, or too slowly.
    """
    shown, deadline = brief(url, 200), time.monotonic() + MOST_SECONDS
    too_large = f"{shown} is larger than {MOST_BYTES / 2**20:g} MiB: download it, and give its path"
    body = bytearray()
    try:
        quoted = urllib.parse.quote(url, safe=string.punctuation)
        request = urllib.request.Request(quoted, headers={"User-Agent": "convmixer"})  # some refuse the default
        with urllib.request.urlopen(request, timeout=MOST_SILENCE) as answer:
            length = answer.headers.get("Content-Length") or ""
            expected = int(length) if length.isdecimal() else 0
            if expected > MOST_BYTES:
                raise ImageError(too_large)
            while chunk := answer.read1(2**16):  # returns what has come, so that the limits are checked
                body += chunk
                if len(body) > MOST_BYTES:
                    raise ImageError(too_large)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {MOST_SECONDS} seconds")
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"cannot fetch {shown}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise ImageError(f"cannot fetch {shown}: {reason}") from error
    if len(body) < expected:
        raise ImageError(f"cannot fetch {shown}: it broke off after {len(body)} of {expected} bytes")
    return bytes(body)
