"""Preconditioners M⁻¹ ≈ A⁻¹ of the adjoint system, symmetric positive definite.

A file is named as what it registers. They build; `linear` applies.
"""
