import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Place, Run, State } from "../api";
import type { Look } from "../colours";
import { duration, isLive, isNumber, number, plural, runSeconds } from "../format";
import { groupPath, Link, runPath } from "../router";
import { Moment, StateBadge, useNow } from "./frame";

const MOST_ROWS = 200;
const SUMMARY_COLUMNS = 4;

interface Props {
  place: Place;
  runs: Run[];
  looks: Map<string, Look>;
  selected: ReadonlySet<string>;
  onSelect: (ids: string[], on: boolean) => void;
  /** Fold the runs of a group into one line. */
  grouped: boolean;
}

interface Column {
  name: string;
  title: string;
  value: (run: Run, now: number) => string | number;
  class?: string;
}

const COLUMNS: Column[] = [
  { name: "state", title: "State", value: (run) => run.state },
  { name: "name", title: "Name", value: (run) => run.name, class: "name" },
  { name: "group", title: "Group", value: (run) => run.group, class: "lesser" },
  { name: "rank", title: "Rank", value: (run) => run.rank ?? -1, class: "num" },
  { name: "job_type", title: "Job type", value: (run) => run.job_type, class: "lesser" },
  { name: "attempt", title: "Attempts", value: (run) => run.attempt, class: "num" },
  { name: "steps", title: "Steps", value: (run) => run.last_step, class: "num" },
  { name: "started", title: "Started", value: (run) => run.created_at, class: "lesser" },
  { name: "duration", title: "Duration", value: runSeconds, class: "num" },
];

interface Sorting {
  column: string;
  down: boolean;
}

