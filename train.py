"""Train a multi-label classifier; --help lists the options. The code: mlvision/commands/train.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("train")
