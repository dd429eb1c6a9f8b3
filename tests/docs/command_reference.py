"""The reference in docs/cli.md, made from the help texts: `python -m tests.docs.command_reference` writes it anew."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.docs.pages import ROOT, between

PAGE, MARK = "docs/cli.md", "commands"


def reference() -> str:
    """Return the help of every command, as a terminal of 100 columns shows it."""
    from lightning_gradtrace.cli._app import COMMANDS

    code = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom lightning_gradtrace.cli import app\n"
        "run = lambda *a: CliRunner().invoke(app, [*a, '--help'], prog_name='gradtrace', terminal_width=100).stdout\n"
        "print(json.dumps({name: run(*([name] if name else [])) for name in sys.argv[1:]}))"
    )
    import json

    names = ["", *COMMANDS]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    helps = json.loads(done.stdout)
    parts = []
    for name in names:
        text = "\n".join(f"    {line}".rstrip() for line in helps[name].strip().splitlines())
        parts.append((f"## {name}\n\n" if name else "") + text + "\n")
    return "\n" + "\n".join(parts) + "\n"


def main() -> None:
    """Put the reference into the page."""
    file, begin = ROOT / PAGE, f"<!-- {MARK}: begin -->\n"
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace(begin + between(PAGE, MARK), begin + reference()), encoding="utf-8")


if __name__ == "__main__":
    main()
