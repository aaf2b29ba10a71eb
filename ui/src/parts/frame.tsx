import type { ComponentChildren, JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { serverNow, type ApiError, type Place, type State } from "../api";
import { ago, fullMoment, moment } from "../format";
import type { Connection } from "../live";
import { Link, projectPath } from "../router";

/** The state in words, with a colour on top. */
export function StateBadge({ state }: { state: State }): JSX.Element {
  return <span class={`state ${state}`}>{state}</span>;
}

export function Crumbs({ place, children }: { place: Place; children?: ComponentChildren }): JSX.Element {
  return (
    <nav class="crumbs" aria-label="Breadcrumb">
      <Link to="/">Projects</Link>
      <span aria-hidden="true">/</span>
      {children ? <Link to={projectPath(place)}>{place.project}</Link> : <span aria-current="page">{place.project}</span>}
      {children && <span aria-hidden="true">/</span>}
      {children}
    </nav>
  );
}

/** Says so when what is shown may be old. */
export function Banner({ connection }: { connection: Connection }): JSX.Element {
  return (
    <div role="status" aria-live="polite">
      {connection === "lost" && (
        <p class="banner">The live connection is lost: what you see may be old. Trying again…</p>
      )}
    </div>
  );
}

export function Failure({ error }: { error: ApiError }): JSX.Element {
  return (
    <p class="failure" role="alert">
      {error.message} <button onClick={() => location.reload()}>Try again</button>
    </p>
  );
}

export function Loading(): JSX.Element {
  return (
    <p class="loading" role="status">
      Loading…
    </p>
  );
}

/** A component that is drawn again every `seconds`, with the server's time. */
export function useNow(seconds: number, active = true): number {
  const [now, setNow] = useState(serverNow());
  useEffect(() => {
    if (!active) return;
    const timer = setInterval(() => setNow(serverNow()), seconds * 1000);
    return () => clearInterval(timer);
  }, [seconds, active]);
  return active ? Math.max(now, serverNow() - seconds) : now;
}

export function Moment({ at, relative = false }: { at: number; relative?: boolean }): JSX.Element {
  return (
    <time dateTime={new Date(at * 1000).toISOString()} title={fullMoment(at)}>
      {relative ? ago(serverNow() - at) : moment(at)}
    </time>
  );
}

export function useTitle(...parts: string[]): void {
  const title = [...parts, "wbdist"].join(" · ");
  useEffect(() => {
    document.title = title;
  }, [title]);
}

export function Code({ text }: { text: string }): JSX.Element {
  return (
    <pre class="code">
      <code>{text}</code>
    </pre>
  );
}
