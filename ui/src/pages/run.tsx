import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import type { Place, RunDetail } from "../api";
import { look } from "../colours";
import { duration, isLive, number, runSeconds } from "../format";
import { useRun } from "../live";
import { Alerts } from "../parts/alerts";
import { Attempts, markersOf } from "../parts/attempts";
import { Charts } from "../parts/charts";
import { Console } from "../parts/console";
import { Banner, Crumbs, Failure, Loading, Moment, StateBadge, useNow, useTitle } from "../parts/frame";
import { Values } from "../parts/values";
import { groupPath, incarnation, Link, projectPath, runPath } from "../router";

export function RunPage({ place, id }: { place: Place; id: string }): JSX.Element {
  const { data: run, error, connection } = useRun(place, id);
  const seen = incarnation(id);
  useTitle(run?.name || id, place.project);
  const charted = useMemo(() => (run ? [{ run, label: run.name || run.id, look: look(0) }] : []), [run]);
  if (error?.status === 404)
    return (
      <div class="empty-page">
        <h1>There is no run {id}</h1>
        <p>
          It may not have reached the server yet. <Link to={projectPath(place)}>The runs of {place.project}</Link>
        </p>
      </div>
    );
  if (error && !run) return <Failure error={error} />;
  if (!run) return <Loading />;
  return (
    <>
      <Banner connection={connection} />
      <Crumbs place={place}>
        {run.group && (
          <>
            <Link to={groupPath(place, run.group)}>{run.group}</Link>
            <span aria-hidden="true">/</span>
          </>
        )}
        <span aria-current="page">{run.name || run.id}</span>
      </Crumbs>
      <div class="title">
        <h1>{run.name || run.id}</h1>
        <StateBadge state={run.state} />
        {run.tags.map((tag) => (
          <span key={tag} class="chip">
            {tag}
          </span>
        ))}
      </div>
      {seen.attempt !== null && (
        <p class="notice" role="note">
          This is the run as attempt {seen.attempt} saw it, with what is archived since. <Link to={runPath(place, seen.run)}>The run as it is now</Link>
        </p>
      )}
      <Facts run={run} />
      {run.notes && <p class="notes">{run.notes}</p>}
      {run.alerts.length > 0 && <Alerts alerts={run.alerts} />}
      {run.attempts.length > 0 && <Attempts place={place} id={id} attempts={run.attempts} />}
      <Charts
        place={place}
        runs={charted}
        markers={markersOf(run.attempts)}
        empty={isLive(run) ? "No numbers yet. Charts appear with the first run.log({...})." : "This run has logged no numbers."}
      />
      <div class="columns">
        <Values title="Config" values={run.config} empty="No config. Give init() one: config={...}." />
        <Values title="Summary" values={visibleSummary(run)} empty="Nothing yet: the last value of everything that is logged appears here." />
      </div>
      <Console place={place} run={run} />
    </>
  );
}

function Facts({ run }: { run: RunDetail }): JSX.Element {
  const now = useNow(1, isLive(run));
  const facts: [string, JSX.Element | string][] = [
    ["Run id", run.id],
    ["Started", <Moment at={run.created_at} />],
    ["Duration", duration(runSeconds(run, now))],
    ["Steps", run.last_step < 0 ? "none yet" : number(run.last_step + 1)],
    ["Rows", number(run.rows)],
    ["Rank", run.rank === null ? "" : number(run.rank)],
    ["Job type", run.job_type],
    ["Sweep", run.sweep],
    ["Host", run.host],
    ["Program", run.program],
    ["Commit", run.commit.slice(0, 12)],
    ["Repository", run.repo],
  ];
  return (
    <dl class="facts">
      {facts
        .filter(([, value]) => value !== "")
        .map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
    </dl>
  );
}

/** `_step` and the like are among the facts already. */
function visibleSummary(run: RunDetail): Record<string, unknown> {
  return Object.fromEntries(Object.entries(run.summary).filter(([key]) => !key.startsWith("_")));
}
