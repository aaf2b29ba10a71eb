import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { api } from "../api";
import { Code, useTitle } from "../parts/frame";

export function LoginPage({ onLogin }: { onLogin: () => void }): JSX.Element {
  useTitle("Log in");
  const [key, setKey] = useState("");
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  const submit = async (event: Event): Promise<void> => {
    event.preventDefault();
    setBusy(true);
    try {
      // Other characters cannot be part of a key, nor travel in a header.
      if (/^[!-~]+$/.test(key.trim()) && (await api.owner(key.trim())).user) {
        await api.login(key.trim());
        onLogin();
      } else setError("That is not a key of this server.");
    } catch (failure) {
      setError(failure instanceof Error ? failure.message : String(failure));
    } finally {
      setBusy(false);
    }
  };
  return (
    <form class="login panel" onSubmit={submit}>
      <h1>Log in</h1>
      {/* For password managers: they file a key under a name. */}
      <input type="text" name="user" value="api" autocomplete="username" readOnly hidden />
      <label for="key">API key</label>
      <input
        id="key"
        type="password"
        autocomplete="current-password"
        spellcheck={false}
        autofocus
        required
        value={key}
        onInput={(e) => setKey(e.currentTarget.value)}
        aria-describedby="key-help"
        aria-invalid={error !== ""}
      />
      <div role="alert">{error && <p class="failure">{error}</p>}</div>
      <button class="primary" disabled={busy || !key.trim()}>
        Log in
      </button>
      <div id="key-help" class="help">
        On the machine of the server, this prints the key:
        <Code text="wbdist server key" />
      </div>
    </form>
  );
}
