"""`python -m fastgpt` and the console script `fastgpt`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages of `fastgpt[cli]` only `info` works."""
    try:
        from fastgpt.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich", "click"):
            raise
        if sys.argv[1:] == ["info"]:
            from fastgpt.info import report

            print(report())
            return
        print(f"fastgpt: {error.name} is missing; pip install 'fastgpt[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    app(prog_name="fastgpt")


if __name__ == "__main__":
    main()
