"""`python -m mlvision COMMAND ...`."""

from mlvision.commands import main

if __name__ == "__main__":
    main()
