"""Check a data set, or draw the scenes; --help lists the options. The code: mlvision/commands/prepare_data.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("prepare_data")
