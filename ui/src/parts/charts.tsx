import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { Place } from "../api";
import { plural } from "../format";
import { Chart, type ChartRun } from "./chart";
import type { Marker } from "./markers";

const FILTER_FROM = 7;

interface Props {
  place: Place;
  runs: ChartRun[];
  markers?: Marker[];
  /** What to say when there is nothing to draw. */
  empty: string;
  /** Names of the lines, once above all charts; a single line needs none. */
  legend?: boolean;
}

/** A grid with one chart a metric. */
export function Charts({ place, runs, markers = [], empty, legend = false }: Props): JSX.Element {
  const [filter, setFilter] = useState("");
  const [log, setLog] = useState(false);
  const all = [...new Set(runs.flatMap(({ run }) => run.metrics))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const wanted = filter.trim().toLowerCase();
  const metrics = all.filter((name) => name.toLowerCase().includes(wanted));
  return (
    <section aria-labelledby="charts">
      <div class="bar">
        <h2 id="charts">
          Charts {all.length > 0 && <span class="count">{all.length}</span>}
        </h2>
        {all.length >= FILTER_FROM && (
          <input type="search" placeholder="Filter metrics" aria-label="Filter metrics" value={filter} onInput={(e) => setFilter(e.currentTarget.value)} />
        )}
        {all.length > 0 && (
          <label class="toggle">
            <input type="checkbox" checked={log} onChange={(e) => setLog(e.currentTarget.checked)} /> Log scale
          </label>
        )}
        {all.length > 0 && <span class="hint charts-hint">Drag to zoom, double-click to reset.</span>}
      </div>
      {legend && all.length > 0 && (
        <ul class="legend" aria-label="Lines">
          {runs.map(({ run, label, look }) => (
            <li key={run.id}>
              <i class="swatch" style={{ background: look.colour }} />
              {label}
            </li>
          ))}
        </ul>
      )}
      {!all.length && <p class="empty">{empty}</p>}
      {all.length > 0 && !metrics.length && <p class="empty">None of {plural(all.length, "metric")} has “{filter}” in its name.</p>}
      <div class="charts">
        {metrics.map((metric) => (
          <Chart key={metric} place={place} metric={metric} runs={runs} markers={markers} log={log} />
        ))}
      </div>
    </section>
  );
}
