"""Steps of a long unattended run: each in a process of its own with a time limit, a report on disk after each."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

LEAST_SECONDS = 10  # with less, a stage does not start


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the run.

    name, title: on the command line; in the report.
    minutes: its own limit.
    commands: makes its commands; each is asked for when the one before has succeeded.
    refusal: why it cannot run here, or None; asked just before.
    environment: added to that of the commands.
    shows: lines of standard output that the report repeats: "all" (tables), "last" (three) or "none".
    grace: seconds between the request to stop and the end.
    """

    name: str
    title: str
    minutes: float
    commands: Callable[[], Iterable[list]]
    refusal: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    shows: str = "last"
    grace: float = 10


class Report:
    """report.json, report.md and log.txt in the folder `out`, up to date after every stage."""

    def __init__(self, out: Path, minutes: float, dry_run: bool):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self._file = out / "report.json"
        self.content = {"machine": {}, "stages": {}, "training": {}}
        with contextlib.suppress(OSError, ValueError):  # an earlier call's, whose stages stay
            self.content |= json.loads(self._file.read_text())
        self.content |= {"date": time.strftime("%Y-%m-%d %H:%M"), "minutes": minutes, "dry_run": dry_run}

    def add(self, name: str, **facts) -> None:
        self.content["stages"][name] = facts
        self.write()

    def write(self) -> None:
        for file, text in ((self._file, json.dumps(self.content, indent=1)), (self.out / "report.md", self.markdown())):
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(file)

    def markdown(self) -> str:
        content, machine = self.content, self.content["machine"]
        lines = [f"# {machine.get('device', 'no device')}, {content['date']}", ""]
        if content["dry_run"]:
            lines += ["**Dry run: tiny shapes. No number below says anything about speed or quality.**", ""]
        lines += ["| " + " | ".join(machine) + " |", "|" + " --- |" * len(machine)]
        lines += ["| " + " | ".join(_cell(value) for value in machine.values()) + " |", ""]
        lines += ["| stage | what | result | minutes |", "| --- | --- | --- | --- |"]
        for name, stage in content["stages"].items():
            lines.append(f"| {name} | {stage['title']} | {stage['result']} | {stage['seconds'] / 60:.1f} |")
        if content["training"]:
            facts = ", ".join(f"{name} {_cell(value)}" for name, value in content["training"].items())
            lines += ["", f"Training: {facts}."]
        for stage in content["stages"].values():
            if stage["shown"]:
                table = any(line.startswith("|") for line in stage["shown"])
                fence = [] if table and stage["result"] == "passed" else ["```"]
                lines += ["", f"## {stage['title']}", "", *fence, *stage["shown"], *fence]
        return "\n".join(lines) + "\n"


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value) if value else "-"


class Runner:
    """Runs stages and reports them, whatever happens."""

    def __init__(self, report: Report, rows: Path, cwd: Path):
        """`rows`: folder in which a stage may leave NAME.json, which report.json takes in."""
        self.report, self.rows, self.cwd = report, rows, cwd
        self._child: subprocess.Popen | None = None

    def run(self, stage: Stage, seconds: float, environment: dict[str, str]) -> None:
        """Runs a stage for at most so long.

        Raises:
            KeyboardInterrupt: when interrupted, after reporting it.
        """
        start, shown, rows = time.monotonic(), [], self.rows / f"{stage.name}.json"
        rows.unlink(missing_ok=True)
        limit = min(60 * stage.minutes, seconds)
        result = stage.refusal() or ("no time left" if limit < LEAST_SECONDS else None)
        result = result and f"not run: {result}"
        print(f"\n== {stage.name}: {stage.title}{': ' + result if result else ''}", flush=True)
        if result is None:
            try:
                result = "passed"
                for command in stage.commands():
                    status, shown = self._command(stage, command, start + limit, environment | stage.environment)
                    if status != 0:
                        result = "timed out" if status is None else f"failed, exit status {status}"
                        break
            except KeyboardInterrupt:
                result = "interrupted"
            except Exception as error:  # what a command left behind cannot be read, say
                result = f"failed, {type(error).__name__}: {error}"
        if stage.shows != "all":
            shown = shown[-3:] if stage.shows == "last" else []
        if result.startswith(("failed", "timed")):
            shown = [*shown, "... end of the log:", *self.report.log.read_text(errors="replace").splitlines()[-25:]]
        facts = {"title": stage.title, "result": result, "seconds": round(time.monotonic() - start, 1), "shown": shown}
        with contextlib.suppress(OSError, ValueError):
            facts["rows"] = json.loads(rows.read_text())
        self.report.add(stage.name, **facts)
        if not result.startswith("not run"):
            print(f"== {stage.name}: {result}, {facts['seconds']:.0f} s", flush=True)
        if result == "interrupted":
            raise KeyboardInterrupt

    def _command(self, stage: Stage, command: list, end: float, environment) -> tuple[int | None, list[str]]:
        """Exit status (None: out of time) and standard output; both outputs go to the log as well."""
        words, lines = [str(word) for word in command], []
        with open(self.report.log, "a") as log:
            print(f"\n== {stage.name} $ {' '.join(words)}", file=log, flush=True)
            self._child = subprocess.Popen(
                words,
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,
            )

            def copy():
                for line in self._child.stdout:
                    lines.append(line.rstrip("\n"))
                    print(line, end="", file=log, flush=True)
                    print(line, end="", flush=True)

            reader = threading.Thread(target=copy, daemon=True)
            reader.start()
            status = None
            try:
                status = self._child.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._stop(stage.grace)
            except KeyboardInterrupt:
                self._stop(stage.grace)
                raise
            reader.join(10)
        return status, lines

    def _stop(self, grace: float) -> None:
        """Asks the running command and what it started to stop, and then makes it."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
                return
