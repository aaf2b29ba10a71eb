// The uPlot side of a chart: data alignment, options, what stands near the cursor.

import uPlot from "uplot";
import type { Series } from "../api";
import type { Look } from "../colours";
import { compact } from "../format";
import { drawMarkers, type Marker } from "./markers";

export interface Line extends Look {
  id: string;
  label: string;
  series: Series | undefined;
}

/** Bands of more lines than this hide the lines. */
export const MOST_BANDS = 6;

export const isBucketed = (line: Line): boolean => line.series?.hi !== undefined;
export const hasBand = (lines: Line[]): boolean => lines.length <= MOST_BANDS && lines.some(isBucketed);

/** Where on the x axis the points of a series lie: in the middle of their bucket. */
export function positions(series: Series): number[] {
  const { lo, hi } = series;
  return hi ? lo.map((low, i) => (low + hi[i]!) / 2) : lo;
}

/** One x column and, for each line, its mean, or its mean, minimum and maximum when bands are drawn. */
export function align(lines: Line[], log: boolean): uPlot.AlignedData {
  const visible = (values: (number | null)[]): (number | null)[] => (log ? values.map((v) => (v !== null && v > 0 ? v : null)) : values);
  const bands = hasBand(lines);
  const tables = lines.map(({ series }): uPlot.AlignedData => {
    if (!series) return bands ? [[], [], [], []] : [[], []];
    const mean = visible(series.mean);
    if (!bands) return [positions(series), mean];
    return [positions(series), mean, visible(series.min ?? series.mean), visible(series.max ?? series.mean)];
  });
  if (tables.length === 1) return tables[0]!;
  return tables.length ? uPlot.join(tables) : [[]];
}

export interface Hooks {
  onCursor: (u: uPlot) => void;
  markers: () => Marker[];
}

/** Colours come from the style sheet, so that light and dark are decided in one place. */
function styles(): { text: string; grid: string; font: string; marker: string } {
  const css = getComputedStyle(document.documentElement);
  const get = (name: string): string => css.getPropertyValue(name).trim();
  return { text: get("--muted"), grid: get("--grid"), marker: get("--marker"), font: `11px ${getComputedStyle(document.body).fontFamily}` };
}

export function options(lines: Line[], log: boolean, size: { width: number; height: number }, sync: string, hooks: Hooks): uPlot.Options {
  const { text, grid, font, marker } = styles();
  const axis = { stroke: text, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, gap: 6 };
  const bands = hasBand(lines);
  const hidden = { stroke: "transparent", width: 0, points: { show: false } };
  const series: uPlot.Series[] = [{}];
  for (const { label, colour, dash } of lines) {
    series.push({ label, stroke: colour, width: 1.5, dash, points: { size: 6, fill: colour } });
    if (bands) series.push({ ...hidden, label: `${label} min` }, { ...hidden, label: `${label} max` });
  }
  return {
    ...size,
    padding: [10, 12, 0, 4],
    series,
    bands: bands ? lines.map(({ colour }, i) => ({ series: [3 * i + 3, 3 * i + 2] as [number, number], fill: `${colour}2e` })) : [],
    legend: { show: false },
    scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
    axes: [
      { ...axis, size: 28, incrs: STEPS, values: (_u, splits) => splits.map(compact) },
      {
        ...axis,
        values: (_u, splits) => splits.map((v) => (v === null ? "" : compact(v))),
        size: (_u, values) => 16 + 6.5 * Math.max(3, ...(values ?? []).map((v) => v?.length ?? 0)),
      },
    ],
    cursor: {
      sync: { key: sync, setSeries: false },
      drag: { x: true, y: false, dist: 5 },
      points: { size: 6, width: 0, show: !bands },
      y: false,
    },
    hooks: {
      setCursor: [hooks.onCursor],
      drawAxes: [(u) => drawMarkers(u, hooks.markers(), marker, font)],
    },
  };
}

const STEPS = Array.from({ length: 13 }, (_, i) => [1, 2, 5].map((m) => m * 10 ** i)).flat();

export interface Reading {
  line: Line;
  steps: string;
  value: number;
  band: [number, number] | null;
}

/** What each line says nearest to x, if it is near: lines of different runs have points at different steps. */
export function readings(lines: Line[], x: number, reach: number): Reading[] {
  const out: Reading[] = [];
  for (const line of lines) {
    const { series } = line;
    if (!series?.lo.length) continue;
    const at = nearest(series, x);
    const value = series.mean[at];
    if (value === null || value === undefined) continue;
    const low = series.lo[at]!;
    const high = series.hi?.[at] ?? low;
    if (x < low - reach || x > high + reach) continue;
    const min = series.min?.[at];
    const max = series.max?.[at];
    const several = (series.count?.[at] ?? 1) > 1 && typeof min === "number" && typeof max === "number";
    out.push({ line, value, steps: low === high ? String(low) : `${low}–${high}`, band: several ? [min, max] : null });
  }
  return out;
}

function nearest(series: Series, x: number): number {
  const middle = (i: number): number => (series.lo[i]! + (series.hi?.[i] ?? series.lo[i]!)) / 2;
  let low = 0;
  let high = series.lo.length - 1;
  while (low < high) {
    const between = (low + high) >> 1;
    if (middle(between) < x) low = between + 1;
    else high = between;
  }
  return low > 0 && x - middle(low - 1) < middle(low) - x ? low - 1 : low;
}
