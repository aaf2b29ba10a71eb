import type { JSX } from "preact";
import type { Alert } from "../api";
import { number } from "../format";
import { Moment } from "./frame";

/** What the run wanted a person to see, newest first. */
export function Alerts({ alerts }: { alerts: Alert[] }): JSX.Element {
  return (
    <section aria-labelledby="alerts" class="panel">
      <div class="bar">
        <h2 id="alerts">
          Alerts <span class="count">{alerts.length}</span>
        </h2>
      </div>
      <ul class="alerts">
        {[...alerts].reverse().map((alert) => (
          <li key={`${alert.time} ${alert.title}`} class={`alert-${alert.level.toLowerCase()}`}>
            <span class="chip">{alert.level}</span> <strong>{alert.title}</strong> {alert.text}{" "}
            <span class="when">
              <Moment at={alert.time} />
              {alert.step !== null && ` at step ${number(alert.step)}`}
            </span>
          </li>
        ))}
      </ul>
    </section>
  );
}
