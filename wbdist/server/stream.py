"""POST /files/{entity}/{project}/{run}/file_stream: lines, summary, marks and the end of a run.

Two kinds of client. Ours stamps its requests with (attempt, nonce, writer, seq): it is answered 409 for a gap or when
it is fenced, and knows what to do. W&B's client takes any 4xx for the end of its stream, for good; it gets one only for
what can never become right (no key, no such name, not a request at all).
"""

from __future__ import annotations

import logging

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from wbdist.core.position import HISTORY, STREAMS, SUMMARY
from wbdist.core.states import RunEvent, RunState
from wbdist.errors import UsageError
from wbdist.protocol import file_stream, jsonvalues
from wbdist.protocol.attempts import StreamAnswer, StreamStamp
from wbdist.protocol.file_stream import StreamReply, StreamRequest
from wbdist.server import access, http
from wbdist.server.clients import shared_writer
from wbdist.server.context import AppContext
from wbdist.server.gql.call import check_names
from wbdist.server.store import appending
from wbdist.server.store.interface import RunFields, RunRow

_log = logging.getLogger(__name__)

Lines = dict[str, tuple[int, list[str]]]
INTERRUPTED = 255
"""What either client reports for an uncaught KeyboardInterrupt."""
_LIVE = frozenset({RunState.RUNNING, RunState.PREEMPTING})


def take(ctx: AppContext, run: RunRow, request: StreamRequest, writer: str = "") -> tuple[int, StreamReply]:
    """Applies one request; (HTTP status, answer). Repeating it changes nothing. `writer`: of W&B's client in shared mode.

    Raises ValueError for a senseless request, HTTPException 404 for an attempt that was not begun.
    """
    return _take_stamped(ctx, run, request, request.wbdist) if request.wbdist else _take_plain(ctx, run, request, writer)


def _take_stamped(ctx: AppContext, run: RunRow, request: StreamRequest, stamp: StreamStamp) -> tuple[int, StreamReply]:
    now = ctx.clock()
    summary = _summary(request)
    lines: Lines = {}
    for stream in STREAMS:
        chunk = request.files.get(stream)
        if chunk is not None:
            if stream not in stamp.seq:
                raise ValueError(f"wbdist.seq lacks {stream}, of which there are lines")
            lines[stream] = (stamp.seq[stream], chunk.content)
    if any(seq < 0 for seq in stamp.seq.values()):
        raise ValueError("wbdist.seq must not be negative")
    done = ctx.store.append(run.pk, lines, now, attempt=stamp.attempt, nonce=stamp.nonce, writer=stamp.writer)
    answer = StreamAnswer(next=done.next, code=done.code, attempt=done.attempt if done.code == "fenced" else 0)
    cause, at = (stamp.ended.cause, stamp.ended.at) if stamp.ended else ("", 0.0)
    if done.code == "fenced":
        if cause and not done.rival:
            _mark(ctx, run, request, now, attempt=stamp.attempt, cause=cause, at=at)
        message = f"attempt {stamp.attempt} of this run is superseded by attempt {done.attempt}; its lines are in the archive"
        return 409, StreamReply(error=message, wbdist=answer)
    if done.code == "gap" and not done.next:
        raise HTTPException(404, f"attempt {stamp.attempt} of this run was never begun here; send BeginAttempt first")
    if done.code == "gap":
        ctx.store.record_event(run.pk, RunEvent.BEAT, now, attempt=stamp.attempt)
        return 409, StreamReply(error="lines are missing before these; send from `wbdist.next` on", wbdist=answer)
    if summary is not None:
        ctx.store.set_summary(run.pk, summary, now, attempt=stamp.attempt)
    _mark(ctx, run, request, now, attempt=stamp.attempt, cause=cause, at=at)
    return 200, StreamReply(stopped=run.stopping, wbdist=answer)


def _take_plain(ctx: AppContext, run: RunRow, request: StreamRequest, writer: str) -> tuple[int, StreamReply]:
    now = ctx.clock()
    summary = _summary(request)
    lines: Lines = {stream: (chunk.offset, chunk.content) for stream in STREAMS if (chunk := request.files.get(stream))}
    if lines:
        done = ctx.store.append(run.pk, lines, now, writer=writer or "sdk")
        if done.code == "gap":
            _append_behind(ctx, run, lines, done.next, writer)
    if summary is not None:
        ctx.store.set_summary(run.pk, summary, now, merge=bool(writer))
    _mark(ctx, run, request, now)
    return 200, StreamReply(stopped=run.stopping)


