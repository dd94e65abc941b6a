"""The command line. `main` is the entry point of the command `bilevel`."""


def main() -> None:
    """Run the command line and exit with its code."""
    from bilevel.cli.app import app

    app()
