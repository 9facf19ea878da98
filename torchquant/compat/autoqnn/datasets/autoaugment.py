"""The learned augmentation policies of AutoAugment (Cubuk et al. 2018, arXiv:1805.09501), as torchvision has them."""

from __future__ import annotations

from typing import Any, ClassVar

from torchquant.errors import require


class _Policy:
    """Apply one of the 25 pairs of operations of a policy to a PIL image or a uint8 tensor.

    `fillcolor`: of what a shift or a rotation leaves empty. Raises MissingDependencyError without torchvision.
    """

    policy: ClassVar[str]

    def __init__(self, fillcolor: tuple[int, int, int] = (128, 128, 128)) -> None:
        transforms = require("torchvision.transforms", "autoqnn")
        self.transform = transforms.AutoAugment(transforms.AutoAugmentPolicy[self.policy], fill=list(fillcolor))

    def __call__(self, img: Any) -> Any:
        return self.transform(img)

    def __repr__(self) -> str:
        return f"AutoAugment {self.policy} Policy"


class CIFAR10Policy(_Policy):
    """The policy learned on CIFAR-10."""

    policy = "CIFAR10"


class ImageNetPolicy(_Policy):
    """The policy learned on ImageNet."""

    policy = "IMAGENET"


class SVHNPolicy(_Policy):
    """The policy learned on SVHN."""

    policy = "SVHN"
