"""Predict the labels of images; --help lists the options. The code: mlvision/commands/predict.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("predict")
