import type { JSX } from "preact";
import { useMemo, useRef, useState } from "preact/hooks";
import type { Place, Run } from "../api";
import { look, type Look } from "../colours";
import { number, plural } from "../format";
import { useRuns } from "../live";
import { Charts } from "../parts/charts";
import { Banner, Code, Crumbs, Failure, Loading, useTitle } from "../parts/frame";
import { RunTable } from "../parts/runtable";

const CHARTED_AT_FIRST = 8;
const MOST_CHARTED = 100;

export function ProjectPage({ place }: { place: Place }): JSX.Element {
  useTitle(place.project);
  const { data, error, connection } = useRuns(place, null);
  const [filter, setFilter] = useState("");
  const [picked, setPicked] = useState<ReadonlySet<string> | null>(null);
  const runs = data?.runs ?? [];
  const selected = useMemo(() => picked ?? firstPick(runs), [picked, runs]);
  const looks = useLooks(selected);
  const select = (ids: string[], on: boolean): void => {
    const next = new Set(selected);
    for (const id of ids) on ? next.add(id) : next.delete(id);
    setPicked(next);
  };
  if (error && !data) return <Failure error={error} />;
  if (!data) return <Loading />;
  const shown = runs.filter((run) => matches(run, filter));
  const charted = shown.filter((run) => selected.has(run.id)).slice(0, MOST_CHARTED);
  return (
    <>
      <Banner connection={connection} />
      <Crumbs place={place} />
      <h1>{place.project}</h1>
      {!runs.length ? (
        <div class="empty-page">
          <p>There is no run in {place.entity}/{place.project} yet. It appears here as soon as one starts:</p>
          <Code text={`wbdist.init(project="${place.project}")`} />
        </div>
      ) : (
        <>
          <section aria-labelledby="runs" class="panel">
            <div class="bar">
              <h2 id="runs">
                Runs <span class="count">{number(runs.length)}</span>
              </h2>
              <input type="search" placeholder="Filter by name, group, state, tag" aria-label="Filter runs" value={filter} onInput={(e) => setFilter(e.currentTarget.value)} />
              {runs.length >= data.limit && <span class="hint">The newest {number(data.limit)} are shown.</span>}
              {filter && <span class="hint" role="status">{plural(shown.length, "run")}</span>}
            </div>
            {shown.length ? (
              <RunTable place={place} runs={shown} looks={looks} selected={selected} onSelect={select} grouped />
            ) : (
              <p class="empty">No run matches “{filter}”.</p>
            )}
          </section>
          <Charts
            place={place}
            runs={charted.map((run) => ({ run, label: labelOf(run), look: looks.get(run.id) ?? look(0) }))}
            legend={charted.length > 1}
            empty={charted.length ? "These runs have logged no numbers yet." : "Tick runs in the table to draw them here."}
          />
        </>
      )}
    </>
  );
}

/** Made-up names of a group's runs do not tell its ranks apart. */
function labelOf(run: Run): string {
  const name = run.name || run.id;
  const told = /\br(?:ank)?[-_ ]?(\d+)$/.exec(name)?.[1] === String(run.rank);
  return run.group && run.rank !== null && !told ? `${name} (rank ${run.rank})` : name;
}

/** The newest runs; of a group all or none. */
function firstPick(runs: Run[]): ReadonlySet<string> {
  const out = new Set<string>();
  for (const run of runs) {
    if (out.size >= CHARTED_AT_FIRST) break;
    out.add(run.id);
    if (run.group) for (const other of runs) if (other.group === run.group && out.size < MOST_CHARTED) out.add(other.id);
  }
  return out;
}

/** A run keeps its colour as long as it is selected. */
function useLooks(selected: ReadonlySet<string>): Map<string, Look> {
  const slots = useRef<(string | null)[]>([]);
  return useMemo(() => {
    const list = slots.current;
    list.forEach((id, i) => {
      if (id !== null && !selected.has(id)) list[i] = null;
    });
    for (const id of selected) {
      if (list.includes(id)) continue;
      const free = list.indexOf(null);
      if (free < 0) list.push(id);
      else list[free] = id;
    }
    return new Map(list.flatMap((id, i): [string, Look][] => (id === null ? [] : [[id, look(i)]])));
  }, [selected]);
}

function matches(run: Run, filter: string): boolean {
  const text = [run.name, run.id, run.group, run.job_type, run.sweep, run.state, ...run.tags].join(" ").toLowerCase();
  return filter
    .toLowerCase()
    .split(/\s+/)
    .every((word) => text.includes(word));
}
