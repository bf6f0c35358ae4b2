"""What the routes of one app share: the backend, the limits, the numbers. No request's state lives here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from qvl.backends.base import Backend
from qvl.errors import QvlError
from qvl.memory.shared import SharedSummaries
from qvl.server.counts import Counts
from qvl.server.limits import Admission
from qvl.server.metrics import Metrics
from qvl.server.options import ServerOptions
from qvl.server.overflow import Overflow


class Service:
    """One server, or one process of it: `backend` behind `options`. `summaries` is a file that its processes share."""

    def __init__(self, backend: Backend, options: ServerOptions, counts: Counts, summaries: Path | None = None) -> None:
        self.backend = backend
        self.options = options
        self.counts = counts
        self.admission = Admission(lambda: max(1, backend.info.max_num_seqs) + options.max_queue, counts)
        self.metrics = Metrics(self._gauges, backend.stats)
        shared = None if summaries is None else SharedSummaries(summaries)
        self.overflow = Overflow(backend, self.metrics, options.summary_seconds, shared)
        self.start_error: QvlError | None = None
        self.created = int(time.time())
        backend.observer = self.metrics

    @property
    def names(self) -> tuple[str, ...]:
        """The model's names, the one that answers carry first."""
        return self.options.served_model_names or self.backend.info.names

    def not_ready(self) -> str | None:
        """None when a chat request would be answered now, else the reason why not."""
        if self.start_error is not None:
            # The error itself names files and options: it is for the operator's log.
            return "the engine could not start; the server's log says why"
        refusal = self.admission.refusal()
        return refusal.message if refusal is not None else self.backend.not_ready

    def _gauges(self) -> Mapping[str, float]:
        return {"requests_in_flight": self.counts.all_running, "ready": float(self.not_ready() is None)}
