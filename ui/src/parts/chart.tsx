import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Place, Run, Series } from "../api";
import type { Look } from "../colours";
import { number, plural } from "../format";
import { useSeries } from "../live";
import { type Marker, near } from "./markers";
import { align, hasBand, type Line, options, type Reading, readings } from "./plot";

const HEIGHT = 210;
const MOST_READINGS = 12;
const MOST_BEGINNINGS = 4;
const dark = matchMedia("(prefers-color-scheme: dark)");

export interface ChartRun {
  run: Run;
  label: string;
  look: Look;
}

interface Props {
  place: Place;
  metric: string;
  runs: ChartRun[];
  markers: Marker[];
  log: boolean;
}

/** One metric of some runs. Nothing is loaded or drawn before it scrolls near. */
export function Chart({ place, metric, runs, markers, log }: Props): JSX.Element {
  const frame = useRef<HTMLElement>(null);
  const visible = useVisible(frame);
  const { lines: series, ready, error } = useSeries(place, runs.map(({ run }) => run), metric, visible);
  const lines: Line[] = runs
    .filter(({ run }) => run.metrics.includes(metric))
    .map(({ run, label, look }) => ({ id: run.id, label, ...look, series: series.get(run.id) }));
  const [hover, setHover] = useState<Hover | null>(null);
  const gaps = lines.reduce((sum, { series: s }) => sum + (s?.mean.filter((v) => v === null).length ?? 0), 0);
  const points = lines.reduce((sum, { series: s }) => sum + (s ? (s.count?.reduce((a, b) => a + b, 0) ?? s.lo.length) : 0), 0);
  const only = lines.length === 1 ? lines[0] : undefined;
  const shown = only && (hover ? hover.readings[0]?.value : lastValue(only));
  return (
    <figure ref={frame} class="chart" data-metric={metric} data-points={ready ? points : undefined}>
      <figcaption>
        <span class="chart-name" title={metric}>
          {metric}
        </span>
        {gaps > 0 && (
          <span class="chip warn" title="NaN and infinite values are left out of the line">
            {plural(gaps, "gap")}
          </span>
        )}
        {only && <span class="chart-value">{number(shown)}</span>}
      </figcaption>
      <div class="plot" role="img" aria-label={describe(metric, lines, points, markers)}>
        {ready && points > 0 ? (
          <Plot lines={lines} markers={markers} log={log} onHover={setHover} />
        ) : (
          <p class="plot-empty">{error ?? (ready ? "No numbers yet." : visible ? "Loading…" : "")}</p>
        )}
        {hover?.inside && hover.readings.length > 0 && <Tip {...hover} single={only !== undefined} />}
      </div>
    </figure>
  );
}

function lastValue({ series }: Line): number | string | null | undefined {
  if (!series?.mean.length) return undefined;
  return (series.last ?? series.mean).at(-1) ?? "not finite";
}

function describe(metric: string, lines: Line[], points: number, markers: Marker[]): string {
  const parts = lines.slice(0, 8).map((line) => `${line.label}: last ${number(lastValue(line)) || "none"}`);
  return `Line chart of ${metric}, ${plural(points, "value")}. ${[...parts, ...markers.map(({ attempt, step }) => `attempt ${attempt} from step ${step + 0.5}`)].join("; ")}`;
}

interface Hover {
  inside: boolean;
  left: number;
  width: number;
  readings: Reading[];
  markers: Marker[];
}

function Tip({ left, width, readings: all, markers, single }: Hover & { single: boolean }): JSX.Element {
  const sorted = [...all].sort((a, b) => b.value - a.value);
  const rest = sorted.length - MOST_READINGS;
  return (
    <div class="tip" style={left > width / 2 ? { right: `${width - left + 24}px` } : { left: `${left + 60}px` }}>
      <div class="tip-step">step {all[0]!.steps}</div>
      {sorted.slice(0, MOST_READINGS).map(({ line, value, band }) => (
        <div key={line.id} class="tip-row">
          <i class="swatch" style={{ background: line.colour }} />
          {!single && <span class="tip-label">{line.label}</span>}
          <b>{number(value)}</b>
          {band && (
            <small>
              {number(band[0])} to {number(band[1])}
            </small>
          )}
        </div>
      ))}
      {rest > 0 && <div class="tip-step">and {plural(rest, "more line")}</div>}
      {markers.slice(0, MOST_BEGINNINGS).map(({ attempt, step }) => (
        <div key={attempt} class="tip-marker">
          attempt {attempt} from {step + 0.5}
        </div>
      ))}
      {markers.length > MOST_BEGINNINGS && <div class="tip-marker">and {plural(markers.length - MOST_BEGINNINGS, "more attempt")}</div>}
    </div>
  );
}

