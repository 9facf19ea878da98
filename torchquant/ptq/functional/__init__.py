"""The maths of post-training algorithms: functions of tensors, in which a grid is a callable or a few numbers.

A weight is (..., rows, K): the rows of its two-dimensional view, with the convolution groups or other batch dimensions
in front. Its Gram matrix is (..., K, K), of what the layer reads. Modules and quantizers are unknown here.
"""
