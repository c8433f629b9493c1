"""Plain torch in the order of the formulas, any float dtype: the specification and the oracle.

Each `<op>_fwd` and `<op>_bwd` has the signature of the raw op of that name. Low-precision inputs
are computed in float32 and rounded once; float64 stays float64. The forwards are differentiable.
"""
