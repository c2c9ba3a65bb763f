"""Tables of the records of finished runs; --help lists the options. The code: mlvision/commands/results_table.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("results_table")
