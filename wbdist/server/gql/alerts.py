"""`run.alert` of W&B's client, and what runs said."""

from __future__ import annotations

from typing import Any

from wbdist.server.gql.call import Info, Resolver, call_of, refuse, run_or_404
from wbdist.server.store.alerts import AlertBox, alerts_of

_MAX_TITLE = 1000
_MAX_TEXT = 100_000
_box = AlertBox()


def _notify(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    title, text = input["title"], input["text"]
    if not title or len(title) > _MAX_TITLE or len(text) > _MAX_TEXT:
        raise refuse(400, f"an alert has a title of 1 to {_MAX_TITLE} characters and a text of up to {_MAX_TEXT}")
    run = run_or_404(call, input["entityName"], input["projectName"], input["runName"])
    wait = (input.get("waitDuration") or 0) / 1000
    level = input.get("severity") or "INFO"
    return {"success": _box.put(call.app.store, run, title, text, level, wait=wait, now=call.app.clock())}


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Mutation": {"notifyScriptableRunAlert": _notify},
    "Run": {"alerts": lambda run, info: alerts_of(call_of(info).app.store, run)},
}