def _append_behind(ctx: AppContext, run: RunRow, lines: Lines, expected: dict[str, int], writer: str) -> None:
    """Lines that W&B's client sends beyond what we have of it: it resumes a run of ours, or the lines before are lost to us.

    A refusal would end its stream and lose the rest too, so they go behind the last one. Their offset then no longer
    tells a repeated request from a new one; for history rows the `_step` does, console lines may stand twice.
    """
    _log.info("run %s/%s/%s: W&B's client is ahead of what it stored here", run.entity, run.project, run.run_id)
    now = ctx.clock()
    shifted: Lines = {}
    for stream, (offset, content) in lines.items():
        alone = stream == HISTORY and not writer
        new = [line for line in content if _step_of(line) > run.last_step] if alone else content
        shifted[stream] = (offset, content) if offset <= expected[stream] else (expected[stream], new)
    if writer or run.attempt == 0:
        ctx.store.append(run.pk, shifted, now, writer=writer or "sdk")
    else:
        nonce = next(entry.nonce for entry in ctx.store.attempts(run.pk) if entry.attempt == run.attempt)
        ctx.store.append(run.pk, shifted, now, attempt=run.attempt, nonce=nonce)


def _step_of(line: str) -> int:
    try:
        row = jsonvalues.loads(line)
    except ValueError:
        return -1
    step = row.get("_step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else -1


def _summary(request: StreamRequest) -> dict[str, object] | None:
    chunk = request.files.get(SUMMARY)
    return jsonvalues.loads_object(chunk.content[-1], SUMMARY) if chunk is not None and chunk.content else None


def _mark(
    ctx: AppContext,
    run: RunRow,
    request: StreamRequest,
    now: float,
    *,
    attempt: int | None = None,
    cause: str = "",
    at: float = 0.0,
) -> None:
    """The events of a request, in the order in which they can have happened: alive, preempting, ended.

    `cause` is `lost` (a witness speaks), `preempted`, or any other word of the writer's own about its end; `at` when that was.
    """
    events: list[tuple[RunEvent, int | None]] = []
    ends = request.complete or bool(cause)
    # Lines are a sign of life to the store already; a second transaction only where the state may change.
    stored = run.state in _LIVE and any(request.files.values())
    if cause not in {"lost", "preempted"} and not stored:
        events.append((RunEvent.BEAT, None))
    if request.preempting or cause == "preempted":
        events.append((RunEvent.PREEMPT, None))
    if cause == "lost":
        events.append((RunEvent.LOST, None))
    elif ends:
        code = request.exitcode if request.exitcode is not None else int(cause not in {"", "exit"})
        # A process that was asked to stop and ends with an error code did as it was told; so did one that got Ctrl-C.
        marked = bool(request.preempting) or cause == "preempted" or run.state in {RunState.PREEMPTING, RunState.PREEMPTED}
        unhappy = RunEvent.KILL if run.stopping or (code == INTERRUPTED and not marked) else RunEvent.EXIT_NONZERO
        events.append((RunEvent.EXIT_ZERO if code == 0 else unhappy, code))
    for event, exit_code in events:
        ctx.store.record_event(
            run.pk, event, now, attempt=attempt, exit_code=exit_code, cause=cause or ("exit" if ends else ""), ended=at
        )


def routes(ctx: AppContext) -> list[BaseRoute]:
    """The endpoint; needs an API key."""

    def respond(entity: str, project: str, run_id: str, body: bytes, writer: str) -> Response:
        try:
            request = file_stream.decode_request(body)
            run = ctx.store.get_run(entity, project, run_id)
            if run is None:
                run = _missing_run(ctx, (entity, project, run_id), request)
            status, reply = take(ctx, run, request, writer)
        except (ValueError, UsageError) as error:
            return http.refusal(400, str(error))
        except (RecursionError, OverflowError) as error:
            return http.refusal(400, f"a line is nested too deeply, or holds a number too large to store: {error}")
        return Response(file_stream.encode_reply(reply), status, media_type="application/json")

    async def post(request: Request) -> Response:
        user = ctx.auth.check_request(request)
        if user is None:
            return http.refusal(401, "no valid API key: send it as the password of user `api`, or as a Bearer token")
        params = request.path_params
        if (refused := access.why_not_write(user, params["entity"], params["project"])) is not None:
            return http.refusal(*refused)
        body = await http.read_body(request, ctx.settings.max_stream_bytes)
        return await run_in_threadpool(
            respond, params["entity"], params["project"], params["run"], body, shared_writer(request)
        )

    return [Route("/files/{entity}/{project}/{run}/file_stream", post, methods=["POST"])]


def _missing_run(ctx: AppContext, names: tuple[str, str, str], request: StreamRequest) -> RunRow:
    """Our client asks UpsertBucket first, and again after a 404; W&B's cannot, so its run is made here."""
    if request.wbdist is not None:
        raise HTTPException(404, f"run {'/'.join(names)} does not exist; send UpsertBucket and BeginAttempt first")
    check_names(*names)
    # What is refused must not leave a run behind, so the request is looked through before there is one.
    _summary(request)
    for stream in STREAMS:
        if (chunk := request.files.get(stream)) is not None:
            appending.Lines.of(stream, chunk.offset, chunk.content)
    return ctx.store.upsert_run(*names, RunFields(display_name=names[2]), ctx.clock())[0]
