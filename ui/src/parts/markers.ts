// Where attempts begin: dashed lines across a chart, and labels at its top that never touch.

import type uPlot from "uplot";

/** A vertical line: where an attempt of the run begins. */
export interface Marker {
  /** Between the last step before the attempt and its first. */
  step: number;
  attempt: number;
}

interface Placed extends Marker {
  x: number;
}

interface Label {
  of: Placed[];
  text: string;
  x: number;
  width: number;
}

/** In CSS pixels. */
const SIZE = 10;
const BESIDE = 3;
const APART = 6;
const REACH = 8;

/** Those whose line is near `left`, a place in CSS pixels from the left of the plot. */
export function near(u: uPlot, markers: Marker[], left: number): Marker[] {
  return markers.filter(({ step }) => Math.abs(u.valToPos(step, "x") - left) <= REACH);
}

export function drawMarkers(u: uPlot, markers: Marker[], colour: string, font: string): void {
  const { ctx } = u;
  const ratio = devicePixelRatio;
  const { left, top, width, height } = u.bbox;
  const right = left + width;
  const inside = markers
    .map((marker): Placed => ({ ...marker, x: Math.round(u.valToPos(marker.step, "x", true)) + 0.5 }))
    .filter(({ x }) => x >= left && x <= right)
    .sort((a, b) => a.x - b.x || a.attempt - b.attempt);
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.lineWidth = ratio;
  ctx.font = font.replace(/^\d+/, String(SIZE * ratio));
  ctx.setLineDash([4 * ratio, 4 * ratio]);
  ctx.textAlign = "left";
  ctx.textBaseline = "top";
  const labels = placeLabels(inside, (text) => ctx.measureText(text).width, left, right, ratio);
  for (const { text, x } of labels) ctx.fillText(text, x, top + ratio);
  for (const line of new Set(inside.map(({ x }) => x))) {
    const under = labels.some(({ x, width: wide }) => line > x - ratio && line < x + wide + BESIDE * ratio);
    ctx.beginPath();
    ctx.moveTo(line, top + (under ? (SIZE + 4) * ratio : 0));
    ctx.lineTo(line, top + height);
    ctx.stroke();
  }
  ctx.restore();
}

/** A label beside each line, within the plot; those that would touch become one, beside the first. */
function placeLabels(lines: Placed[], measure: (text: string) => number, left: number, right: number, ratio: number): Label[] {
  const place = (of: Placed[]): Label => {
    const text = named(of);
    const width = measure(text);
    return { of, text, width, x: Math.max(left, Math.min(of[0]!.x + BESIDE * ratio, right - width)) };
  };
  const labels: Label[] = [];
  for (const line of lines) {
    let label = place([line]);
    for (let last = labels.at(-1); last && label.x < last.x + last.width + APART * ratio; last = labels.at(-1)) {
      labels.pop();
      label = place([...last.of, ...label.of]);
    }
    labels.push(label);
  }
  return labels;
}

function named(lines: Placed[]): string {
  const numbers = lines.map(({ attempt }) => attempt).sort((a, b) => a - b);
  const first = numbers[0]!;
  const last = numbers.at(-1)!;
  if (numbers.length === 1) return `attempt ${first}`;
  const all = last - first === numbers.length - 1;
  return `attempts ${first}${all ? "–" : numbers.length === 2 ? ", " : " … "}${last}`;
}
