// What keeps a page up to date: one event stream a page tells which runs changed; the page then asks for those.

import { useEffect, useRef, useState } from "preact/hooks";
import { api, ApiError, base, learnServerTime, type Place, type Run, type RunDetail, type Series } from "./api";

export type Connection = "connecting" | "live" | "lost";
type Versions = Record<string, number>;

const SILENCE = 30_000; // ms; the server says something every 10 s
const PATIENCE = 3_000; // ms; a stream that ends and comes back at once is not worth a word
const GAP = 800; // ms; the least between two requests for the same thing

/** Follows the runs of `query` (run=…, group=…, or nothing for the project). A hidden tab does not: browsers allow six connections. */
export function useLive(place: Place, query: string, onVersions: (versions: Versions) => void): Connection {
  const [connection, setConnection] = useState<Connection>("connecting");
  const callback = useRef(onVersions);
  callback.current = onVersions;
  const url = `${base(place)}/events${query && `?${query}`}`;
  useEffect(() => {
    let source: EventSource | null = null;
    let watchdog = 0;
    let worry = 0;
    const heard = (): void => {
      clearTimeout(watchdog);
      clearTimeout(worry);
      worry = 0;
      watchdog = window.setTimeout(reopen, SILENCE);
      setConnection("live");
    };
    const lost = (): void => {
      worry ||= window.setTimeout(() => setConnection("lost"), PATIENCE);
      // The browser tries again by itself, except after an answer that is no stream (a proxy's 502, or a full server).
      if (source?.readyState === EventSource.CLOSED) {
        clearTimeout(watchdog);
        watchdog = window.setTimeout(reopen, PATIENCE);
      }
    };
    const close = (): void => {
      source?.close();
      clearTimeout(watchdog);
    };
    const open = (): void => {
      source = new EventSource(url);
      const time = (event: MessageEvent): void => {
        heard();
        learnServerTime(Number(event.lastEventId));
      };
      source.onopen = heard;
      source.onerror = lost;
      source.addEventListener("beat", time);
      source.addEventListener("versions", (event) => {
        time(event);
        callback.current(JSON.parse(event.data) as Versions);
      });
    };
    const reopen = (): void => {
      close();
      lost();
      open();
    };
    const show = (): void => {
      close();
      if (!document.hidden) open();
    };
    show();
    document.addEventListener("visibilitychange", show);
    return () => {
      document.removeEventListener("visibilitychange", show);
      close();
      clearTimeout(worry);
    };
  }, [url]);
  return connection;
}

/** Runs `work` when asked to, never twice at once, with a pause in between that grows with what it takes. */
export class Pump {
  private busy = false;
  private again = false;
  private stopped = false;
  private timer = 0;

  constructor(private work: () => Promise<void>) {}

  ask(): void {
    if (this.stopped) return;
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    this.again = false;
    const started = performance.now();
    void this.work().finally(() => {
      this.timer = window.setTimeout(
        () => {
          this.busy = false;
          if (this.again) this.ask();
        },
        Math.max(GAP, 4 * (performance.now() - started)),
      );
    });
  }

  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
  }
}

export interface Loaded<T> {
  data: T | null;
  error: ApiError | null;
  connection: Connection;
}

const asError = (error: unknown): ApiError => (error instanceof ApiError ? error : new ApiError(0, String(error)));

/** The runs of a project, or of a group in it, kept up to date. */
export function useRuns(place: Place, group: string | null): Loaded<{ runs: Run[]; limit: number }> {
  const [data, setData] = useState<{ runs: Run[]; limit: number } | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const state = useRef<{ changed: Versions; pump: Pump | null; known: Map<string, Run> }>({ changed: {}, pump: null, known: new Map() });

  useEffect(() => {
    const here = state.current;
    here.known = new Map();
    here.changed = {};
    let whole = true;
    let limit = 0;
    const pump = new Pump(async () => {
      const ids = Object.entries(here.changed).filter(([id, version]) => here.known.get(id)?.version !== version).map(([id]) => id);
      here.changed = {};
      if (!whole && !ids.length) return;
      try {
        if (whole || ids.length > 100) {
          const answer = await api.runs(place, group);
          limit = answer.limit;
          here.known = new Map(answer.runs.map((run) => [run.id, run]));
        } else {
          for (const run of (await api.runsById(place, ids)).runs) here.known.set(run.id, run);
        }
        whole = false;
        setError(null);
        setData({ runs: [...here.known.values()].sort((a, b) => b.created_at - a.created_at), limit });
      } catch (failure) {
        whole = true; // the next event, or the reconnect, brings the rest
        setError(asError(failure));
      }
    });
    here.pump = pump;
    pump.ask();
    return () => pump.stop();
  }, [place.entity, place.project, group]);

  const connection = useLive(place, group === null ? "" : `group=${encodeURIComponent(group)}`, (versions) => {
    Object.assign(state.current.changed, versions);
    state.current.pump?.ask();
  });
  return { data, error, connection };
}

