"""The command line; `main` is the entry point of `bilevel`.

A file bears its command's name. Beside them: `app` has the commands and their options, `run_loop` is
what `run` and `resume` share, `boundary` turns errors into messages and exit codes, `user_code`
those of somebody's own code, `names` finds recipes and completes, `selection` chooses runs, `signals` is Ctrl-C,
`output` the standard streams, `importing` the imports of what computes, `answer` what machines read, `shown` what is seen of a run; `spreading`,
`member`, `follow` and `launch` are for several ranks. What computes is elsewhere: a command loads, calls
and prints, and nothing else in the package prints but the console sink.
"""


def main() -> None:
    """Run the command line and exit with its code."""
    import atexit
    import signal
    import sys

    from bilevel.cli.answer import answer_usage
    from bilevel.cli.app import app
    from bilevel.cli.options import settings
    from bilevel.cli.output import unbroken

    settings.is_whole_process = True
    with unbroken():
        try:
            app()
        except SystemExit as exit_:
            answer_usage(exit_.code, sys.argv[1:])
            raise
        finally:
            settings.is_whole_process = False
            # all is said: Ctrl-C while Python ends would only show where in torch that was
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
