"""Versions and hardware for a bug report: ``python -m encnet_triton.environment``."""

from __future__ import annotations

from encnet_triton.machine import report


def main() -> None:
    """Print the report, one fact per line, ready to paste."""
    for name, value in report():
        print(f"{name + ':':<17}{value}")


if __name__ == "__main__":
    main()
