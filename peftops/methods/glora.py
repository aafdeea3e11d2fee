"""GLoRA, Chavan et al. 2023 (arXiv:2306.07967): a general change of weight and bias.

    y = (W + W * A + B) x + b + b * D + E + W C    * elementwise (the paper writes W A, its code multiplies so)

Each of A and B is "lora" (Xd Xu, of rank r), "vector" (a number per output), "constant" or "none"; C is "lora",
"vector" (a number per input) or "none"; D and E are "vector" (a number per output), "constant" or "none". Xd and all
vectors and constants start at 0: the model starts as it was. The paper also searches for the kinds of each layer, by
evolution on a network that trains all of them at once; here they are fixed, as in HF PEFT. If A is "lora", the whole
changed weight is computed, also in backward. Otherwise no tensor of its size is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attaching import register
from ..attaching.config import Config, check_choice, check_range, check_target, needs
from ..attaching.targets import ALL_LINEAR, Target
from ..nn import Adapter, dense_matrix, product, sizes

_WEIGHT = ("lora", "vector", "constant", "none")
_INPUT = ("lora", "vector", "none")
_BIAS = ("vector", "constant", "none")


@dataclass(frozen=True)
class GLoRAConfig(Config):
    """Options of GLoRA.

    Args:
        r: rank of each of A, B and C that is "lora".
        A, B, C, D, E: their kinds. HF PEFT can read adapters in which A and B have the same kind, and so have D and E.
        new_bias: let a layer that has no bias get one, as in the original; HF PEFT leaves C, D and E out there.
        target: as in :class:`LoRAConfig`.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.GLoRAConfig(r=2, C="none"))
        >>> model(torch.zeros(1, 8)).shape
        torch.Size([1, 4])
    """

    peft_type: ClassVar[str] = "GLORA"

    r: int = 8
    target: Target = ALL_LINEAR
    A: str = "lora"
    B: str = "lora"
    C: str = "lora"
    D: str = "constant"
    E: str = "constant"
    new_bias: bool = True

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, whole=True)
        check_target(self.target)
        for name in "ABCDE":
            known = {"A": _WEIGHT, "B": _WEIGHT, "C": _INPUT}.get(name, _BIAS)
            check_choice(name, getattr(self, name), known)
        if all(getattr(self, name) == "none" for name in "ABCDE"):
            raise ValueError("A, B, C, D and E are all 'none': nothing would train")
        super().__post_init__()

    def to_peft(self) -> dict[str, Any]:
        both = lambda x, y: x if x == y else f"{x},{y}"
        return {
            "peft_type": "GLORA",
            "r": self.r,
            "config_A_B": both(self.A, self.B),
            "config_C": self.C,
            "config_D_E": both(self.D, self.E),
            "new_bias": self.new_bias,
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> GLoRAConfig:
        needs(fields, "r", "target_modules", "config_A_B", "config_C", "config_D_E")
        (A, *B), (D, *E) = fields["config_A_B"].split(","), fields["config_D_E"].split(",")
        return cls(
            r=fields["r"],
            target=fields["target_modules"],
            A=A,
            B=(B or [A])[0],
            C=fields["config_C"],
            D=D,
            E=(E or [D])[0],
            new_bias=fields.get("new_bias", False),
        )


@register(GLoRAConfig)
class GLoRA(Adapter):
    peft_keys: ClassVar = {f"{name}_{part}": f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "Xu", "X")}

    def __init__(self, base: nn.Module, config: GLoRAConfig, layer: str):
        super().__init__()
        (in_, out), r, device = sizes(base), config.r, base.weight.device
        biased = base.bias is not None or config.new_bias
        self.kinds = {name: getattr(config, name) if name in "AB" or biased else "none" for name in "ABCDE"}
        if base.bias is None:
            self.kinds["D"] = "none"  # b * D, without a b
        if "lora" in self.kinds.values():
            self.rank = r
        for name, kind in self.kinds.items():
            rows, columns = (in_, 1) if name == "C" else (out, in_)
            if kind == "lora":
                up = nn.init.kaiming_uniform_(torch.empty(r, columns, device=device), a=math.sqrt(5))
                self.register_parameter(f"{name}_Xd", nn.Parameter(torch.zeros(rows, r, device=device)))
                self.register_parameter(f"{name}_Xu", nn.Parameter(up))
            elif kind != "none":
                shape = (1,) if kind == "constant" else (rows,) if name in "DE" else (rows, 1)
                self.register_parameter(f"{name}_X", nn.Parameter(torch.zeros(shape, device=device)))

    def value(self, name: str) -> Tensor | float:
        """A, B, C, D or E in float32, in a shape that broadcasts to its own."""
        kind = self.kinds[name]
        if kind == "lora":
            return getattr(self, f"{name}_Xd").float() @ getattr(self, f"{name}_Xu").float()
        return 0.0 if kind == "none" else getattr(self, f"{name}_X").float()

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.kinds["A"] == "lora":
            weight = dense_matrix(base, base.weight.dtype)
            y = F.linear(x, (weight * (1 + self.value("A")) + self.value("B")).to(x.dtype))
        else:
            y = product(base, x) * (1 + torch.as_tensor(self.value("A"), device=x.device).flatten()).to(x.dtype)
            if self.kinds["B"] == "lora":
                y = y + F.linear(F.linear(x, self.B_Xu.to(x.dtype)), self.B_Xd.to(x.dtype))
            elif self.kinds["B"] != "none":
                y = y + x.sum(-1, keepdim=True) * self.B_X.flatten().to(x.dtype)
        bias = self.bias(base.bias, lambda column: product(base, column.t().to(base.weight.dtype)).flatten())
        return y if bias is None else y + bias.to(y.dtype)

    def bias(self, bias: Tensor | None, times_weight: Any) -> Tensor | None:
        total: Tensor | None = bias
        for extra in (
            bias * self.value("D") if bias is not None and self.kinds["D"] != "none" else None,
            self.value("E") if self.kinds["E"] != "none" else None,
            times_weight(self.value("C")) if self.kinds["C"] != "none" else None,
        ):
            if extra is not None:
                total = extra if total is None else total + extra
        return total

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new = self.bias(bias, lambda column: (weight @ column).flatten())
        new = None if new is None else new.expand(len(weight)).clone()
        return weight * (1 + self.value("A")) + self.value("B"), new
