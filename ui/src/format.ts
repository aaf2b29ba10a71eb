import type { Run } from "./api";

const LIVE = new Set(["pending", "running", "preempting"]);

export const isLive = (run: Pick<Run, "state">): boolean => LIVE.has(run.state);

export const isNumber = (value: unknown): value is number => typeof value === "number";

/** For reading: four significant digits, and an exponent where zeros would have to be counted. */
export function number(value: unknown): string {
  if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(3).replace("e+", "e");
  return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
}

/** For axes: 12000 -> 12k. */
export function compact(value: number): string {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]] as const) {
    if (size >= unit && size < unit * 1000) return `${Number((value / unit).toPrecision(4))}${letter}`;
  }
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

export function duration(seconds: number): string {
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)}s`;
  if (s < 60) return `${Math.round(s)}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m ${Math.floor(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h ${Math.floor((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86400)}d ${Math.floor((s % 86400) / 3600)}h`;
}

export function ago(seconds: number): string {
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} d ago`;
}

const DAY_TIME = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const FULL = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });

export const moment = (unix: number): string => DAY_TIME.format(unix * 1000);
export const fullMoment = (unix: number): string => FULL.format(unix * 1000);

/** How long a run has run: its own count over all attempts; without one, from its start to its last sign of life. */
export function runSeconds(run: Run, now: number): number {
  if (isLive(run) && run.attempt <= 1) return now - run.created_at;
  return isNumber(run.runtime) ? run.runtime : run.heartbeat_at - run.created_at;
}

export const plural = (count: number, one: string): string => `${number(count)} ${one}${count === 1 ? "" : "s"}`;
