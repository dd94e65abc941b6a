"""torch's own second derivatives against differences of its first: the next wrong one is found here.

Every function is taken of a smooth input in float64, followed by a weighted sum of sines so that no
part of the second derivative vanishes by symmetry. `WRONG_IN_TORCH` are the exceptions, each with what
the package does about it; `WITHOUT` have no second derivative, and must say so.
"""

import pytest
import torch
from torch import nn

from bilevel import calculus
from bilevel.errors import ProblemError
from bilevel.problem.second_derivatives import WRONG, _nodes, error_of
from bilevel.types import Counts, Loss, Point

F = nn.functional
G = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def layer(module, *shape):
    """A module as a function of its input and of its parameters at once."""
    module = module.double().eval()
    names = [name for name, _ in module.named_parameters()]
    values = [0.5 * draw(*p.shape) + 0.1 for p in module.parameters()]

    def call(*entries):
        params = dict(zip(names, entries[1:], strict=True))
        out = torch.func.functional_call(module, params, (entries[0],))
        return out[0] if isinstance(out, tuple) else out

    return call, [draw(*shape), *values]


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)

    def forward(self, a):
        return self.inner(a, a, a, need_weights=True)[0]  # weights asked for: computed by hand


A, V, IMAGE = draw(3, 4), draw(5), draw(1, 2, 5, 5)
SPD = (lambda r: r @ r.T + 3 * torch.eye(4).double())(draw(4, 4))
WEIGHT = draw(3, 2, 3, 3)
POSITIVE = A.abs() + 0.5

ELEMENTWISE = [
    "exp",
    "expm1",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "erf",
    "erfc",
    "asinh",
    "atan",
    "sinh",
    "cosh",
    "square",
    "logsigmoid",
    "softplus",
    "silu",
    "gelu",
    "mish",
    "elu",
    "celu",
    "selu",
    "softsign",
    "tanhshrink",
    "sinc",
    "exp2",
    "i0",
    "i0e",
    "i1",
    "logit_of",
    "abs",
]
OF_POSITIVE = [
    "log",
    "log1p",
    "log2",
    "log10",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "lgamma",
    "digamma",
    "erfinv_of",
    "acosh_of",
]
SPECIAL = {
    "logit_of": lambda a: torch.logit(a.sigmoid() * 0.9 + 0.05),
    "erfinv_of": lambda a: torch.erfinv(a.tanh() * 0.9),
    "acosh_of": lambda a: torch.acosh(a + 1.1),
}


def named(name):
    return (
        SPECIAL.get(name)
        or getattr(torch, name, None)
        or getattr(torch.special, name, None)
        or getattr(F, name)
    )


