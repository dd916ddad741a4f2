"""The network that PyTorch trains in the benchmark is the one that is trained here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.losses import smoothed_multiclass_hinge
from bnn_jax.models.build import build_model

torch = pytest.importorskip("torch", reason="PyTorch is a peer of the benchmarks, not a dependency")


def test_loss_and_gradients_agree():
    from bnn_jax.benchmarks import torch_peer

    model = build_model(num_classes=10, name="resnet20", width=4, input_quantizer="ste_sign", kernel_quantizer="xnor")
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(8, 16, 16, 3)).astype(np.float32), rng.integers(0, 10, 8)
    variables = model.init(jax.random.key(0), images, train=False)

    def loss(params):
        (logits, _), _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return smoothed_multiclass_hinge(logits, jnp.asarray(labels, jnp.int32)).mean()

    expected, gradient = jax.value_and_grad(loss)(variables["params"])

    peer = torch_peer.XnorResNet(width=4)
    params = variables["params"]
    blocks = sorted(name for name in params if name.startswith("stage"))

    def oihw(kernel):
        return torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1).copy())

    with torch.no_grad():
        peer.stem.weight.copy_(oihw(params["stem"]["kernel"]))
        peer.head.weight.copy_(torch.from_numpy(np.array(params["head"]["kernel"])).T)
        for name, block in zip(blocks, peer.blocks, strict=True):
            for conv in ("conv1", "conv2"):
                getattr(block, conv).latent.copy_(oihw(params[name][conv]["latent_kernel"]))
        peer.head.bias.zero_()
    found = torch_peer.smoothed_multiclass_hinge(
        peer(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.from_numpy(labels)
    )
    found.backward()
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    for name, block in zip(blocks, peer.blocks, strict=True):
        for conv in ("conv1", "conv2"):
            wanted = oihw(gradient[name][conv]["latent_kernel"]).numpy()
            np.testing.assert_allclose(getattr(block, conv).latent.grad, wanted, atol=1e-4 * np.abs(wanted).max())
