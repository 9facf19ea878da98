"""`python -m torchquant` is the same as `torchquant`."""

from torchquant.cli import main

if __name__ == "__main__":
    main()
