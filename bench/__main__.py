"""python -m fastrl.bench OP... [--device cuda] [--against PEERS] [--json OUT] [--plot OUT.png]

`fastrl bench` for a machine without the command line's packages, such as a bare GPU machine.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastrl.bench import OPS, command


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    parser.add_argument("ops", nargs="+", choices=OPS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--against")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    options = command.options(given.device)
    shapes = command.shapes_of(given.ops, torch.device(options.device))
    return command.run(shapes, options, Console(), given.against, given.json, given.plot)


if __name__ == "__main__":
    sys.exit(main())
