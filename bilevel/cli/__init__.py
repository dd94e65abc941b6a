"""The command line; `main` is the entry point of `bilevel`.

A file bears its command's name. Beside them: `app` has the commands and their options, `run_loop` is
what `run` and `resume` share, `boundary` turns errors into messages and exit codes, `user_code`
those of a problem's own code, `names` finds recipes and completes, `selection` chooses runs, `signals` is Ctrl-C, `output` the standard
streams. What computes is elsewhere: a command loads, calls and prints, and nothing else in the package prints
but the console sink.
"""


def main() -> None:
    """Run the command line and exit with its code."""
    from bilevel.cli.app import app
    from bilevel.cli.output import unbroken

    with unbroken():
        app()
