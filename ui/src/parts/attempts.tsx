import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { Attempt, Place } from "../api";
import { duration, number, plural } from "../format";
import { incarnation, Link, runPath } from "../router";
import { Moment, useNow } from "./frame";
import type { Marker } from "./markers";
import { Timeline } from "./timeline";

const FEW = 8;

const BEGAN: Record<string, string> = {
  start: "first start",
  restart: "started again",
  preempted: "after a preemption",
  lost: "after a lost process",
  crashed: "after a crash",
  resume: "resumed",
};

/** Attempts that go on where an earlier one stood, as vertical lines of the charts. */
export function markersOf(attempts: Attempt[]): Marker[] {
  return attempts.filter((a) => a.live && a.base_step >= 0).map((a) => ({ step: a.base_step + 0.5, attempt: a.attempt }));
}

function ending({ end, ended_at }: Attempt): { word: string; kind: string } {
  if (ended_at === null) return { word: "running", kind: "running" };
  if (end === "lost") return { word: "process lost", kind: "crashed" };
  if (end === "silence") return { word: "fell silent", kind: "crashed" };
  const kind = ["finished", "failed", "preempted"].find((state) => end.startsWith(state));
  return { word: end || "ended", kind: kind ?? "killed" };
}

/** The lives of the job: when, why, from where, and what of each is in the line that is shown. */
export function Attempts({ place, id, attempts }: { place: Place; id: string; attempts: Attempt[] }): JSX.Element {
  const running = attempts.some((a) => a.ended_at === null);
  const now = useNow(1, running);
  const [all, setAll] = useState(false);
  const begin = Math.min(...attempts.map((a) => a.started_at));
  const end = Math.max(...attempts.map((a) => a.ended_at ?? now), begin + 0.001);
  const percent = (at: number): number => (100 * (at - begin)) / (end - begin);
  const shown = all ? attempts : attempts.slice(-FEW);
  return (
    <section aria-labelledby="attempts" class="panel">
      <div class="bar">
        <h2 id="attempts">
          Attempts <span class="count">{attempts.length}</span>
        </h2>
      </div>
      <div class="scroll">
        <table class="attempts" role="table">
          <thead role="rowgroup">
            <tr>
              <th scope="col">#</th>
              <th scope="col" class="wide">When</th>
              <th scope="col">Started</th>
              <th scope="col">Duration</th>
              <th scope="col">Began</th>
              <th scope="col">Ended</th>
              <th scope="col" class="num">From step</th>
              <th scope="col" class="num">Rows live</th>
              <th scope="col" class="num">Archived</th>
              <th scope="col" class="num">Lost</th>
            </tr>
          </thead>
          <tbody role="rowgroup">
            {shown.map((attempt) => {
              const { word, kind } = ending(attempt);
              const stop = attempt.ended_at ?? now;
              const archived = attempt.rows - attempt.rows_live;
              return (
                <tr key={attempt.attempt} role="row" class={attempt.live ? "" : "archived"}>
                  <th scope="row" role="rowheader">{attempt.attempt}</th>
                  <td role="cell" class="wide">
                    <div class="span">
                      <i class={`state-bar ${kind}`} style={{ left: `${percent(attempt.started_at)}%`, width: `${percent(stop) - percent(attempt.started_at)}%` }} />
                    </div>
                  </td>
                  <td role="cell" data-label="Started">
                    <Moment at={attempt.started_at} />
                  </td>
                  <td role="cell" data-label="Duration">{duration(stop - attempt.started_at)}</td>
                  <td role="cell" data-label="Began">{BEGAN[attempt.cause] ?? attempt.cause}</td>
                  <td role="cell" data-label="Ended">
                    <span class={`state ${kind}`}>{word}</span>
                  </td>
                  <td role="cell" class="num" data-label="From step">{attempt.base_step < 0 ? "start" : number(attempt.base_step + 1)}</td>
                  <td role="cell" class="num" data-label="Rows live">{number(attempt.rows_live)}</td>
                  <td role="cell" class={archived ? "num" : "num none"} data-label="Archived" title={archived ? "Logged after the checkpoint that the next attempt went on from: kept, not shown" : ""}>
                    {archived ? (
                      <Link to={runPath(place, `${incarnation(id).run}:${attempt.attempt}`)} title={`The run as attempt ${attempt.attempt} saw it`}>
                        {number(archived)}
                      </Link>
                    ) : (
                      "–"
                    )}
                  </td>
                  <td role="cell" class={attempt.lost_seconds ? "num" : "num none"} data-label="Lost" title={attempt.lost_seconds ? "Training done in vain: what no later attempt went on from" : ""}>
                    {attempt.lost_seconds ? duration(attempt.lost_seconds) : "–"}
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {attempts.length > shown.length && (
        <button class="more" onClick={() => setAll(true)}>
          Show {plural(attempts.length - shown.length, "earlier attempt")}
        </button>
      )}
      <Timeline attempts={attempts} bars={shown.length} />
    </section>
  );
}
