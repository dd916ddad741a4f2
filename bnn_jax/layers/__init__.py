"""Flax Linen layers that compute on integer codes."""

from bnn_jax.layers.activations import PReLU, RPReLU
from bnn_jax.layers.attention import Normalized, SelfAttention, rotary, sign_products
from bnn_jax.layers.binary_conv import BinaryConv, BinaryConvTranspose
from bnn_jax.layers.binary_dense import BinaryDense, BinaryDenseGeneral
from bnn_jax.layers.code_products import scaled_conv
from bnn_jax.layers.convolution import conv
from bnn_jax.layers.gates import ChannelGate, ChannelInteractions
from bnn_jax.layers.norm import BatchNorm, batch_norm
from bnn_jax.layers.pooling import avg_pool_2x2, max_pool, mean_pool
from bnn_jax.layers.recurrent import BinaryGRU, BinaryLSTM
from bnn_jax.layers.scaling import OutputScale
from bnn_jax.precision import widened

__all__ = [
    "BatchNorm",
    "BinaryConv",
    "BinaryConvTranspose",
    "BinaryDense",
    "BinaryDenseGeneral",
    "BinaryGRU",
    "BinaryLSTM",
    "ChannelGate",
    "ChannelInteractions",
    "Normalized",
    "OutputScale",
    "PReLU",
    "RPReLU",
    "SelfAttention",
    "avg_pool_2x2",
    "batch_norm",
    "conv",
    "max_pool",
    "mean_pool",
    "rotary",
    "scaled_conv",
    "sign_products",
    "widened",
]
