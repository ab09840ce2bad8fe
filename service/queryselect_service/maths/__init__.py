"""Formulas that several kernels share: pure functions of tensors, without a Spec's name or a pool's."""
