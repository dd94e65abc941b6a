"""Which tests are to notice a mistake in which file, and mutants that are no mistake."""

from __future__ import annotations

CHECK = "tests/mutation/test_mutants.py::test_as_it_is_nothing_is_wrong"
KILLED = "tests/mutation/test_killed.py"
REFORMULATIONS = "tests/estimators/test_reformulations.py"
UNUSED = "tests/estimators/test_unused.py"
SINGLE_LOOP = (
    "tests/directions",
    "tests/estimators/test_single_loop.py",
    "tests/estimators/test_single_loop_at_rest.py",
)
ADJOINT = ("tests/adjoint", "tests/preconditioners", "tests/linear/test_preconditioned_cg.py")
SOLVERS = (
    "tests/lower",
    "tests/optimizers",
    "tests/test_functional.py",
    "tests/problem/test_tied.py",
)

EVIDENCE: dict[str, tuple[str, ...]] = {
    "adjoint/bound.py": ("tests/adjoint/test_bound.py",),
    "adjoint/solve.py": ("tests/adjoint", "tests/estimators/test_implicit.py", KILLED),
    "adjoint/starts.py": (*ADJOINT, KILLED),
    "adjoint/stopping.py": (*ADJOINT, KILLED),
    "preconditioners/diagonal.py": (*ADJOINT, KILLED),
    "preconditioners/kfac.py": ("tests/preconditioners/test_kfac.py",),
    "preconditioners/nystrom.py": (*ADJOINT, KILLED),
    "preconditioners/lbfgs_pairs.py": ("tests/preconditioners/test_lbfgs_pairs.py",),
    "preconditioners/recycled.py": (*ADJOINT, KILLED),
    "estimators/aggregation.py": (
        "tests/estimators/test_aggregation.py",
        REFORMULATIONS,
        f"{CHECK}[aggregation]",
    ),
    "estimators/alternating.py": ("tests/estimators/test_alternating.py", f"{CHECK}[alternating]"),
    "estimators/averaged_multipliers.py": (
        "tests/estimators/test_averaged_multipliers.py",
        f"{CHECK}[averaged_multipliers]",
    ),
    "estimators/betty.py": ("tests/estimators/test_betty.py",),
    "estimators/bome.py": ("tests/estimators/test_bome.py", REFORMULATIONS, f"{CHECK}[bome]"),
    "estimators/dynamic_barrier.py": (
        "tests/estimators/test_simple_bilevel.py",
        f"{CHECK}[dynamic_barrier]",
    ),
    "estimators/rising_penalty.py": (
        "tests/estimators/test_simple_bilevel.py",
        f"{CHECK}[rising_penalty]",
    ),
    "estimators/fixed_point.py": (
        "tests/estimators/test_fixed_point.py",
        UNUSED,
        f"{CHECK}[fixed_point]",
    ),
    "estimators/forward.py": (
        "tests/estimators/test_forward.py",
        "tests/estimators/test_lower_start.py",
        f"{CHECK}[forward]",
    ),
    "estimators/gradient_gap.py": (
        "tests/estimators/test_gradient_gap.py",
        REFORMULATIONS,
        f"{CHECK}[gradient_gap]",
    ),
    "estimators/implicit.py": (
        "tests/estimators/test_implicit.py",
        *ADJOINT,
        "tests/calculus/test_gauss_newton.py",
        KILLED,
        f"{CHECK}[implicit]",
    ),
    "estimators/joint.py": ("tests/estimators/test_joint.py", REFORMULATIONS, f"{CHECK}[joint]"),
    "estimators/kkt.py": ("tests/estimators/test_kkt.py", UNUSED),
    "estimators/lancbio.py": (
        "tests/estimators/test_lancbio.py",
        UNUSED,
        f"{CHECK}[lancbio]",
    ),
    "estimators/maid.py": ("tests/estimators/test_maid.py", UNUSED, f"{CHECK}[maid]"),
    "estimators/moreau.py": ("tests/estimators/test_moreau.py", REFORMULATIONS, f"{CHECK}[moreau]"),
    "estimators/one_step.py": (
        "tests/estimators/test_one_step.py",
        f"{CHECK}[one_step]",
    ),
    "estimators/penalty.py": (
        "tests/estimators/test_penalty.py",
        f"{CHECK}[penalty]",
    ),
    "estimators/regularised_gap.py": (
        "tests/estimators/test_regularised_gap.py",
        REFORMULATIONS,
        f"{CHECK}[regularised_gap]",
    ),
    "estimators/sama.py": ("tests/estimators/test_sama.py", REFORMULATIONS, f"{CHECK}[sama]"),
    "estimators/shine.py": ("tests/estimators/test_shine.py", UNUSED, f"{CHECK}[shine]"),
    "estimators/single_loop.py": (*SINGLE_LOOP, f"{CHECK}[single_loop]"),
    "estimators/fomaml.py": ("tests/estimators/test_meta.py",),
    "estimators/reptile.py": ("tests/estimators/test_meta.py",),
    "estimators/unroll.py": (
        "tests/estimators/test_unroll.py",
        "tests/estimators/test_lower_start.py",
        "tests/estimators/test_iaptt.py",
        f"{CHECK}[unroll]",
    ),
    "estimators/value_function.py": (
        "tests/estimators/test_value_function.py",
        REFORMULATIONS,
        f"{CHECK}[value_function]",
    ),
    "estimators/value_gap.py": (
        "tests/estimators/test_value_gap.py",
        REFORMULATIONS,
        f"{CHECK}[value_gap]",
    ),
    "estimators/zeroth_order.py": (
        "tests/estimators/test_zeroth_order.py",
        "tests/estimators/test_lower_start.py",
        f"{CHECK}[zeroth_order]",
    ),
    "linear/cg.py": ("tests/linear", *ADJOINT, KILLED),
    "linear/guards.py": ("tests/linear", *ADJOINT, KILLED),
    "linear/lanczos.py": ("tests/linear", *ADJOINT, KILLED),
    "linear/dense.py": ("tests/linear",),
    "linear/gmres.py": ("tests/linear",),
    "linear/identity.py": ("tests/linear",),
    "linear/minres.py": ("tests/linear",),
    "linear/neumann.py": ("tests/linear",),
    "linear/normal_cg.py": ("tests/linear",),
    "linear/nystrom.py": ("tests/linear",),
    "linear/quasi_newton.py": (
        "tests/linear/test_quasi_newton.py",
        "tests/estimators/test_shine.py",
        "tests/preconditioners/test_lbfgs_pairs.py",
    ),
    "linear/task_cg.py": ("tests/linear/test_task_cg.py",),
    "directions/average.py": SINGLE_LOOP,
    "directions/blocks.py": SINGLE_LOOP,
    "directions/quantity.py": SINGLE_LOOP,
    "directions/oracles.py": SINGLE_LOOP,
    "directions/plain.py": SINGLE_LOOP,
    "directions/saga.py": SINGLE_LOOP,
    "directions/spider.py": SINGLE_LOOP,
    "directions/storm.py": SINGLE_LOOP,
    "directions/tracker.py": SINGLE_LOOP,
    "calculus/fixed_point_maps.py": (
        "tests/calculus/test_fixed_point_maps.py",
        "tests/estimators/test_fixed_point.py",
        "tests/estimators/test_kkt.py",
        UNUSED,
    ),
    "lower/augmented_lagrangian.py": ("tests/lower/test_augmented_lagrangian.py",),
    "lower/auxiliary.py": (REFORMULATIONS, "tests/estimators/test_value_function.py"),
    "lower/divergence.py": ("tests/problem/test_trust.py",),
    "lower/gradient.py": SOLVERS,
    "lower/iterate.py": ("tests/lower/test_iterate.py",),
    "lower/lbfgs.py": (*SOLVERS, "tests/estimators/test_shine.py"),
    "lower/newton.py": SOLVERS,
    "lower/start.py": ("tests/lower/test_starts.py",),
    "lower/tolerance.py": ("tests/lower/test_relative_tolerance.py",),
    "optimizers/learned.py": ("tests/optimizers/test_learned.py",),
    "optimizers/differentiable.py": SOLVERS,
    "lower/proximal.py": ("tests/lower/test_proximal.py", "tests/run/test_structure.py"),
    "unrolling/path.py": (
        "tests/estimators/test_lower_start.py",
        "tests/estimators/test_meta.py",
        "tests/estimators/test_unroll.py",
        *SOLVERS,
    ),
    "optimizers/torch_optim.py": SOLVERS,
    "unrolling/traced.py": ("tests/unrolling/test_traced.py",),
    "calculus/products.py": ("tests/calculus/test_products.py", "tests/test_functional.py"),
    "functional.py": (
        "tests/test_functional.py",
        "tests/problem/test_tied.py",
        "tests/estimators/test_shine.py",
    ),
    "problem/estimation.py": ("tests/test_functional.py", "tests/optimizers/test_learned.py"),
    "problem/levels.py": ("tests/problem/test_levels.py", "tests/test_functional.py"),
    "problem/nested_variables.py": ("tests/run/test_nested.py",),
    "problem/states.py": ("tests/problem/test_states.py",),
    "problem/trust.py": ("tests/problem/test_trust.py", "tests/run/test_warnings.py"),
    "problem/learned_start.py": ("tests/estimators/test_meta.py", "tests/estimators/test_iaptt.py"),
    "problem/purity.py": (
        "tests/problem/test_purity.py",
        "tests/calculus/test_products.py",
        "tests/test_functional.py",
    ),
    "problem/writes.py": ("tests/problem/test_writes.py",),
    "problem/second_derivatives.py": ("tests/problem/test_second_derivatives.py",),
    "calculus/precision.py": ("tests/calculus/test_precision.py",),
    "problem/over_tasks.py": ("tests/problem/test_over_tasks.py",),
    "tree.py": ("tests/test_tree.py", "tests/test_functional.py"),
}
"""In the order in which they are asked; the first that fails ends it."""

