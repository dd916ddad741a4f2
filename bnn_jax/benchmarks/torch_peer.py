"""The peer of the training benchmark: an XNOR-ResNet for small images written in PyTorch, where that is installed.

The same network, loss, augmentation and optimizer as :class:`bnn_jax.models.resnet.ResNet` with the quantizers ste_sign
and xnor under sgd with Nesterov's momentum; latent weights are clipped to their box.  Images stay NCHW in shape, in
either memory format.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class SteSign(torch.autograd.Function):
    """Sign with the clipped straight-through estimator; sign(0) = +1."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0)

    @staticmethod
    def backward(context, g):
        (x,) = context.saved_tensors
        return g * (x.abs() <= 1)


class XnorConv(nn.Module):
    """3x3 convolution of signs, times the mean magnitude of each filter."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        bound = (6 / (9 * (inputs + features))) ** 0.5
        self.latent = nn.Parameter(torch.empty(features, inputs, 3, 3).uniform_(-bound, bound))
        self.stride = stride

    def forward(self, x):
        scale = self.latent.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
        return functional.conv2d(SteSign.apply(x), SteSign.apply(self.latent), stride=self.stride, padding=1) * scale


class XnorBlock(nn.Module):
    """BN -> sign -> binary conv, twice, around a shortcut without parameters."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(features)
        self.conv1, self.conv2 = XnorConv(inputs, features, stride), XnorConv(features, features, 1)
        self.stride, self.missing = stride, features - inputs

    def forward(self, x):
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.missing)) + y


class XnorResNet(nn.Module):
    """Stem, stages of XNOR blocks, mean over the pixels, dense layer."""

    def __init__(self, *, stage_sizes: tuple[int, ...] = (3, 3, 3), width: int = 16, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        blocks, inputs = [], width
        for stage, size in enumerate(stage_sizes):
            for block in range(size):
                features = width * 2**stage
                blocks.append(XnorBlock(inputs, features, 2 if stage > 0 and block == 0 else 1))
                inputs = features
        self.blocks, self.norm, self.head = (
            nn.Sequential(*blocks),
            nn.BatchNorm2d(inputs),
            nn.Linear(inputs, num_classes),
        )

    def forward(self, x):
        x = functional.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


def smoothed_multiclass_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of :func:`bnn_jax.losses.smoothed_multiclass_hinge`."""
    margins = logits - logits.gather(1, labels[:, None]) + 1 - functional.one_hot(labels, logits.shape[1])
    smoothed = (logits.softmax(1).detach() * margins).sum(1)
    return torch.where(smoothed < 0, margins.max(1).values, smoothed).mean()


def augmented(images: Tensor, mean: Tensor, std: Tensor, padding: int = 4) -> Tensor:
    """uint8 images (batch, 3, height, width) normalized, padded, cropped at random and flipped at random."""
    batch, _, height, width = images.shape
    x = functional.pad((images - mean) / std, (padding,) * 4)
    rows = torch.randint(2 * padding + 1, (batch, 1)) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (batch, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, columns.flip(1))
    index = torch.arange(batch)[:, None, None]
    cropped = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


class Trainer:
    """Train an :class:`XnorResNet` on uint8 images, step by step.

    Args:
      channels_last: memory format of network and images.
      mean, std: of each channel, in units of 0..255.
    """

    def __init__(self, model: XnorResNet, *, channels_last: bool, mean, std, learning_rate: float = 0.1):
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.format)
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.latent = [module.latent for module in model.modules() if isinstance(module, XnorConv)]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step of SGD; the loss before it."""
        self.model.train()
        x = augmented(images, self.mean, self.std).contiguous(memory_format=self.format)
        loss = smoothed_multiclass_hinge(self.model(x), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for weight in self.latent:
                weight.clamp_(-1, 1)
        return loss.item()

    @torch.inference_mode()
    def evaluate(self, images: Tensor) -> Tensor:
        """The predicted classes, with running statistics."""
        self.model.eval()
        x = ((images - self.mean) / self.std).contiguous(memory_format=self.format)
        return self.model(x).argmax(1)
