"""`python -m bilevel`, and so `torchrun … -m bilevel run RECIPE`: the command line."""

from bilevel.cli import main

if __name__ == "__main__":
    main()
