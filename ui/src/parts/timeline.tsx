import type { JSX } from "preact";
import type { Attempt, Phase } from "../api";
import { duration, plural } from "../format";

/** In the order of an attempt's life; what was in vain stands beside what was not. */
const PHASES: [Phase, string][] = [
  ["queued", "queued"],
  ["down", "down"],
  ["startup", "start-up"],
  ["restore", "restore"],
  ["train", "train"],
  ["lost", "lost"],
  ["save", "save"],
  ["stop", "stop"],
];

const MEANING: Record<Phase, string> = {
  queued: "Waiting for machines",
  down: "From the end of the attempt before to the start of this one",
  startup: "From the start of the process to the first step",
  restore: "Finding, fetching and loading a checkpoint",
  train: "Training that is in the history",
  lost: "Training that no later attempt went on from",
  save: "Pauses for saves",
  stop: "From the end of training to the end of the run",
};

/** Where the wall-clock time of the job went: of all its attempts in numbers, of the last `bars` as bars to one scale. Nothing for runs that no job has written. */
export function Timeline({ attempts, bars }: { attempts: Attempt[]; bars: number }): JSX.Element | null {
  const timed = attempts.flatMap(({ attempt, phases }) => (phases ? [{ attempt, phases, all: total(Object.values(phases)) }] : []));
  const all = total(timed.map((one) => one.all));
  if (!all) return null;
  const shown = timed.slice(-bars);
  const longest = Math.max(...shown.map((one) => one.all));
  const sums = PHASES.map(([phase, word]) => ({ phase, word, seconds: total(timed.map((one) => one.phases[phase])) })).filter((sum) => sum.seconds);
  const trained = sums.find((sum) => sum.phase === "train")?.seconds ?? 0;
  return (
    <div class="timeline">
      <p>
        <b>Goodput {((100 * trained) / all).toFixed(1)} %</b> of {duration(all)} over {plural(timed.length, "attempt")}
      </p>
      <ol>
        {shown.map((one) => (
          <li key={one.attempt}>
            <span class="num">{one.attempt}</span>
            <div role="img" aria-label={`Attempt ${one.attempt}: ${told(one.phases)}`} style={{ width: `${(100 * one.all) / longest}%` }}>
              {PHASES.filter(([phase]) => one.phases[phase]).map(([phase, word]) => (
                <i key={phase} class={`phase ${phase}`} title={`${word} ${duration(one.phases[phase])}`} style={{ flexGrow: one.phases[phase] }} />
              ))}
            </div>
          </li>
        ))}
      </ol>
      <ul class="legend">
        {sums.map(({ phase, word, seconds }) => (
          <li key={phase} title={MEANING[phase]}>
            <i class={`phase ${phase}`} aria-hidden="true" />
            {word} <span class="count">{duration(seconds)}</span>
          </li>
        ))}
      </ul>
    </div>
  );
}

const total = (numbers: number[]): number => numbers.reduce((sum, one) => sum + one, 0);

const told = (phases: Record<Phase, number>): string =>
  PHASES.filter(([phase]) => phases[phase])
    .map(([phase, word]) => `${word} ${duration(phases[phase])}`)
    .join(", ");
