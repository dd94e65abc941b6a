"""A picture for each page of estimators: what is drawn of it, and what its axes say."""

from docs.pictures import along_runs, at_the_solution, elsewhere
from docs.pictures.chart import Chart

CALLS = "oracle calls: gradients + HVPs + cross products"
SHARE = "(Φ − min Φ) / the same at the start"

CHARTS = {
    "adaptive": Chart(
        title="MAID beside fixed accuracies",
        computed=along_runs.adaptive,
        part=lambda: along_runs.adaptive(4),
        x=CALLS + ", of the run",
        y=SHARE,
        logarithmic="y",
        y_range=(1e-4, 1.5),
    ),
    "aggregation": Chart(
        title="Where G has many minima: how far x rests from the solution",
        computed=along_runs.aggregation,
        part=lambda: along_runs.aggregation((5, 10), 100),
        x=CALLS + "; of an estimate, or of the run",
        y="|x − x*|",
    ),
    "baselines": Chart(
        title="A run with the hypergradient, and runs without",
        computed=along_runs.baselines,
        part=lambda: along_runs.baselines(0.1),
        x=CALLS + ", of the run",
        y=SHARE,
        logarithmic="y",
        y_range=(1e-3, 30),
    ),
    "constrained": Chart(
        title="Error against cost with a lower level in a box",
        computed=at_the_solution.constrained,
        y_range=(1e-4, 2),
    ),
    "fewer_products": Chart(
        title="What target_error costs, by the condition number",
        computed=elsewhere.fewer_products,
        x="condition number of the lower Hessian (middle of the run)",
        y="HVPs, those of told cold CG = 1",
        level=1.0,
    ),
    "gauss_newton": Chart(
        title="Error against cost with the Gauss–Newton matrix in the place of the Hessian",
        computed=elsewhere.gauss_newton,
        logarithmic="y",
        y_range=(1e-5, 3),
    ),
    "implicit": Chart(
        title="Error against cost of implicit differentiation",
        computed=at_the_solution.implicit,
        logarithmic="y",
        y_range=(1e-5, 1.5),
    ),
    "kfac": Chart(
        title="Error against cost with K-FAC as a preconditioner",
        computed=elsewhere.kfac,
        part=lambda: elsewhere.kfac((5, 10, 20)),
        logarithmic="y",
        y_range=(1e-8, 3),
    ),
    "linear_solvers": Chart(
        title="Error against cost of the linear solvers",
        computed=at_the_solution.linear_solvers,
        y_range=(1e-4, 3),
        points=("identity, dense",),
    ),
    "lower": Chart(
        title="Distance to the lower solution against cost",
        computed=at_the_solution.lower,
        part=lambda: at_the_solution.lower(8),
        x="gradients + HVPs",
        y="‖y − y*‖ / ‖y*‖",
        y_range=(1e-15, 3),
        points=("newton",),
    ),
    "meta_learning": Chart(
        title="Direction of first-order methods beside MAML's",
        computed=elsewhere.meta_learning,
        part=lambda: elsewhere.meta_learning((1, 2)),
        x="lower steps K",
        y="cosine to MAML's hypergradient",
        logarithmic="",
        y_range=(0, 1.05),
    ),
    "one_step": Chart(
        title="Error of one step by its length",
        computed=at_the_solution.one_step,
        x="lr (3 oracle calls at each)",
        y_range=(0.1, 10),
        level=1.0,
    ),
    "penalty": Chart(
        title="Error against cost of the penalised lower problem",
        computed=at_the_solution.penalty,
        part=lambda: at_the_solution.penalty((2, 5, 10, 20)),
        y_range=(1e-3, 1.5),
    ),
    "precision": Chart(
        title="Error by the rounding of the dtype",
        computed=elsewhere.precision,
        x="rounding of a number of size 1: float32, float16, bfloat16",
        y="error relative to itself in float64",
    ),
    "reuse": Chart(
        title="Error of SHINE by the pairs that it keeps",
        computed=at_the_solution.shine,
        part=lambda: at_the_solution.shine((1, 2)),
        x="pairs kept, or HVPs",
        logarithmic="y",
        y_range=(1e-5, 1.5),
    ),
    "lancbio": Chart(
        title="Error against products while x moves",
        computed=along_runs.lancbio,
        part=lambda: along_runs.lancbio(2),
        x="HVPs a step",
    ),
    "simple_bilevel": Chart(
        title="Simple bilevel: distance to the solution",
        computed=along_runs.simple_bilevel,
        part=lambda: along_runs.simple_bilevel((3, 10, 30)),
        x="gradients",
        y="‖θ − θ*‖",
    ),
    "stochastic": Chart(
        title="Stochastic single-loop methods",
        computed=along_runs.stochastic,
        part=lambda: along_runs.stochastic((100,)),
        x=CALLS + ", one batch each",
        y="‖∇Φ‖²",
        y_range=(1e-12, 10),
    ),
    "unroll": Chart(
        title="Error against cost of unrolling",
        computed=at_the_solution.unroll,
        part=lambda: at_the_solution.unroll((1, 2, 5, 10)),
        x=CALLS + ", the lower steps included",
        y_range=(1e-5, 1.5),
    ),
    "zeroth_order": Chart(
        title="Error against cost of zeroth order",
        computed=at_the_solution.zeroth_order,
        part=lambda: at_the_solution.zeroth_order((1, 3)),
        points=("unroll",),
    ),
}
