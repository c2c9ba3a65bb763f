"""Make, import or judge label maps; --help lists the options. The code: mlvision/commands/make_label_maps.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("make_label_maps")
