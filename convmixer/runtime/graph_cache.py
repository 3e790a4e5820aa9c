"""Compiled graphs, one for each shape of images."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

MOST_GRAPHS = 32  # per model; the one unused for longest is dropped first


class GraphCache:
    """Compiled graphs by key. Each is compiled once, whichever thread asks first.

    Args:
        compile: From key to graph.
        lock: Makes what a thread holds while it compiles; None: a lock of this cache's own.
    """

    def __init__(
        self,
        compile: Callable[..., Any],
        lock: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        compiling = threading.Lock()
        self._compile, self._compile_lock = compile, lock or (lambda: compiling)
        self._graphs, self._lock = OrderedDict[Any, Any](), threading.Lock()

    def __call__(self, *key: Any) -> Any:
        graph = self._find(key)
        if graph is None:
            with self._compile_lock():
                graph = self._find(key)
                if graph is None:
                    graph = self._compile(*key)
                    with self._lock:
                        self._graphs[key] = graph
                        if len(self._graphs) > MOST_GRAPHS:
                            self._graphs.popitem(last=False)
        return graph

    def _find(self, key: Any) -> Any:
        with self._lock:
            if key not in self._graphs:
                return None
            self._graphs.move_to_end(key)
            return self._graphs[key]
