import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { number, plural } from "../format";

const FILTER_FROM = 12;
const LONG = 200;

/** Config or summary: names and values, nested ones by dotted names. */
export function Values({ title, values, empty }: { title: string; values: Record<string, unknown>; empty: string }): JSX.Element {
  const [filter, setFilter] = useState("");
  const rows = flatten(values);
  const wanted = filter.trim().toLowerCase();
  const shown = rows.filter(([key]) => key.toLowerCase().includes(wanted));
  const id = title.toLowerCase();
  return (
    <section aria-labelledby={id} class="panel">
      <div class="bar">
        <h2 id={id}>
          {title} {rows.length > 0 && <span class="count">{rows.length}</span>}
        </h2>
        {rows.length >= FILTER_FROM && (
          <input type="search" placeholder="Filter" aria-label={`Filter ${id}`} value={filter} onInput={(e) => setFilter(e.currentTarget.value)} />
        )}
      </div>
      {!rows.length && <p class="empty">{empty}</p>}
      {rows.length > 0 && !shown.length && <p class="empty">None of {plural(rows.length, "name")} has “{filter}” in it.</p>}
      <dl class="values">
        {shown.map(([key, value]) => (
          <div key={key}>
            <dt>{key}</dt>
            <dd>
              <Value value={value} />
            </dd>
          </div>
        ))}
      </dl>
    </section>
  );
}

function Value({ value }: { value: unknown }): JSX.Element {
  if (typeof value === "number") return <span title={String(value)}>{number(value)}</span>;
  const text = typeof value === "string" ? value : JSON.stringify(value);
  if (text.length <= LONG) return <>{text}</>;
  return (
    <details>
      <summary>{text.slice(0, LONG)}…</summary>
      {text.slice(LONG)}
    </details>
  );
}

function flatten(values: Record<string, unknown>, prefix = ""): [string, unknown][] {
  return Object.entries(values).flatMap(([key, value]): [string, unknown][] => {
    const nested = typeof value === "object" && value !== null && !Array.isArray(value) && !("_type" in value) && Object.keys(value).length > 0;
    return nested ? flatten(value as Record<string, unknown>, `${prefix}${key}.`) : [[prefix + key, value]];
  });
}
