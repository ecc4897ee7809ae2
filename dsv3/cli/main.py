"""``dsv3`` and ``python -m dsv3``: find the command, run it, turn a user's error into one line."""
from __future__ import annotations

import argparse
import sys

from .. import __version__
from . import convert, data, generate, info, plan, serve, train


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 after a user's error, which is printed as one line."""
    parser = argparse.ArgumentParser(prog="dsv3", description="DeepSeek-V3 as pure functions, compiled by MindSpore.")
    parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (train, convert, generate, serve, info, data, plan):
        module.add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:  # OSError: also a full disk, which names the file
        print(f"dsv3 {args.command}: {error}", file=sys.stderr)
        return 1
