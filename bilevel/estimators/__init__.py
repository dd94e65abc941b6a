"""Estimators of the hypergradient: one paper a file, named as what it registers.

None imports another. Derivatives come from `calculus`, which counts them.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.estimators.aggregation import Aggregation as Aggregation
    from bilevel.estimators.alternating import Alternating as Alternating
    from bilevel.estimators.averaged_multipliers import AveragedMultipliers as AveragedMultipliers
    from bilevel.estimators.bome import Bome as Bome
    from bilevel.estimators.dynamic_barrier import DynamicBarrier as DynamicBarrier
    from bilevel.estimators.fixed_point import FixedPoint as FixedPoint
    from bilevel.estimators.fomaml import FOMAML as FOMAML
    from bilevel.estimators.forward import Forward as Forward
    from bilevel.estimators.gradient_gap import GradientGap as GradientGap
    from bilevel.estimators.implicit import Implicit as Implicit
    from bilevel.estimators.joint import Joint as Joint
    from bilevel.estimators.kkt import KKT as KKT
    from bilevel.estimators.lancbio import LancBiO as LancBiO
    from bilevel.estimators.maid import MAID as MAID
    from bilevel.estimators.moreau import Moreau as Moreau
    from bilevel.estimators.one_step import OneStep as OneStep
    from bilevel.estimators.penalty import Penalty as Penalty
    from bilevel.estimators.regularised_gap import RegularisedGap as RegularisedGap
    from bilevel.estimators.reptile import Reptile as Reptile
    from bilevel.estimators.rising_penalty import RisingPenalty as RisingPenalty
    from bilevel.estimators.sama import Sama as Sama
    from bilevel.estimators.shine import Shine as Shine
    from bilevel.estimators.single_loop import SingleLoop as SingleLoop
    from bilevel.estimators.unroll import Unroll as Unroll
    from bilevel.estimators.value_function import ValueFunction as ValueFunction
    from bilevel.estimators.value_gap import ValueGap as ValueGap
    from bilevel.estimators.zeroth_order import ZerothOrder as ZerothOrder
else:
    __getattr__, __dir__ = exports(__name__, "estimators")
