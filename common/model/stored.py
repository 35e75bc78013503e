"""What the frozen matrices are stored as, apart from what they are multiplied in.

`[model] dtype` is of the matrices of linear layers and embeddings. Norms, biases, adapters and
heads are float32 always, and so are matrices that some other code reads. A product is of the run's
`precision`, whatever its matrix is stored as: outside autocast a stored matrix is widened where it
is used, for as long as that takes. So a base that was published in bfloat16 gives the same bits
stored in either; one that was published in float32 is rounded once, as it is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.common.errors import BadInput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTISED = ("int8", "nf4")  # read as bfloat16, then `common.model.quantised`
_NATIVE = (8, 0)  # of a GPU that multiplies bfloat16


@dataclass(frozen=True)
class Place:
    """Where a base is loaded to, and what its matrices are stored as there."""

    device: torch.device
    dtype: torch.dtype
    quantised: str = ""  # what matrices of linear layers are kept as once they are read

    @classmethod
    def of(cls, dtype: str, device: torch.device | None) -> Place:
        """`dtype` as configured; "auto": bfloat16 on a GPU that multiplies it, else float32."""
        where = device or torch.device("cpu")
        if dtype == "auto":
            native = where.type == "cuda" and torch.cuda.get_device_capability(where) >= _NATIVE
            dtype = "bfloat16" if native else "float32"
        if dtype in QUANTISED:
            return cls(where, torch.bfloat16, dtype)
        if dtype not in DTYPES:
            known = ", ".join((*DTYPES, *QUANTISED))
            raise BadInput(f"[model] dtype = {dtype!r}: expected auto or one of {known}")
        return cls(where, DTYPES[dtype])

    @property
    def dtype_name(self) -> str:
        """As configured."""
        named = (name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return self.quantised or next(named)


ON_CPU = Place(torch.device("cpu"), torch.float32)


class StoredLinear(nn.Linear):
    """A frozen linear layer whose matrix is stored narrower than it is multiplied."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, out) of `rows` (…, in), in their own type, or in autocast's."""
        if torch.is_autocast_enabled(rows.device.type):
            return functional.linear(rows, self.weight, self.bias)
        return _widened(rows, self.weight, self.bias)


class StoredConv1D(Conv1D):
    """The same of GPT-2's layers, whose matrix is (in, out)."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, out) of `rows` (…, in), in their own type, or in autocast's."""
        if torch.is_autocast_enabled(rows.device.type):
            return functional.linear(rows, self.weight.t(), self.bias)
        return _widened(rows, self.weight.t(), self.bias)


class StoredEmbedding(nn.Embedding):
    """A frozen embedding whose rows leave in float32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…, width) float32 of `ids` (…)."""
        return super().forward(ids).float()


_KINDS: dict[type, type] = {
    nn.Linear: StoredLinear,
    Conv1D: StoredConv1D,
    nn.Embedding: StoredEmbedding,
}
_PLAIN = {stored: plain for plain, stored in _KINDS.items()}


def _widened(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    flat: torch.Tensor = _Widened.apply(  # type: ignore[no-untyped-call]
        rows.reshape(-1, rows.shape[-1]), matrix, bias
    )
    return flat.reshape(*rows.shape[:-1], matrix.shape[0])


class _Widened(torch.autograd.Function):
    """(n, out) of (n, in): a product by a frozen matrix, kept for the way back as it is stored."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrix: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(matrix)
        return functional.linear(rows, matrix.to(rows.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (matrix,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ matrix.to(gradient.dtype), None, None


@contextmanager
def planned(kind: Any, config: PreTrainedConfig, place: Place) -> Iterator[None]:
    """What transformers' `kind` loads in here has its matrices stored as `place` says.

    None of them is float32 first: a plan of transformers' own says what each is read as.
    """
    if place.dtype == torch.float32:
        yield
        return
    with torch.device("meta"):
        skeleton = kind.from_config(copy.deepcopy(config), attn_implementation="eager")
    plan = {f"^{re.escape(name)}$": place.dtype for name in _narrow(skeleton)}
    loaded: Any = type(skeleton)
    loaded._get_dtype_plan = lambda self, dtype: dict(plan)
    try:
        yield
    finally:
        del loaded._get_dtype_plan


def keep_stored(base: PreTrainedModel) -> None:
    """Make each module whose matrix is narrow one that widens it.

    What a family's own code reads past the module is float32 again: an embedding that is never
    called, as DeBERTa's of distances, or where that is not it, as in Mamba, all of them.
    """
    narrow = [
        module
        for module in base.modules()
        if type(module) in _KINDS and module.weight.dtype != torch.float32
    ]
    for module in narrow:
        module.__class__ = _KINDS[type(module)]
    called: set[nn.Module] = set()
    if narrow and not _reads(base, called):
        _widen(each for each in narrow if isinstance(each, nn.Embedding) and each not in called)
        if not _reads(base, called):
            _widen(narrow)


def stored_as(network: nn.Module) -> str:
    """The name of what the matrices of a network are stored as."""
    narrow = any(type(module) in _PLAIN for module in network.modules())
    return "bfloat16" if narrow else "float32"


def _widen(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        module.__class__ = _PLAIN.get(type(module), type(module))


def _reads(base: PreTrainedModel, called: set[nn.Module]) -> bool:
    """Whether a text goes through; adds to `called` the modules that it went through.

    Of another medium nothing is there to try yet (`common.model.inputs` does): all count as called.
    """
    if base.main_input_name != "input_ids":
        called.update(base.modules())
        return True
    ids = torch.zeros(1, 4, dtype=torch.int64, device=base.device)
    hooks = [
        each.register_forward_pre_hook(lambda module, _: called.add(module))
        for each in base.modules()
    ]
    try:
        with torch.no_grad():
            base(input_ids=ids, attention_mask=torch.ones_like(ids))
    except RuntimeError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def widen_trained(network: nn.Module) -> None:
    """What is trained is float32, in modules that Opacus knows."""
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if type(module) in _PLAIN and module.weight.dtype == torch.float32:
            module.__class__ = _PLAIN[type(module)]


def _narrow(skeleton: PreTrainedModel) -> set[str]:
    """Names of the matrices that nothing reads but modules that can widen them."""
    owners: dict[int, set[type]] = {}
    names: dict[str, int] = {}
    for name, module in skeleton.named_modules():
        for each, parameter in module.named_parameters(recurse=False):
            kind = type(module) if each == "weight" and type(module) in _KINDS else nn.Module
            owners.setdefault(id(parameter), set()).add(kind)
            names[f"{name}.{each}"] = id(parameter)
    wide = skeleton._keep_in_fp32_modules or ()  # a family's own: code beside them reads their type
    return {
        name
        for name, parameter in names.items()
        if nn.Module not in owners[parameter] and not any(part in name.split(".") for part in wide)
    }
