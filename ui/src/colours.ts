/** Told apart also by most people who see fewer colours; readable on light and on dark. */
const PALETTE = ["#4269d0", "#f2703d", "#2fa36b", "#a463f2", "#d9a316", "#22a7c4", "#e8559a", "#9c6b4e", "#7a8fb8", "#8a8f3c"];

export interface Look {
  colour: string;
  /** The second round of the palette is dashed, the third dotted. */
  dash: number[];
}

export function look(index: number): Look {
  const dashes = [[], [8, 4], [2, 3]];
  return { colour: PALETTE[index % PALETTE.length]!, dash: dashes[Math.floor(index / PALETTE.length) % dashes.length]! };
}
