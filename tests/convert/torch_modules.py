"""PyTorch modules with the parameter names and the arithmetic of published programs, in any width: oracles.

Written from the papers: Liu et al., Bi-Real Net, 2018; Liu et al., ReActNet, 2020; Qin et al., IR-Net, 2020.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def named(**modules):
    """A module that holds modules by name."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


class FlatConv(nn.Module):
    """Binary convolution, scaled by the mean magnitude, whose weights are a column or OIHW."""

    def __init__(self, inputs, outputs, size, stride, *, flat, name):
        super().__init__()
        self.shape, self.stride, self.name = (outputs, inputs, size, size), stride, name
        weights = torch.randn(self.shape) * 0.1
        self.register_parameter(name, nn.Parameter(weights.reshape(-1, 1) if flat else weights))

    def forward(self, x):
        weights = getattr(self, self.name).view(self.shape)
        binary = weights.abs().mean((1, 2, 3), keepdim=True) * weights.sign()
        return F.conv2d(x.sign(), binary, stride=self.stride, padding=self.shape[-1] // 2)


class Shift(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3)

    def forward(self, x):
        return x + self.bias


class BiReal(nn.Module):
    """Bi-Real Net, or ReActNet on its layers; `units` binary convolutions a stage."""

    def __init__(self, widths, units, classes, *, react=False):
        super().__init__()
        self.react, self.stages = react, len(widths)
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage, (width, count) in enumerate(zip(widths, units), 1):
            blocks = []
            for unit in range(count):
                first = unit == 0 and stage > 1
                inputs = widths[stage - 2] if first else width
                parts = {"binary_conv": FlatConv(inputs, width, 3, 2 if first else 1, flat=not react, name="weights")}
                if react:
                    parts["binary_conv"] = FlatConv(inputs, width, 3, 2 if first else 1, flat=False, name="weight")
                    parts |= {"move0": Shift(inputs), "move1": Shift(width), "move2": Shift(width)}
                    parts |= {"prelu": nn.PReLU(width)}
                parts["bn1"] = nn.BatchNorm2d(width)
                if first:
                    shortcut = nn.AvgPool2d(2, 2), nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
                    parts["downsample"] = nn.Sequential(*shortcut)
                blocks.append(named(**parts))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            for unit in getattr(self, f"layer{stage}"):
                y = unit.bn1(unit.binary_conv(unit.move0(x) if self.react else x))
                x = y + (unit.downsample(x) if hasattr(unit, "downsample") else x)
                x = unit.move2(unit.prelu(unit.move1(x))) if self.react else x
        return self.fc(x.mean((2, 3)))


class ReActNetA(nn.Module):
    def __init__(self, width, blocks, classes):
        """`blocks` are (outputs, stride)."""
        super().__init__()
        stem = named(conv1=nn.Conv2d(3, width, 3, 2, 1, bias=False), bn1=nn.BatchNorm2d(width))
        features, inputs, self.strides = [stem], width, []
        for outputs, stride in blocks:
            conv = partial(FlatConv, inputs, inputs, flat=True, name="weights")
            parts = {"binary_3x3": conv(3, stride), "bn1": nn.BatchNorm2d(inputs)}
            parts |= {f"move1{i}": Shift(inputs) for i in (1, 2, 3)} | {"move21": Shift(inputs)}
            parts |= {"prelu1": nn.PReLU(inputs), "prelu2": nn.PReLU(outputs)}
            parts |= {f"move2{i}": Shift(outputs) for i in (2, 3)}
            if outputs == inputs:
                parts |= {"binary_pw": conv(1, 1), "bn2": nn.BatchNorm2d(inputs)}
            else:
                parts |= {f"binary_pw_down{i}": conv(1, 1) for i in (1, 2)}
                parts |= {f"bn2_{i}": nn.BatchNorm2d(inputs) for i in (1, 2)}
            features.append(named(**parts))
            self.strides.append(stride)
            inputs = outputs
        self.feature = nn.ModuleList(features)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        stem, *blocks = self.feature
        x = stem.bn1(stem.conv1(x))
        for b, stride in zip(blocks, self.strides):
            y = b.bn1(b.binary_3x3(b.move11(x))) + (F.avg_pool2d(x, 2) if stride == 2 else x)
            x = b.move13(b.prelu1(b.move12(y)))
            z = b.move21(x)
            if hasattr(b, "bn2"):
                y = b.bn2(b.binary_pw(z)) + x
            else:
                y = torch.cat([b.bn2_1(b.binary_pw_down1(z)) + x, b.bn2_2(b.binary_pw_down2(z)) + x], 1)
            x = b.move23(b.prelu2(b.move22(y)))
        return self.fc(x.mean((2, 3)))


class BalancedConv(nn.Conv2d):
    """IR-Net's convolution."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        scale = 2 ** torch.log2(flat.abs().mean(1)).round()
        return F.conv2d(
            x.sign(), flat.view_as(self.weight).sign() * scale.view(-1, 1, 1, 1), None, self.stride, self.padding
        )


class IRNet(nn.Module):
    """With shortcuts padded on both sides (`cifar`), or projected, and an unused norm behind the logits."""

    def __init__(self, widths, blocks, classes, *, cifar):
        super().__init__()
        self.cifar, self.stages = cifar, len(widths)
        size, stride = (3, 1) if cifar else (7, 2)
        self.conv1 = nn.Conv2d(3, widths[0], size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage, (width, count) in enumerate(zip(widths, blocks), 1):
            made = []
            for block in range(count):
                first = block == 0 and stage > 1
                inputs, stride = (widths[stage - 2], 2) if first else (width, 1)
                parts = {
                    "conv1": BalancedConv(inputs, width, 3, stride, 1, bias=False),
                    "conv2": BalancedConv(width, width, 3, 1, 1, bias=False),
                    "bn1": nn.BatchNorm2d(width),
                    "bn2": nn.BatchNorm2d(width),
                }
                if first and not cifar:
                    project = nn.Conv2d(inputs, width, 1, stride, bias=False)
                    parts["downsample"] = nn.Sequential(project, nn.BatchNorm2d(width))
                made.append(named(**parts))
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.bn2 = nn.BatchNorm1d(widths[-1])
        self.add_module("linear" if cifar else "fc", nn.Linear(widths[-1], classes))
        if not cifar:
            self.bn3 = nn.BatchNorm1d(classes)

    def forward(self, x):
        x = F.hardtanh(self.bn1(self.conv1(x)))
        x = x if self.cifar else F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            for b in getattr(self, f"layer{stage}"):
                y = b.bn1(b.conv1(x))
                x = F.hardtanh(y + self.shortcut(b, x, y))
                x = F.hardtanh(b.bn2(b.conv2(x)) + x)
        return (self.linear if self.cifar else self.fc)(self.bn2(x.mean((2, 3))))

    def shortcut(self, b, x, y):
        if hasattr(b, "downsample"):
            return b.downsample(x)
        side = (y.shape[1] - x.shape[1]) // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side)) if side else x


class LeNet(nn.Module):
    """The network of PyTorch's tutorial with binary convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 2, 5, bias=False), nn.Conv2d(2, 5, 5, bias=False)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 7)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = F.relu(F.max_pool2d(F.conv2d(x, conv.weight.sign()), 2))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


MODULES = {
    "bireal": lambda: BiReal((2, 4), (2, 3), 7),
    "reactnet_resnet": lambda: BiReal((2, 4), (3, 2), 7, react=True),
    "reactnet_a": lambda: ReActNetA(2, [(4, 1), (8, 2), (8, 1)], 7),
    "irnet_resnet20": lambda: IRNet((2, 4, 8), (1, 2, 1), 7, cifar=True),
    "irnet_resnet18": lambda: IRNet((2, 4), (1, 2), 7, cifar=False),
    "lenet": LeNet,
}


def seeded(name, seed=0):
    """A module in evaluation, no parameter and no statistic of which is trivial."""
    torch.manual_seed(seed)
    module = MODULES[name]().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for vector, low, high in (
                (part.weight, -1, 1.5),
                (part.bias, -0.5, 0.5),
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.2, 2),
            ):
                nn.init.uniform_(vector, low, high)
        elif isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight, 0.05, 0.4)
        elif isinstance(part, nn.Linear) and part.in_features > 64:
            # Short numbers, for a small file.
            part.weight.data = (part.weight.data * 16).round() / 16
    return module


def logits_of(module, images):
    """Of NHWC images."""
    with torch.no_grad():
        return module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
