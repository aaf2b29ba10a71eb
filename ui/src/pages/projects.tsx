import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { api, type ApiError, type Project } from "../api";
import { number } from "../format";
import { Code, Failure, Loading, Moment, useTitle } from "../parts/frame";
import { Link, projectPath } from "../router";

const REFRESH = 10_000; // ms

const FIRST_RUN = `import wbdist

with wbdist.init(project="hello") as run:
    for step in range(100):
        run.log({"loss": 1 / (step + 1)})`;

export function ProjectsPage(): JSX.Element {
  useTitle();
  const [projects, setProjects] = useState<Project[] | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  useEffect(() => {
    const load = (): void => {
      if (document.hidden) return;
      api.projects().then(
        (answer) => {
          setProjects(answer.projects);
          setError(null);
        },
        setError,
      );
    };
    load();
    const timer = setInterval(load, REFRESH);
    return () => clearInterval(timer);
  }, []);
  if (error) return <Failure error={error} />;
  if (!projects) return <Loading />;
  if (!projects.length)
    return (
      <div class="empty-page">
        <h1>No projects yet</h1>
        <p>A project appears here with its first run. Try this on the machine of the server:</p>
        <Code text={FIRST_RUN} />
        <p>
          From another machine, log in first: <code>wbdist login --host {location.origin}</code>
        </p>
      </div>
    );
  return (
    <>
      <h1>Projects</h1>
      <ul class="cards">
        {projects.map((project) => (
          <li key={projectPath(project)}>
            <Link to={projectPath(project)} class="card panel">
              <b>{project.project}</b>
              <span class="muted">{project.entity}</span>
              <span class="muted">
                {number(project.runs)} {project.runs === 1 ? "run" : "runs"} · active <Moment at={project.updated_at} relative />
              </span>
            </Link>
          </li>
        ))}
      </ul>
    </>
  );
}
