import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { api, type Place, type RunDetail } from "../api";
import { number } from "../format";

const TAIL = 500;
const MOST = 5000;
const LINE = /^(ERROR )?(\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)[.\d]*) (.*)$/s;
// Colours and cursor movements of terminals: left out.
const ESCAPES = /\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;

interface Tail {
  attempt: number;
  first: number;
  lines: string[];
}

/** The last console lines; follows new ones while it is scrolled to the end. */
export function Console({ place, run }: { place: Place; run: RunDetail }): JSX.Element {
  const [tail, setTail] = useState<Tail | null>(null);
  const [error, setError] = useState("");
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);

  useEffect(() => {
    let current = true;
    // A new attempt takes lines back: what was read before it counts no more.
    const known = tail && tail.attempt === run.attempt && tail.first + tail.lines.length <= run.console_lines ? tail : null;
    const next = known ? known.first + known.lines.length : -1;
    if (next === run.console_lines) return;
    api
      .console(place, run.id, known ? `first=${next}` : `last=${TAIL}`)
      .then(({ first, lines }) => {
        if (!current) return;
        const all = known ? [...known.lines, ...lines] : lines;
        const cut = Math.max(0, all.length - MOST);
        setTail({ attempt: run.attempt, first: (known ? known.first : first) + cut, lines: all.slice(cut) });
        setError("");
      })
      .catch((failure) => current && setError(String(failure.message)));
    return () => {
      current = false;
    };
  }, [run.console_lines, run.attempt]);

  useLayoutEffect(() => {
    if (follows.current && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [tail]);

  const onScroll = (): void => {
    const { scrollTop, scrollHeight, clientHeight } = box.current!;
    follows.current = scrollHeight - scrollTop - clientHeight < 24;
  };
  return (
    <section aria-labelledby="console" class="panel">
      <div class="bar">
        <h2 id="console">Console</h2>
        {tail && tail.first > 0 && <span class="hint">the last {number(tail.lines.length)} of {number(tail.first + tail.lines.length)} lines</span>}
      </div>
      {error && <p class="empty">{error}</p>}
      {!tail?.lines.length && !error && <p class="empty">{run.console_lines ? "Loading…" : "Nothing was printed, or console capture is off."}</p>}
      {tail && tail.lines.length > 0 && (
        <div class="console" ref={box} onScroll={onScroll} tabIndex={0} role="log" aria-label="Console output">
          {tail.lines.map((line, i) => (
            <Line key={tail.first + i} line={line} />
          ))}
        </div>
      )}
    </section>
  );
}

function Line({ line }: { line: string }): JSX.Element {
  const [, isError, stamp, time, text] = LINE.exec(line) ?? [null, "", "", "", line];
  // A progress bar rewrites its line; its last state is what a terminal would show.
  const last = (text ?? "").replace(ESCAPES, "").replace(/\r+$/, "").split("\r").at(-1);
  return (
    <div class={isError ? "stderr" : undefined}>
      {time && <time title={stamp}>{time}</time>}
      {last || " "}
    </div>
  );
}