/** One run with everything but its lines, kept up to date. */
export function useRun(place: Place, id: string): Loaded<RunDetail> {
  const [data, setData] = useState<RunDetail | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const pump = useRef<Pump | null>(null);
  useEffect(() => {
    const own = new Pump(async () => {
      try {
        setData((await api.run(place, id)).run);
        setError(null);
      } catch (failure) {
        setError(asError(failure));
      }
    });
    pump.current = own;
    own.ask();
    return () => own.stop();
  }, [place.entity, place.project, id]);
  const connection = useLive(place, `run=${encodeURIComponent(id)}`, (versions) => {
    if (versions[id] !== data?.version) pump.current?.ask();
  });
  return { data, error, connection };
}

// Series -------------------------------------------------------------------------------------------------

interface Wish {
  place: Place;
  runs: string[];
  key: string;
  resolve: (series: Series[]) => void;
  reject: (error: unknown) => void;
}

let wishes: Wish[] = [];
const BUCKETS = 600;
const MOST_SERIES = 500;

/** Charts that come into view together become one request. */
function fetchSeries(place: Place, runs: string[], key: string): Promise<Series[]> {
  return new Promise((resolve, reject) => {
    if (!wishes.length) setTimeout(grant, 20);
    wishes.push({ place, runs, key, resolve, reject });
  });
}

function grant(): void {
  const batches = new Map<string, Wish[]>();
  for (const wish of wishes) {
    const same = JSON.stringify([wish.place, wish.runs]);
    batches.set(same, [...(batches.get(same) ?? []), wish]);
  }
  wishes = [];
  for (const batch of batches.values()) {
    const { place, runs } = batch[0]!;
    const size = Math.max(1, Math.floor(MOST_SERIES / runs.length));
    for (let at = 0; at < batch.length; at += size) {
      const part = batch.slice(at, at + size);
      api.series(place, runs, part.map((wish) => wish.key), BUCKETS).then(
        ({ series }) => part.forEach((wish) => wish.resolve(series.filter((one) => one.key === wish.key))),
        (error) => part.forEach((wish) => wish.reject(error)),
      );
    }
  }
}

export interface SeriesState {
  lines: Map<string, Series>;
  ready: boolean;
  error: string | null;
}

/** One metric of some runs, loaded when `visible`, and again when a run has a new version. */
export function useSeries(place: Place, runs: Run[], key: string, visible: boolean): SeriesState {
  const [state, setState] = useState<SeriesState>({ lines: new Map(), ready: false, error: null });
  const now = useRef({ runs, visible });
  now.current = { runs, visible };
  const have = useRef(new Map<string, { version: number; series: Series | null }>());
  const pump = useRef<Pump | null>(null);
  useEffect(() => {
    have.current = new Map();
    let retry = 0;
    const own = new Pump(async () => {
      if (!now.current.visible) return;
      const stale = now.current.runs.filter((run) => have.current.get(run.id)?.version !== run.version && run.metrics.includes(key));
      try {
        if (stale.length) {
          const answer = await fetchSeries(place, stale.map((run) => run.id), key);
          const byRun = new Map(answer.map((series) => [series.run, series]));
          for (const run of stale) have.current.set(run.id, { version: run.version, series: byRun.get(run.id) ?? null });
        }
        const lines = new Map<string, Series>();
        for (const [id, { series }] of have.current) if (series) lines.set(id, series);
        setState({ lines, ready: true, error: null });
      } catch (failure) {
        setState((old) => ({ ...old, error: asError(failure).message }));
        retry = window.setTimeout(() => own.ask(), PATIENCE);
      }
    });
    pump.current = own;
    return () => {
      own.stop();
      clearTimeout(retry);
    };
  }, [place.entity, place.project, key]);
  const wanted = visible ? runs.map((run) => `${run.id}:${run.version}`).join() : "";
  useEffect(() => {
    if (visible) pump.current?.ask();
  }, [wanted, visible, key]);
  return state;
}
