"""`report`: written again from a run's folder."""

import pytest

from bilevel.cli.app import app
from tests.cli.commands import RUNNER, run


def test_a_report_is_written_again(runs):
    folder = run(runs)
    (folder / "report.html").unlink(missing_ok=True)
    result = RUNNER.invoke(app, ["report", "quadratic", "--runs-dir", str(runs)])
    if result.exit_code == 3:
        pytest.skip("without the extra report")
    assert result.output.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()
