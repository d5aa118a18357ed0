"""What a model predicts, made into x_0 and eps in one place: solvers know no parametrization."""

from __future__ import annotations

from runtimes.errors import DexportError
from runtimes.table import Form, M, X


def predict(kind: str, alpha: float, sigma: float, x: Form = X, m: Form = M) -> tuple[Form, Form]:
    """Return x_0 and eps at x = alpha x_0 + sigma eps.

    ``m`` predicts "epsilon"; "sample", which is x_0; "v_prediction", alpha eps - sigma x_0
    (https://arxiv.org/abs/2202.00512, appendix D); or "flow_prediction", eps - x_0
    (https://arxiv.org/abs/2210.02747, with t running from data to noise).
    """
    if kind == "epsilon":
        if alpha == 0:
            raise DexportError(
                "a model with prediction_type='epsilon' cannot start from pure noise (rescale_betas_zero_snr=True): "
                "its x_0 is undefined there; take one with v_prediction, or leave rescale_betas_zero_snr out"
            )
        return (x - sigma * m) / alpha, m
    if kind == "sample":
        return m, (x - alpha * m) / sigma
    if kind == "flow_prediction":
        return (x - sigma * m) / (alpha + sigma), (x + alpha * m) / (alpha + sigma)
    return alpha * x - sigma * m, alpha * m + sigma * x
