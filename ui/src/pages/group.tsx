import type { JSX } from "preact";
import { useMemo, useState } from "preact/hooks";
import type { Place, Run } from "../api";
import { look } from "../colours";
import { number } from "../format";
import { useRuns } from "../live";
import { Charts } from "../parts/charts";
import { Banner, Crumbs, Failure, Loading, useTitle } from "../parts/frame";
import { RunTable, States } from "../parts/runtable";

/** The runs of one group: the ranks of a job, overlaid. */
export function GroupPage({ place, group }: { place: Place; group: string }): JSX.Element {
  useTitle(group, place.project);
  const { data, error, connection } = useRuns(place, group);
  const [hidden, setHidden] = useState<ReadonlySet<string>>(new Set());
  const runs = useMemo(() => [...(data?.runs ?? [])].sort(byRank), [data]);
  if (error && !data) return <Failure error={error} />;
  if (!data) return <Loading />;
  const looks = new Map(runs.map((run, i) => [run.id, look(i)]));
  const selected = new Set(runs.map((run) => run.id).filter((id) => !hidden.has(id)));
  const select = (ids: string[], on: boolean): void => {
    const next = new Set(hidden);
    for (const id of ids) on ? next.delete(id) : next.add(id);
    setHidden(next);
  };
  const charted = runs.filter((run) => selected.has(run.id));
  return (
    <>
      <Banner connection={connection} />
      <Crumbs place={place}>
        <span>groups</span>
        <span aria-hidden="true">/</span>
        <span aria-current="page">{group}</span>
      </Crumbs>
      <div class="title">
        <h1>{group}</h1>
        <States runs={runs} />
      </div>
      {!runs.length ? (
        <p class="empty">No run of {place.entity}/{place.project} is in this group.</p>
      ) : (
        <>
          <section aria-labelledby="runs" class="panel">
            <div class="bar">
              <h2 id="runs">
                Runs <span class="count">{number(runs.length)}</span>
              </h2>
            </div>
            <RunTable place={place} runs={runs} looks={looks} selected={selected} onSelect={select} grouped={false} />
          </section>
          <Charts
            place={place}
            runs={charted.map((run) => ({ run, label: run.rank === null ? run.name || run.id : `rank ${run.rank}`, look: looks.get(run.id)! }))}
            legend
            empty={charted.length ? "No rank has logged a number yet." : "Tick runs in the table to draw them here."}
          />
        </>
      )}
    </>
  );
}

function byRank(a: Run, b: Run): number {
  return (a.rank ?? Infinity) - (b.rank ?? Infinity) || a.created_at - b.created_at || (a.id < b.id ? -1 : 1);
}