CASES = {name: (named(name), [A]) for name in ELEMENTWISE}
CASES |= {name: (named(name), [POSITIVE]) for name in OF_POSITIVE}
CASES |= {
    "pow": (torch.pow, [POSITIVE, draw(3, 4)]),
    "atan2": (torch.atan2, [A, POSITIVE]),
    "hypot": (torch.hypot, [A, POSITIVE]),
    "div": (torch.div, [A, POSITIVE]),
    "xlogy": (torch.xlogy, [A, POSITIVE]),
    "logaddexp": (torch.logaddexp, [A, draw(3, 4)]),
    "lerp": (torch.lerp, [A, draw(3, 4), draw(3, 4)]),
    "addcmul": (torch.addcmul, [A, draw(3, 4), draw(3, 4)]),
    "addcdiv": (torch.addcdiv, [A, draw(3, 4), POSITIVE]),
    "where": (lambda a: torch.where(a > 0, a.exp(), a.sin()), [A]),
    "prod": (lambda a: a.prod(1), [A]),
    "cumprod": (lambda a: a.cumprod(1), [A]),
    "cumsum": (lambda a: a.cumsum(1), [A]),
    "logcumsumexp": (lambda a: a.logcumsumexp(1), [A]),
    "logsumexp": (lambda a: a.logsumexp(1), [A]),
    "softmax": (lambda a: a.softmax(1), [A]),
    "log_softmax": (lambda a: a.log_softmax(1), [A]),
    "softmin": (lambda a: F.softmin(a, 1), [A]),
    "var": (lambda a: a.var(1), [A]),
    "std": (lambda a: a.std(1), [A]),
    "norm": (lambda a: a.norm(dim=1), [A]),
    "norm 3": (lambda a: a.norm(p=3, dim=1), [A]),
    "vector_norm 1.5": (lambda a: torch.linalg.vector_norm(a, 1.5), [A]),
    "normalize": (lambda a: F.normalize(a, dim=1), [A]),
    "renorm": (lambda a: a.renorm(2, 0, 0.5), [A]),
    "sort": (lambda a: a.sort(1).values.exp(), [A]),
    "amax": (lambda a: a.exp().amax(1), [A]),
    "median": (lambda a: a.exp().median(1).values, [A]),
    "matmul": (torch.matmul, [A, draw(4, 2)]),
    "bmm": (torch.bmm, [draw(2, 3, 4), draw(2, 4, 2)]),
    "baddbmm": (torch.baddbmm, [draw(2, 3, 2), draw(2, 3, 4), draw(2, 4, 2)]),
    "addmm": (torch.addmm, [draw(3, 2), A, draw(4, 2)]),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ki", a, b), [A, draw(4, 2)]),
    "bilinear": (F.bilinear, [draw(3, 2), draw(3, 4), draw(2, 2, 4)]),
    "kron": (torch.kron, [draw(2, 2), draw(2, 3)]),
    "cdist of one point": (lambda a: (a[:, None] - a[None] + 1).norm(dim=-1), [A]),
    "pairwise_distance": (F.pairwise_distance, [A, draw(3, 4)]),
    "cosine_similarity": (F.cosine_similarity, [A, draw(3, 4)]),
    "cross": (torch.linalg.cross, [draw(2, 3), draw(2, 3)]),
    "inv": (torch.linalg.inv, [SPD]),
    "solve": (torch.linalg.solve, [SPD, draw(4, 2)]),
    "det": (torch.linalg.det, [0.3 * SPD]),
    "logdet": (torch.logdet, [SPD]),
    "slogdet": (lambda a: torch.linalg.slogdet(a).logabsdet, [SPD]),
    "cholesky": (lambda a: torch.linalg.cholesky(a + a.T), [SPD]),
    "cholesky_solve": (lambda b, a: torch.cholesky_solve(b, torch.linalg.cholesky(a + a.T)), [draw(4, 1), SPD]),
    "eigvalsh": (lambda a: torch.linalg.eigvalsh(a + a.T), [SPD]),
    "svdvals": (torch.linalg.svdvals, [draw(3, 4)]),
    "qr": (lambda a: torch.linalg.qr(a).R, [draw(4, 3)]),
    "pinv": (torch.linalg.pinv, [draw(4, 3)]),
    "matrix_exp": (torch.linalg.matrix_exp, [0.3 * draw(3, 3)]),
    "lstsq": (lambda a, b: torch.linalg.lstsq(a, b).solution, [draw(4, 3), draw(4, 1)]),
    "triangular": (lambda a, b: torch.linalg.solve_triangular(a.triu(), b, upper=True), [SPD, draw(4, 1)]),
    "fft": (lambda a: torch.fft.rfft(a).abs(), [V]),
    "gather": (lambda a: a.gather(1, torch.tensor([[0, 3], [1, 1], [2, 0]])), [A]),
    "index_add": (lambda a: a.index_add(0, torch.tensor([0, 0]), a[1:].exp()), [A]),
    "scatter_add": (lambda a: a.scatter_add(1, torch.zeros(3, 2).long(), a[:, :2].exp()), [A]),
    "scatter_reduce prod": (lambda a: a.scatter_reduce(1, torch.zeros(3, 2).long(), a[:, :2].exp(), "prod"), [A]),
    "index_put": (lambda a: a.index_put((torch.tensor([0]),), a[1].exp()), [A]),
    "embedding": (lambda a: F.embedding(torch.tensor([0, 2, 2]), a), [A]),
    "pad": (lambda a: F.pad(a, (1, 2), mode="reflect"), [draw(1, 2, 4)]),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"), [IMAGE]),
    "bicubic": (lambda a: F.interpolate(a, scale_factor=2, mode="bicubic"), [IMAGE]),
    "grid_sample": (lambda a, g: F.grid_sample(a, g.tanh(), align_corners=False), [IMAGE, 0.1 * draw(1, 2, 2, 2) + 0.33]),
    "affine_grid": (lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False), [draw(1, 2, 3)]),
    "unfold": (lambda a: F.unfold(a, 2), [IMAGE]),
    "fold": (lambda a: F.fold(F.unfold(a, 2).exp(), (5, 5), 2), [IMAGE]),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), [draw(1, 4, 2, 2)]),
    "conv1d": (F.conv1d, [draw(1, 2, 6), draw(3, 2, 3), draw(3)]),
    "conv2d": (F.conv2d, [IMAGE, WEIGHT, draw(3)]),
    "conv2d, strided, grouped": (lambda a, w: F.conv2d(a, w, stride=2, padding=1, groups=2), [IMAGE, draw(2, 1, 3, 3)]),
    "conv3d": (F.conv3d, [draw(1, 1, 3, 3, 3), draw(2, 1, 2, 2, 2)]),
    "conv_transpose2d": (F.conv_transpose2d, [IMAGE, draw(2, 3, 2, 2), draw(3)]),
    "avg_pool": (lambda a: F.avg_pool2d(a, 2), [IMAGE]),
    "max_pool": (lambda a: F.max_pool2d(a.exp(), 2), [IMAGE]),
    "lp_pool": (lambda a: F.lp_pool2d(a.exp(), 2.0, 2), [IMAGE]),
    "adaptive_avg_pool": (lambda a: F.adaptive_avg_pool2d(a, 2), [IMAGE]),
    "adaptive_max_pool": (lambda a: F.adaptive_max_pool2d(a.exp(), 2), [IMAGE]),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (4,), w, b), [A, draw(4), draw(4)]),
    "rms_norm": (lambda a, w: F.rms_norm(a, (4,), w), [A, draw(4)]),
    "group_norm": (lambda a, w, b: F.group_norm(a, 2, w, b), [draw(2, 4, 3), draw(4), draw(4)]),
    "instance_norm": (lambda a: F.instance_norm(a), [IMAGE]),
    "batch_norm, of the batch": (lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True), [A, draw(4), draw(4)]),
    "batch_norm, eval": (lambda a, w: F.batch_norm(a, V[:4], V[:4] ** 2 + 1, w, None), [A, draw(4)]),
    "local_response_norm": (lambda a: F.local_response_norm(a, 2), [IMAGE]),
    "glu": (lambda a: F.glu(a, 1), [A]),
    "prelu": (F.prelu, [A, torch.tensor([0.3]).double()]),
    "rrelu, eval": (lambda a: F.rrelu(a).exp(), [A]),
    "leaky_relu": (lambda a: F.leaky_relu(a).exp(), [A]),
    "hardswish": (F.hardswish, [A]),
    "softshrink": (lambda a: F.softshrink(a).exp(), [A]),
    "mse": (F.mse_loss, [A, draw(3, 4)]),
    "huber": (F.huber_loss, [A, draw(3, 4)]),
    "smooth_l1": (F.smooth_l1_loss, [A, draw(3, 4)]),
    "bce": (lambda a: F.binary_cross_entropy(a.sigmoid(), torch.full_like(a, 0.3)), [A]),
    "bce, soft target": (lambda a, t: F.binary_cross_entropy(a.sigmoid(), t.sigmoid()), [A, draw(3, 4)]),
    "bce with logits": (lambda a, t: F.binary_cross_entropy_with_logits(a, t.sigmoid()), [A, draw(3, 4)]),
    "cross_entropy": (lambda a: F.cross_entropy(a, torch.tensor([0, 2, 1])), [A]),
    "cross_entropy, smoothed": (lambda a: F.cross_entropy(a, torch.tensor([0, 2, 1]), label_smoothing=0.1), [A]),
    "cross_entropy, soft": (lambda a, t: F.cross_entropy(a, t.softmax(1)), [A, draw(3, 4)]),
    "nll": (lambda a: F.nll_loss(a.exp(), torch.tensor([0, 2, 1])), [A]),
    "kl_div": (lambda a, t: F.kl_div(a.log_softmax(1), t.softmax(1), reduction="batchmean"), [A, draw(3, 4)]),
    "kl_div, log target": (lambda a, t: F.kl_div(a.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True), [A, draw(3, 4)]),
    "poisson_nll": (lambda a: F.poisson_nll_loss(a, POSITIVE), [A]),
    "gaussian_nll": (lambda a, t, v: F.gaussian_nll_loss(a, t, v.exp()), [A, draw(3, 4), draw(3, 4)]),
    "soft_margin": (lambda a: F.soft_margin_loss(a, torch.ones_like(a)), [A]),
    "multilabel_soft_margin": (lambda a: F.multilabel_soft_margin_loss(a, (A > 0).double()), [A]),
    "triplet": (F.triplet_margin_loss, [A, draw(3, 4) + 2, draw(3, 4)]),
    "cosine_embedding": (lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(3)), [A, draw(3, 4)]),
    "hinge_embedding": (lambda a: F.hinge_embedding_loss(a.exp(), torch.ones(3, 4)), [A]),
    "erfcx": (torch.special.erfcx, [A]),
    "log_ndtr": (torch.special.log_ndtr, [A]),
    "ndtri": (lambda a: torch.special.ndtri(a.sigmoid()), [A]),
    "entr": (torch.special.entr, [POSITIVE]),
    "xlog1py": (torch.special.xlog1py, [A, POSITIVE]),
    "polygamma": (lambda a: torch.polygamma(1, a), [POSITIVE]),
    "mvlgamma": (lambda a: torch.mvlgamma(a + 1, 2), [POSITIVE]),
    "cov": (torch.cov, [A]),
    "trapezoid": (lambda a: torch.trapezoid(a.exp(), a, dim=1), [A]),
    "cummax": (lambda a: a.exp().cummax(1).values, [A]),
    "kthvalue": (lambda a: a.exp().kthvalue(2, 1).values, [A]),
    "nanmean": (lambda a: a.exp().nanmean(1), [A]),
    "dist": (torch.dist, [A, draw(3, 4)]),
    "roll, flip": (lambda a: a.roll(1, 0).flip(1), [A]),
    "as_strided": (lambda a: a.as_strided((3, 2), (1, 2)).exp(), [A]),
    "clamp": (lambda a: a.clamp(-0.7, 0.9).exp(), [A]),
    "embedding, by frequency": (lambda a: F.embedding(torch.tensor([0, 1, 2]), a, scale_grad_by_freq=True), [A]),
    "embedding, padded": (lambda a: F.embedding(torch.tensor([0, 1, 2]), a, padding_idx=1).exp(), [A]),
    "complex": (lambda a: (torch.complex(a, a.sin()) ** 2).abs(), [A]),
    "stft": (lambda a: torch.stft(a, 8, window=torch.hann_window(8).double(), return_complex=True).abs(), [draw(16)]),
    "MultiheadAttention": layer(_Attention(), 3, 2, 4),
    "attention by hand": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, [A, draw(3, 4), draw(3, 4)]),
    "Linear": layer(nn.Linear(4, 2), 3, 4),
    "LSTM": layer(nn.LSTM(4, 2), 3, 1, 4),
    "GRU": layer(nn.GRU(4, 2, num_layers=2), 3, 1, 4),
    "RNN": layer(nn.RNN(4, 2), 3, 1, 4),
    "LSTMCell": layer(nn.LSTMCell(4, 2), 3, 4),
    "GRUCell": layer(nn.GRUCell(4, 2), 3, 4),
    "EmbeddingBag of vectors": (lambda a: a.exp().mean(0), [A]),
    "_weight_norm, whole": (lambda v, g: torch._weight_norm(v, g, -1), [A, torch.tensor(1.3).double()]),
    "_weight_norm, 0": (lambda v, g: torch._weight_norm(v, g, 0), [A, draw(3, 1)]),
    "_weight_norm, 1": (lambda v, g: torch._weight_norm(v, g, 1), [A, draw(1, 4)]),
    "_weight_norm, conv": (lambda v, g: torch._weight_norm(v, g, 0), [WEIGHT, draw(3, 1, 1, 1)]),
    "parametrized weight_norm": layer(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), 3, 4),
    "orthogonal": layer(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), 2, 3),
}  # fmt: skip
WRONG_IN_TORCH = {
    "_weight_norm, 0": "refused by name",
    "_weight_norm, 1": "refused by name",
    "_weight_norm, conv": "refused by name",
    "parametrized weight_norm": "refused by name",
}
WITHOUT = {
    "multi_margin": (lambda a: F.multi_margin_loss(a, torch.tensor([0, 2, 1])), [A]),
    "pdist": (F.pdist, [A]),
    "TransformerEncoderLayer": layer(nn.TransformerEncoderLayer(4, 2, 5), 3, 2, 4),
    "sdpa": (F.scaled_dot_product_attention, [draw(1, 1, 3, 4) for _ in range(3)]),
    "cdist": (torch.cdist, [A, draw(3, 4)]),
    "ctc": (
        lambda a: F.ctc_loss(a.log_softmax(-1), torch.tensor([[1, 2]]), (5,), (2,)),
        [draw(5, 1, 4)],
    ),
    "embedding_bag": (
        lambda a: F.embedding_bag(torch.tensor([[0, 2]]), a, mode="sum"),
        [A],
    ),
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):  # which has none of it yet
    WITHOUT["grid_sample"] = CASES.pop("grid_sample")


