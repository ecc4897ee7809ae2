"""``python -m dsv3.bench``: pick a measurement, run it, print a table or JSON."""

from __future__ import annotations

import argparse
import json
import sys

from . import cast, convert, data, depth, generate, kernels, peer, quant, serve, train


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; returns the exit code: 0, or 1 after a user's error, printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m dsv3.bench", description="What a step costs, and where.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (train, peer, generate, serve, depth, kernels, quant, cast, data, convert):
        command = module.add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        command.set_defaults(measure=module.run, table=module.table)
    args = parser.parse_args(argv)
    try:
        result = args.measure(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"dsv3.bench {args.command}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if args.json else args.table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
