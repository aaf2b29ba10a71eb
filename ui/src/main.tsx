import { render } from "preact";
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { api, type ApiError, whenLoggedOut } from "./api";
import { GroupPage } from "./pages/group";
import { LoginPage } from "./pages/login";
import { ProjectPage } from "./pages/project";
import { ProjectsPage } from "./pages/projects";
import { RunPage } from "./pages/run";
import { Failure, Loading } from "./parts/frame";
import { Link, parse, usePath } from "./router";
import "./style.css";
import logo from "./favicon.svg";

type Session = { is: "unknown" } | { is: "out" } | { is: "in"; name: string } | { is: "failed"; error: ApiError };

function App(): JSX.Element {
  const path = usePath();
  const [session, setSession] = useState<Session>({ is: "unknown" });
  const ask = (): void => {
    api.me().then(
      ({ user }) => setSession(user ? { is: "in", name: user.name } : { is: "out" }),
      (error) => setSession({ is: "failed", error }),
    );
  };
  useEffect(() => {
    whenLoggedOut(() => setSession({ is: "out" }));
    ask();
  }, []);
  const logout = (): void => void api.logout().finally(() => setSession({ is: "out" }));
  return (
    <>
      <a class="skip" href="#main">
        Skip to content
      </a>
      <header>
        <Link to="/" class="brand">
          <img src={logo} alt="" width="22" height="22" />
          wbdist
        </Link>
        {session.is === "in" && (
          <div class="user">
            <span title="Logged in as">{session.name}</span>
            <button onClick={logout}>Log out</button>
          </div>
        )}
      </header>
      <main id="main" tabIndex={-1}>
        {session.is === "unknown" && <Loading />}
        {session.is === "failed" && <Failure error={session.error} />}
        {session.is === "out" && <LoginPage onLogin={ask} />}
        {session.is === "in" && <Page key={path} path={path} />}
      </main>
    </>
  );
}

function Page({ path }: { path: string }): JSX.Element {
  const route = parse(path);
  switch (route.page) {
    case "projects":
      return <ProjectsPage />;
    case "project":
      return <ProjectPage place={route} />;
    case "run":
      return <RunPage place={route} id={route.run} />;
    case "group":
      return <GroupPage place={route} group={route.group} />;
    case "nowhere":
      return (
        <div class="empty-page">
          <h1>There is no such page</h1>
          <p>
            <Link to="/">All projects</Link>
          </p>
        </div>
      );
  }
}

render(<App />, document.getElementById("app")!);