def problem_of(function, inputs):
    """(G(y) = Σ wᵢ sin outᵢ, y)."""
    y = {str(i): entry.clone() for i, entry in enumerate(inputs)}
    with torch.no_grad():
        out = function(*y.values())
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64)

    def loss(x, y, batch):
        return weights @ function(*y.values()).reshape(-1).sin()

    return Loss(loss, None, Counts(), "lower"), Point({}, y)


def error(function, inputs):
    """The relative error of a Hessian product against extrapolated central differences."""
    loss, at = problem_of(function, inputs)
    generator = torch.Generator().manual_seed(1)
    v = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in at.y.items()}
    got = calculus.linearize(loss, at).hvp_yy(v)

    def slope(h):
        ends = [
            calculus.gradient_y(loss, {}, {n: p + s * h * v[n] for n, p in at.y.items()})[1]
            for s in (1, -1)
        ]
        return {n: (ends[0][n] - ends[1][n]) / (2 * h) for n in v}

    wide, narrow = slope(2e-4), slope(1e-4)
    truth = torch.cat([(4 * narrow[n] - wide[n]).reshape(-1) / 3 for n in v])
    off = torch.cat([got[n].reshape(-1) for n in v]) - truth
    return float(off.norm() / truth.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_of_torch_are_differences_of_its_first(name):
    off = error(*CASES[name])
    if name in WRONG_IN_TORCH:
        assert off > 1e-3, f"torch has mended {name}: take it out of WRONG_IN_TORCH"
    else:
        assert off < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_IN_TORCH)
def test_what_is_wrong_is_known_by_its_node(name):
    loss, at = problem_of(*CASES[name])
    y = {n: p.requires_grad_() for n, p in at.y.items()}
    known = {node.name() for node in _nodes(loss({}, y))} & WRONG.keys()
    assert known
    assert all(error_of(node) > 1e-3 for node in known)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_none_says_so_with_a_remedy(name):
    with pytest.raises(ProblemError, match=r"lower_loss uses \w+, which has no second derivative"):
        error(*WITHOUT[name])
