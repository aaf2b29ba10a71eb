"""What a run does with files: saves and restores them, keeps its script. What that takes is loaded when it is first used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wbdist.errors import JournalError
from wbdist.run.facts import RunFacts
from wbdist.run.values import summary_values

if TYPE_CHECKING:
    import os

    from wbdist.run.files import SavedFiles
    from wbdist.run.handle import Run
    from wbdist.run.restoring import RestoredFile


class FileMethods(RunFacts):
    """Part of `Run`."""

    _files: SavedFiles | None = None

    def save(
        self,
        glob_str: str | bytes | os.PathLike[str] | None = None,
        base_path: str | os.PathLike[str] | None = None,
        policy: str = "live",
        glob: bool = True,
    ) -> list[str] | bool:
        """Keeps the files that match now with the run; returns their places in `dir`. Waits for no server.

        `policy`: "live" uploads now, again when a file changes, and at the end; "now" once, as it is now; "end" at the
        end. What a call saves is set aside before it returns, so the file may be written again at once (a live one
        above 64 MiB, on a file system that cannot share blocks, is read in the background instead). Names keep the
        directories below the working directory or `base_path`; of an absolute path the last one. `glob=False` takes the
        path literally. A file that cannot be read is said, and fails nothing else.

        Without arguments, as after renaming a run: what was set is durable already; True. A disabled run: False.
        Raises ValueError for a policy, a pattern or a base_path that cannot be; ShutdownError, UsageError as `log`.
        """
        self._check_usable("save()")
        if glob_str is None:
            return True
        if self.disabled:
            return False
        return self._saved_files().save(glob_str, base_path, policy, glob)

    def restore(
        self, name: str | os.PathLike[str], run_path: str | None = None, replace: bool = False, root: str | None = None
    ) -> RestoredFile | None:
        """The newest version of a file of this run (or of `run_path`), open for reading bytes, and usable as a path; its
        `name` is where it lies. See `restoring.restore`."""
        from wbdist.run.restoring import restore_for

        return restore_for(cast("Run", self), name, run_path, replace, root)

    def keep_code(self) -> None:
        """Keeps the running script with the run, below `code/` (nothing in an interactive session), and what its checkout has
        changed since its commit, where git is allowed. Blocks for git, at most 10 s. Raises as `save`."""
        from wbdist.run import own_files

        if self._run_directory is None:
            return
        names = [own_files.keep_main_script(Path(self.dir))]
        if not self.settings.disable_git:
            names.append(own_files.keep_diff(Path(self.dir)))
        for name in filter(None, names):
            self._saved_files().add(name)

    def _keep_own_files(self, config: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """config.yaml and the like. That they cannot be written is said; nothing that was logged is lost by it."""
        if self._run_directory is None or self._spec.role != "run" or not self.settings.x_primary:
            return
        from wbdist.run import own_files

        git = not self.settings.disable_git
        try:
            names = own_files.write(Path(self.dir), config, summary, self.opened_at, git=git)
        except (OSError, TypeError) as error:
            self._say(f"run {self.id}: config.yaml and the like cannot be kept: {error}", warning=True)
            return
        for name in names:
            self._saved_files().add(name)

    def _saved_files(self) -> SavedFiles:
        if self._files is None:
            from wbdist.run.files import SavedFiles
            from wbdist.run.journal import JournalWriter

            assert isinstance(self._journal, JournalWriter)
            assert self._run_directory is not None
            self._files = SavedFiles(
                self._journal,
                self._run_directory.absolute(),
                lambda text: self._say(text, warning=True),
                self.settings.ignore_globs,
            )
        return self._files

    def _with_files(self, data: Mapping[Any, Any], step: int | str) -> dict[Any, Any]:
        """`data` with its media written to the run's files, and records of them in their places."""
        from wbdist.run.media.rows import converted

        assert self._run_directory is not None, "a disabled run keeps no values"
        try:
            made, written = converted(data, step, self._run_directory.absolute() / "files")
        except OSError as error:
            raise JournalError(f"run {self.id}: a file of {', '.join(map(str, data))} cannot be written: {error}") from error
        summary_values(made)  # what cannot be kept is to be said before anything is journaled
        for name in written:
            self._saved_files().add(name)
        return made
