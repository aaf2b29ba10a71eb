import type { ComponentChildren, JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { Place } from "./api";

export type Route =
  | { page: "projects" }
  | ({ page: "project" } & Place)
  | ({ page: "run"; run: string } & Place)
  | ({ page: "group"; group: string } & Place)
  | { page: "nowhere" };

export function parse(path: string): Route {
  let parts: string[];
  try {
    parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    return { page: "nowhere" };
  }
  const [entity, project, kind, ...rest] = parts;
  if (!entity) return { page: "projects" };
  if (!project) return { page: "nowhere" };
  if (!kind) return { page: "project", entity, project };
  if (kind === "runs" && rest.length === 1) return { page: "run", entity, project, run: rest[0]! };
  if (kind === "groups" && rest.length > 0) return { page: "group", entity, project, group: rest.join("/") };
  return { page: "nowhere" };
}

const enc = encodeURIComponent;
export const projectPath = ({ entity, project }: Place): string => `/${enc(entity)}/${enc(project)}`;
export const runPath = (place: Place, run: string): string => `${projectPath(place)}/runs/${enc(run)}`;
/** `id:2` is the run `id` as its attempt 2 saw it. */
export function incarnation(id: string): { run: string; attempt: number | null } {
  const found = /^(.+):(\d+)$/.exec(id);
  return found ? { run: found[1]!, attempt: Number(found[2]) } : { run: id, attempt: null };
}
export const groupPath = (place: Place, group: string): string => `${projectPath(place)}/groups/${enc(group)}`;

export function usePath(): string {
  const [path, setPath] = useState(location.pathname);
  useEffect(() => {
    const follow = (): void => setPath(location.pathname);
    addEventListener("popstate", follow);
    return () => removeEventListener("popstate", follow);
  }, []);
  return path;
}

/** A link within the pages: no reload, but a real address for new tabs and bookmarks. */
export function Link({ to, children, ...rest }: { to: string; children: ComponentChildren; class?: string; title?: string; "aria-current"?: "page" }): JSX.Element {
  const go = (event: MouseEvent): void => {
    if (event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    history.pushState(null, "", to);
    dispatchEvent(new PopStateEvent("popstate"));
    scrollTo(0, 0);
  };
  return (
    <a href={to} onClick={go} {...rest}>
      {children}
    </a>
  );
}
