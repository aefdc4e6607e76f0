"""Run the command line as ``python -m svftool`` (and under ``torchrun -m svftool``)."""

from svftool.cli import main

if __name__ == "__main__":
    main()