interface PlotProps {
  lines: Line[];
  markers: Marker[];
  log: boolean;
  onHover: (hover: Hover | null) => void;
}

/** Owns the uPlot instance: made anew when the kind of picture changes, fed with data otherwise. */
function Plot({ lines, markers, log, onHover }: PlotProps): JSX.Element {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const zoomed = useRef(false);
  const shown = useRef<string | null>(null);
  const now = useRef({ lines, markers });
  now.current = { lines, markers };
  const [scheme, setScheme] = useState(dark.matches);
  useEffect(() => {
    const change = (): void => setScheme(dark.matches);
    dark.addEventListener("change", change);
    return () => dark.removeEventListener("change", change);
  }, []);

  const kind = JSON.stringify([lines.map(({ id, label, colour, dash }) => [id, label, colour, dash]), hasBand(lines), log, scheme]);
  useLayoutEffect(() => {
    const element = host.current!;
    const onCursor = (u: uPlot): void => {
      const { left } = u.cursor;
      if (left === undefined || left === null || left < 0) return onHover(null);
      const x = u.posToVal(left, "x");
      const reach = 12 * Math.abs(u.posToVal(1, "x") - u.posToVal(0, "x")) + 0.5;
      const { lines: drawn, markers: begun } = now.current;
      onHover({ inside: element.matches(":hover"), left, width: u.over.clientWidth, readings: readings(drawn, x, reach), markers: near(u, begun, left) });
    };
    const u = new uPlot(
      options(now.current.lines, log, { width: element.clientWidth, height: HEIGHT }, location.pathname, { onCursor, markers: () => now.current.markers }),
      align(now.current.lines, log),
      element,
    );
    zoomed.current = false;
    shown.current = signature(now.current);
    u.over.addEventListener("mouseup", () => {
      if (u.select.width > 5) zoomed.current = true;
    });
    u.over.addEventListener("dblclick", () => (zoomed.current = false));
    plot.current = u;
    const resize = new ResizeObserver(() => {
      if (element.clientWidth && element.clientWidth !== u.width) u.setSize({ width: element.clientWidth, height: HEIGHT });
    });
    resize.observe(element);
    return () => {
      resize.disconnect();
      u.destroy();
      plot.current = null;
    };
  }, [kind]);

  // After every render: most are for a hover elsewhere and change nothing here.
  useLayoutEffect(() => {
    if (shown.current === null || shown.current === signature(now.current)) return;
    shown.current = signature(now.current);
    plot.current?.setData(align(lines, log), !zoomed.current);
    if (zoomed.current) plot.current?.redraw();
  });

  return <div ref={host} class="plot-host" />;
}

/** Changes when other data has to be drawn. */
function signature({ lines, markers }: Pick<PlotProps, "lines" | "markers">): string {
  return JSON.stringify([lines.map(({ series }) => (series ? serial(series) : 0)), markers]);
}

const serials = new WeakMap<Series, number>();
let lastSerial = 0;

function serial(series: Series): number {
  if (!serials.has(series)) serials.set(series, ++lastSerial);
  return serials.get(series)!;
}

/** True while the element is on the screen or a little outside it. */
function useVisible(ref: { current: HTMLElement | null }): boolean {
  const [visible, setVisible] = useState(false);
  useEffect(() => {
    const observer = new IntersectionObserver((entries) => setVisible(entries.at(-1)!.isIntersecting), { rootMargin: "250px" });
    observer.observe(ref.current!);
    return () => observer.disconnect();
  }, []);
  return visible;
}