/** Runs, foldable by group, sortable by every column, with a box each that puts a run into the charts. */
export function RunTable({ place, runs, looks, selected, onSelect, grouped }: Props): JSX.Element {
  const [sorting, setSorting] = useState<Sorting | null>(null);
  const [unfolded, setUnfolded] = useState<ReadonlySet<string>>(new Set());
  const [most, setMost] = useState(MOST_ROWS);
  const now = useNow(1, runs.some(isLive));
  const folds = grouped && runs.some((run) => run.group);
  const open = folds ? runs.filter((run) => !run.group || unfolded.has(run.group)) : runs;
  // A column of nothing is left out: those of members while all groups are folded, for one.
  const used = (name: string): boolean => {
    if (name === "rank") return open.some((run) => run.rank !== null);
    if (name === "group") return grouped && open.some((run) => run.group);
    return name !== "job_type" || open.some((run) => run.job_type);
  };
  const columns = [
    ...COLUMNS.filter(({ name }) => used(name)),
    ...summaryKeys(runs).map((key): Column => ({ name: `:${key}`, title: key, value: (run) => (isNumber(run.summary[key]) ? run.summary[key] : -Infinity), class: "num" })),
  ];
  const by = columns.find(({ name }) => name === sorting?.column);
  const sorted = by ? [...runs].sort((a, b) => (sorting!.down ? -1 : 1) * order(by.value(a, now), by.value(b, now))) : runs;
  const lines = folds ? fold(sorted, unfolded) : sorted.map((run): TableLine => ({ run, member: false }));

  const sort = (column: string): void => setSorting((old) => (old?.column !== column ? { column, down: column !== "name" } : old.down === (column !== "name") ? { column, down: !old.down } : null));
  const toggleFold = (group: string): void =>
    setUnfolded((old) => {
      const next = new Set(old);
      if (!next.delete(group)) next.add(group);
      return next;
    });
  const cells = (run: Run): JSX.Element[] =>
    columns.map(({ name, title, class: kind }) => (
      <td key={name} class={kind} data-label={title}>
        {cell(place, run, name, now, grouped)}
      </td>
    ));
  return (
    <div class="scroll runs">
      <table>
        <thead>
          <tr>
            <th scope="col" class="pick">
              <span class="hidden">In the charts</span>
            </th>
            {columns.map(({ name, title, class: kind }) => (
              <th key={name} scope="col" class={kind} aria-sort={sorting?.column === name ? (sorting.down ? "descending" : "ascending") : undefined}>
                <button onClick={() => sort(name)} title={`Sort by ${title}`}>
                  {title}
                </button>
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {lines.slice(0, most).map((line) =>
            "group" in line ? (
              <tr key={`group ${line.group}`} class="group">
                <td class="pick">
                  <Pick label={`Chart all runs of group ${line.group}`} of={line.runs.map((run) => run.id)} selected={selected} onSelect={onSelect} />
                </td>
                <td colSpan={columns.findIndex(({ name }) => name === "attempt")}>
                  <div class="group-line">
                    <button class="fold" aria-expanded={unfolded.has(line.group)} aria-label={`Runs of group ${line.group}`} onClick={() => toggleFold(line.group)} />
                    <Link to={groupPath(place, line.group)}>{line.group}</Link>
                    <span class="muted">{plural(line.runs.length, "run")}</span>
                    <States runs={line.runs} />
                  </div>
                </td>
                {columns.slice(columns.findIndex(({ name }) => name === "attempt")).map(({ name, title, class: kind }) => (
                  <td key={name} class={kind} data-label={title}>
                    {groupCell(line.runs, name, now)}
                  </td>
                ))}
              </tr>
            ) : (
              <tr key={line.run.id} class={line.member ? "member" : ""} data-run={line.run.id}>
                <td class="pick">
                  <Pick label={`Chart ${line.run.name}`} of={[line.run.id]} selected={selected} onSelect={onSelect} look={looks.get(line.run.id)} />
                </td>
                {cells(line.run)}
              </tr>
            ),
          )}
        </tbody>
      </table>
      {lines.length > most && (
        <button class="more" onClick={() => setMost(most + MOST_ROWS)}>
          Show {number(Math.min(MOST_ROWS, lines.length - most))} more of {number(lines.length - most)}
        </button>
      )}
    </div>
  );
}

function cell(place: Place, run: Run, name: string, now: number, grouped: boolean): JSX.Element | string {
  switch (name) {
    case "state":
      return <StateBadge state={run.state} />;
    case "name":
      return (
        <Link to={runPath(place, run.id)} title={run.id}>
          {run.name || run.id}
        </Link>
      );
    case "group":
      return run.group && grouped ? <Link to={groupPath(place, run.group)}>{run.group}</Link> : run.group;
    case "rank":
      return run.rank === null ? "" : String(run.rank);
    case "job_type":
      return run.job_type;
    case "attempt":
      return run.attempt ? number(run.attempt) : "";
    case "steps":
      return run.last_step < 0 ? "" : number(run.last_step + 1);
    case "started":
      return <Moment at={run.created_at} />;
    case "duration":
      return duration(runSeconds(run, now));
    default:
      return number(run.summary[name.slice(1)]);
  }
}

/** What can be said of several runs at once: the farthest and the longest of them, and when the first began. */
function groupCell(runs: Run[], name: string, now: number): JSX.Element | string {
  const most = (value: (run: Run) => number): number => Math.max(...runs.map(value));
  const attempts = most((run) => run.attempt);
  const step = most((run) => run.last_step);
  if (name === "attempt") return attempts ? number(attempts) : "";
  if (name === "steps") return step < 0 ? "" : number(step + 1);
  if (name === "started") return <Moment at={Math.min(...runs.map((run) => run.created_at))} />;
  if (name === "duration") return duration(most((run) => runSeconds(run, now)));
  return "";
}

/** How many runs of a group are in which state. */
export function States({ runs }: { runs: Run[] }): JSX.Element {
  const counts = new Map<State, number>();
  for (const { state } of runs) counts.set(state, (counts.get(state) ?? 0) + 1);
  return (
    <span class="states">
      {[...counts].map(([state, count]) => (
        <span key={state} class={`state ${state}`}>
          {counts.size > 1 || count > 1 ? `${count} ` : ""}
          {state}
        </span>
      ))}
    </span>
  );
}

function Pick({ label, of, selected, onSelect, look }: { label: string; of: string[]; selected: ReadonlySet<string>; onSelect: Props["onSelect"]; look?: Look | undefined }): JSX.Element {
  const box = useRef<HTMLInputElement>(null);
  const on = of.filter((id) => selected.has(id)).length;
  useEffect(() => {
    box.current!.indeterminate = on > 0 && on < of.length;
  });
  return <input ref={box} type="checkbox" aria-label={label} checked={on === of.length} onChange={(e) => onSelect(of, e.currentTarget.checked)} style={look && on ? { accentColor: look.colour } : undefined} />;
}

type TableLine = { run: Run; member: boolean } | { group: string; runs: Run[] };

/** Group lines in the order of their first runs; below an unfolded one its members. */
function fold(runs: Run[], unfolded: ReadonlySet<string>): TableLine[] {
  const groups = Map.groupBy(runs, (run) => run.group);
  const seen = new Set<string>();
  return runs.flatMap((run): TableLine[] => {
    if (!run.group) return [{ run, member: false }];
    if (seen.has(run.group)) return [];
    seen.add(run.group);
    const members = groups.get(run.group)!;
    const head = { group: run.group, runs: members };
    return unfolded.has(run.group) ? [head, ...members.map((member) => ({ run: member, member: true }))] : [head];
  });
}

/** The numbers that most runs have, those that read like results first. */
function summaryKeys(runs: Run[]): string[] {
  const counts = new Map<string, number>();
  for (const run of runs) for (const [key, value] of Object.entries(run.summary)) if (isNumber(value)) counts.set(key, (counts.get(key) ?? 0) + 1);
  const weight = (key: string): number => counts.get(key)! + (/acc|loss|f1|auc|perplexity|reward|score|error/i.test(key) ? runs.length : 0);
  return [...counts.keys()].sort((a, b) => weight(b) - weight(a) || (a < b ? -1 : 1)).slice(0, SUMMARY_COLUMNS);
}

function order(a: string | number, b: string | number): number {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}
