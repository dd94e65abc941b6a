"""The page on starting many ranks: what can be said of its commands where there is no cluster."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bilevel.cli.app import app
from tests.cli.commands import RUNNER

PAGE = (Path(__file__).parents[1] / "docs" / "launching.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def is_accepted(words):
    """Whether the command line knows the command and its options, without running it."""
    return RUNNER.invoke(app, [*words, "--help"]).exit_code == 0


def commands(text):
    """The words after `bilevel` of each command, its continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.search(r"(?:-m |^|`)bilevel (.+?)(?:`|$)", line) for line in lines]
    words = [match[1].split() for match in found if match]
    words += [line.split("set -- ")[1].split() for line in lines if "set -- " in line]
    return [each for each in words if each[0] != '"$@"']


@pytest.mark.parametrize("script", blocks("bash"), ids=lambda text: text.split()[0])
def test_each_script_is_one_of_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        lint = ["shellcheck", "--shell", "bash", "-"]
        subprocess.run(lint, input=script, text=True, check=True)


def test_the_command_line_takes_what_the_page_says():
    found = [words for script in blocks("bash") for words in commands(script)]
    for text in blocks("yaml"):
        command = re.search(r"command: \[torchrun, -m, bilevel, (.*)\]", text)
        assert command is not None
        found.append(command[1].split(", "))
    assert [words[0] for words in found] == ["run", "resume", "run", "run", "run"]
    assert all(map(is_accepted, found))
    # controls
    assert commands("torchrun \\\n  -m bilevel run ridge --rank 2") == [
        ["run", "ridge", "--rank", "2"]
    ]
    assert not is_accepted(["run", "ridge", "--nonesuch", "2"])


def test_the_jobs_of_kubernetes_have_two_machines_of_eight():
    train, torch = (YAML(typ="safe").load(text) for text in blocks("yaml"))
    assert (train["kind"], torch["kind"]) == ("TrainJob", "PyTorchJob")
    assert train["spec"]["trainer"]["numNodes"] == 2
    replicas = torch["spec"]["pytorchReplicaSpecs"]
    assert sum(each["replicas"] for each in replicas.values()) == 2
    for processes, limits in (
        (train["spec"]["trainer"]["numProcPerNode"], train["spec"]["trainer"]["resourcesPerNode"]),
        (
            int(torch["spec"]["nprocPerNode"]),
            replicas["Worker"]["template"]["spec"]["containers"][0]["resources"],
        ),
    ):
        assert limits["limits"]["nvidia.com/gpu"] == processes == 8
