"""Bias correction: rounding a weight shifts the mean of what it gives; the bias takes the shift back.

With the mean E[x] of the layer's input, the mean of the error is (Ŵ − W)·E[x] for each output channel (Nagel et al.
2019, section 4.2). Only a layer that has a bias is corrected: another one would be one more operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from calibration.graph import add_constant, readers, release, replace_input
from calibration.layers import Layer, along
from calibration.numbers import INT8, Numbers
from calibration.observe import Observed
from calibration.quantize import round_weight, weight_scale


def correct(
    model: ir.Model, layers: Sequence[Layer], statistics: Mapping[str, Observed], numbers: Numbers = INT8
) -> tuple[ir.Model, bool]:
    """Correct the biases of layers that are about to be quantized; ``statistics``: of their inputs as they are."""
    modified = False
    for layer in layers:
        bias = layer.bias
        mean = statistics[str(layer.input.name)].means if bias is not None else None
        if bias is None or mean is None or bias.const_value is None:
            continue
        assert layer.weight.const_value is not None
        weight = layer.weight.const_value.numpy()
        if weight.shape[layer.in_axis] != len(mean):
            continue  # a grouped convolution
        scale = weight_scale(weight, layer.out_axis, numbers)
        rounded = round_weight(weight, scale, layer.out_axis, numbers).astype(np.float32) * along(
            scale, layer.out_axis, weight.ndim
        )
        shift = (rounded - weight) * along(mean, layer.in_axis, weight.ndim)
        others = tuple(axis for axis in range(weight.ndim) if axis != layer.out_axis)
        corrected = (bias.const_value.numpy() - shift.sum(axis=others, dtype=np.float64)).astype(np.float32)
        del weight
        release(layer.weight.const_value)
        node = layer.node if len(layer.node.inputs) > 2 else readers(layer.output)[0]
        own = add_constant(model.graph, f"{bias.name}.{layer.node.name}", corrected)  # several may share an equal one
        replace_input(node, list(node.inputs).index(bias), own)
        modified = True
    return model, modified