EQUIVALENT: dict[tuple[str, str], str] = {
    ("adjoint/starts.py", "rows.append(tree.scale(2 / size, newest[0]))"): (
        "every vector of the basis twice as long spans the same"
    ),
    ("directions/spider.py", "return (d, {'direction': d, 'age': (age - 1) % self.period})"): (
        "counting down comes by 0 at the same steps"
    ),
    ("directions/tracker.py", "self._left['upper'] = step / (tree.norm(d) or 2.0)"): (
        "where d = 0 there is no size to be relative to"
    ),
    (
        "estimators/zeroth_order.py",
        "return Estimate(h, value, {'calls': state['calls'] - 1}, stats)",
    ): ("a number names the draws of a call; any will do that no call had before"),
    (
        "estimators/zeroth_order.py",
        "return Estimate(h, value, {'calls': state['calls'] + 2}, stats)",
    ): ("the same"),
    (
        "linear/normal_cg.py",
        "return NormalCG(iterations=guards.tight_iterations(dim, 41), tolerance=1e-10)",
    ): "a choice: where `tight` gives up",
    (
        "linear/normal_cg.py",
        "return NormalCG(iterations=guards.tight_iterations(dim, 40), tolerance=2e-10)",
    ): "a choice: what `tight` calls solved",
    (
        "calculus/fixed_point_maps.py",
        "found = [*(kinds.prox(x, at.y, 2.0).values() if kinds.prox else ()), *(kinds.map(x, at.y, "
        "loss.one_batch).values() if kinds.map else ()), *(kinds.constraints(x, at.y, loss.one_batch)."
        "values() if kinds.constraints else ())]",
    ): "which entries of x a proximal map has in it, whatever its step",
    (
        "linear/quasi_newton.py",
        "earlier = zip(state['steps'], state['changes'], strict=False)",
    ): "both are made of the same pairs, three lines below",
    (
        "linear/quasi_newton.py",
        "S, C = (torch.stack([tree.wide(tree.own(p[side])) / tree.norm(p[1]) for p in pairs], "
        "dim=1) for side in (0, 1))",
    ): "a pair divided by the one length or the other says the same",
    (
        "lower/auxiliary.py",
        "return Newton() if dim <= 201 else LBFGS(steps=2000, tolerance=1e-09)",
    ): ("a choice of what is small"),
    (
        "estimators/one_step.py",
        "return replace(self, epsilon=min(self.epsilon, 0.0002))",
    ): "a choice; the truncation cannot be seen at either",
    (
        "estimators/betty.py",
        "return SimpleNamespace(type=self.method, neumann_iterations=self.iterations, "
        "neumann_alpha=self.scale, cg_iterations=self.iterations, cg_alpha=1.0, "
        "darts_alpha=self.epsilon, darts_multitask=True, sama_adam_alpha=self.epsilon, "
        "sama_multitask=False)",
    ): "betty then leaves displaced the copy of y that it was given, which nobody reads again",
    (
        "estimators/reptile.py",
        "if not (count > 0).all() or not torch.allclose(totals[name], count * entry, rtol=0.002):",
    ): "a choice: between copies of x and anything else lies more than either",
    (
        "estimators/sama.py",
        "return {name: torch.zeros_like(entry) if part is None else part for (name, entry), part in "
        "zip(g.items(), found, strict=False)}",
    ): "autograd gives a part for each entry it is asked for",
    ("linear/cg.py", "flat = accumulation ** 3.0 if precondition else 4 * accumulation"): (
        "a choice of what is flat: at either v does not overflow"
    ),
    ("linear/cg.py", "return CG(iterations=guards.tight_iterations(dim), tolerance=2e-11)"): (
        "a choice: what `tight` calls solved"
    ),
    ("linear/neumann.py", "return replace(self, iterations=20000, tolerance=2e-11)"): (
        "a choice: what `tight` calls vanished"
    ),
    (
        "linear/gmres.py",
        "if left <= target or beta <= 2e-14 * H.norm().item() or len(columns) == budget:",
    ): ("a choice between rounding and anything meant"),
    (
        "unrolling/traced.py",
        "if found is None or any((a() is not b for a, b in zip(found.owners, owners, strict=False))):",
    ): "a key holds the ids of the owners, and so their number",
    (
        "preconditioners/kfac.py",
        "loss, mode = (system.losses.lower, _LinearLayers(tree.detach(system.at.y)))",
    ): "differentiated in are the outputs of the layers; y itself need be no leaf",
    (
        "estimators/lancbio.py",
        "off = tree.norm(tree.sub(b, matvec(v))) / (tree.norm(b) or 2.0)",
    ): "where ∇y F = 0 there is no size to be relative to",
    ("lower/lbfgs.py", "y = tree.detach(tree.clone(y))"): (
        "torch's L-BFGS reads .grad, which any tensor may have"
    ),
    (
        "problem/trust.py",
        "return 0.001 * (step.stats.curvature or 0.0) * max(step.lower_size, 0.002)",
    ): "a choice: the tolerance that is proposed for a y near 0",
    ("optimizers/torch_optim.py", "y = tree.detach(tree.clone(y))"): (
        "torch's optimizers read .grad, which any tensor may have"
    ),
}
"""(file, what the statement then reads): why it is no mistake."""
