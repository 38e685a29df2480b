"""Prints the tables of docs/conformance.md: `python tests/conformance.py`."""

import conformance_policy
import conformance_preference
import conformance_verl
from conformance_data import CASES, VERL, difference

__all__ = ["conformance_policy", "conformance_preference", "conformance_verl"]


def table(cases) -> str:
    lines = ["| case | value | gradient |", "| --- | --- | --- |"]
    for name, case in cases.items():
        lines.append("| {} | {:.1e} | {:.1e} |".format(name, *difference(case)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"TRL\n\n{table(CASES)}\n\nverl's formulas\n\n{table(VERL)}")
