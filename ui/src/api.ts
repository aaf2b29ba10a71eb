// The server's JSON, as `wbdist/server/ui/views.py` makes it.

export type State = "pending" | "running" | "finished" | "failed" | "crashed" | "killed" | "preempting" | "preempted";

/** A number, or "NaN", "Infinity", "-Infinity", which JSON cannot say otherwise. */
export type Num = number | string;

export interface Run {
  id: string;
  name: string;
  state: State;
  group: string;
  job_type: string;
  sweep: string;
  rank: number | null;
  tags: string[];
  attempt: number;
  last_step: number;
  rows: number;
  created_at: number;
  heartbeat_at: number;
  runtime: Num | null;
  version: number;
  metrics: string[];
  summary: Record<string, unknown>;
}

export type Phase = "queued" | "down" | "startup" | "restore" | "train" | "lost" | "save" | "stop";

export interface Attempt {
  attempt: number;
  base_attempt: number | null;
  base_step: number;
  started_at: number;
  ended_at: number | null;
  cause: string;
  /** How it ended, in a word; '' while it runs. */
  end: string;
  rows: number;
  rows_live: number;
  /** Training done in vain. */
  lost_seconds: number;
  /** Seconds by phase; null where no job has written the run. */
  phases: Record<Phase, number> | null;
  live: boolean;
}

export interface RunDetail extends Run {
  config: Record<string, unknown>;
  notes: string;
  host: string;
  program: string;
  commit: string;
  repo: string;
  console_lines: number;
  attempts: Attempt[];
  /** Oldest first. */
  alerts: Alert[];
}

/** What `run.alert` said; `time` in Unix seconds. */
export interface Alert {
  title: string;
  text: string;
  level: "INFO" | "WARN" | "ERROR";
  time: number;
  step: number | null;
}

/** One line of a chart, by columns. Without `hi`, every point is one logged value. null: NaN or infinite. */
export interface Series {
  run: string;
  key: string;
  lo: number[];
  mean: (number | null)[];
  hi?: number[];
  count?: number[];
  min?: (number | null)[];
  max?: (number | null)[];
  last?: (number | null)[];
}

export interface Project {
  entity: string;
  project: string;
  runs: number;
  created_at: number;
  updated_at: number;
}

export interface User {
  name: string;
  entity: string;
}

export interface Place {
  entity: string;
  project: string;
}

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const TIMEOUT = 30_000;
let onLoggedOut: () => void = () => {};
let clockAhead = 0;

/** Called once, by the root: what happens when the server no longer knows this browser. */
export function whenLoggedOut(callback: () => void): void {
  onLoggedOut = callback;
}

/** The server's time in Unix seconds: durations must not depend on this machine's clock. */
export function serverNow(): number {
  return Date.now() / 1000 + clockAhead;
}

export function learnServerTime(now: number): void {
  clockAhead = now - Date.now() / 1000;
}

export const base = (place: Place): string => `/api/ui/${encodeURIComponent(place.entity)}/${encodeURIComponent(place.project)}`;

async function ask<T>(path: string, body?: unknown, headers: Record<string, string> = {}): Promise<T> {
  let response: Response;
  try {
    response = await fetch(path, {
      signal: AbortSignal.timeout(TIMEOUT),
      headers: body === undefined ? headers : { ...headers, "Content-Type": "application/json" },
      ...(body === undefined ? {} : { method: "POST", body: JSON.stringify(body) }),
    });
  } catch (error) {
    const slow = error instanceof DOMException && error.name === "TimeoutError";
    throw new ApiError(0, slow ? `The server did not answer within ${TIMEOUT / 1000} s.` : "The server cannot be reached.");
  }
  const answer: any = await response.json().catch(() => null);
  if (response.ok) {
    if (typeof answer?.now === "number") learnServerTime(answer.now);
    return answer as T;
  }
  if (response.status === 401) onLoggedOut();
  throw new ApiError(response.status, answer?.errors?.[0]?.message ?? `The server answered ${response.status}.`);
}

export const api = {
  me: () => ask<{ user: User | null }>("/api/ui/me"),
  /** Whose key this is. Asked before a login: to a 401 the browser itself would answer, with a password box of its own. */
  owner: (key: string) => ask<{ user: User | null }>("/api/ui/me", undefined, { Authorization: `Bearer ${key}` }),
  login: (key: string) => ask<{ ok: boolean }>("/api/ui/login", { key }),
  logout: () => ask<{ ok: boolean }>("/api/ui/logout", {}),
  projects: () => ask<{ projects: Project[] }>("/api/ui/projects"),
  runs: (place: Place, group: string | null) =>
    ask<{ runs: Run[]; limit: number }>(`${base(place)}/runs${group === null ? "" : `?group=${encodeURIComponent(group)}`}`),
  runsById: (place: Place, ids: string[]) =>
    ask<{ runs: Run[] }>(`${base(place)}/runs?${ids.map((id) => `run=${encodeURIComponent(id)}`).join("&")}`),
  run: (place: Place, id: string) => ask<{ run: RunDetail }>(`${base(place)}/runs/${encodeURIComponent(id)}`),
  console: (place: Place, id: string, query: string) =>
    ask<{ first: number; total: number; lines: string[] }>(`${base(place)}/runs/${encodeURIComponent(id)}/console?${query}`),
  series: (place: Place, runs: string[], keys: string[], buckets: number) =>
    ask<{ series: Series[] }>(`${base(place)}/series`, { runs, keys, buckets }),
};
