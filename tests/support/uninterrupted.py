"""The same jobs, never killed: what trials are compared with. One is run for each kind of plan, when first asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
from support.aftermath import Seen, api_of, see
from support.plans import Plan
from support.trial import Trial


class References:
    """Kept below `directory`; nothing is left running."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[tuple[str, ...], dict[int, Seen]] = {}

    def get(self, plan: Plan) -> dict[int, Seen]:
        """What the uninterrupted job of this kind shows."""
        if plan.kind not in self._known:
            alike = msgspec.structs.replace(plan, mode="online", blows=(), aims=())
            with Trial(self._directory / "-".join(plan.kind), alike) as trial:
                trial.hurry()
                trial.run()
                self._known[plan.kind] = see(api_of(trial), alike)
        return self._known[plan.kind]
