"""A fast copy of a network that does not learn: what follows a convolution is done within it.

    convolution, BatchNorm             one convolution, with the BatchNorm in its weights
    ..., sum, ReLU or the like         one operator that ends with them: of oneDNN on a CPU, of
                                       cuDNN on a GPU, there ReLU alone
    linear layer, GELU                 the same, on a CPU

ReLU and sum as passes over the memory take half of a ResNet50's time in bfloat16, on a CPU and on
an H100 alike. PyTorch keeps the operators that end with them for its own compilers
(torch.ops.mkldnn, torch.cudnn_convolution_relu): they are private and may change. So a copy is
compared with its network at first use, and where it differs or fails, the network itself computes.
`torch.fx` finds the places to fuse.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.backbones import Conv2dDepthwise
from networks.fusion import ConvNormReLU

# What may follow, as oneDNN calls it: name, numbers, algorithm
Ending = tuple[str, list[float], str]
NOTHING: Ending = ("none", [], "")
RELU: Ending = ("relu", [], "")
ENDINGS: dict[Any, Ending] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu), RELU),
    **dict.fromkeys((nn.ReLU6, F.relu6), ("hardtanh", [0.0, 6.0], "")),
    **dict.fromkeys((nn.SiLU, F.silu), ("swish", [], "")),
    **dict.fromkeys((nn.Hardswish, F.hardswish), ("hardswish", [], "")),
    **dict.fromkeys((nn.GELU, F.gelu), ("gelu", [], "none")),
}
SUMS = (operator.add, operator.iadd, torch.add)
# The dtypes that oneDNN and cuDNN are asked for
FUSED = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
ALIGNED = 8  # channels in a multiple of it suit a GPU's tensor cores
# How far the copy may be from float32, as a share of a map's root mean square: in low precision
# twice as far as the network itself, and a little more.
SLACK, SLACK_IN_FLOAT32 = 0.02, 1e-3


class Snapshot:
    """Which tensors a network had, and how often each of them had been written to.

    A write to `.data` goes unnoticed, for PyTorch does not count it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parts = [
            (place, name, part)
            for module in network.modules()
            for place in (module._parameters, module._buffers, module._modules)
            for name, part in place.items()
        ]
        tensors = [part for *_, part in self._parts if isinstance(part, Tensor)]
        self._tensors = [t for t in tensors if not t.is_inference()]  # those count no writes
        self._versions = [t._version for t in self._tensors]

    def is_current(self) -> bool:
        """Whether the network has the same tensors, unwritten; 0.05 ms for a ResNet50."""
        return all(place.get(name) is part for place, name, part in self._parts) and (
            [t._version for t in self._tensors] == self._versions
        )


def fast_copy(network: nn.Module, dtype: torch.dtype, example: Tensor) -> nn.Module | None:
    """Return a copy that computes the same in `dtype`, faster; None where there is none.

    Args:
        network: in eval mode, from an image to maps; stays as it is.
        dtype: that layers compute in; autocast's if it is on, else the image's.
        example: (N, C, h, w), to compare on.
    """
    with torch.autocast(example.device.type, enabled=False):
        exact = network(example)
    plain = network(example)
    for may_fuse in (True, False) if has_operators(example, dtype) else (False,):
        try:
            fast = _fold(network)
            fast = _fuse(fast) if may_fuse else fast
            for layer in fast.modules():  # all else stays in float32, as with autocast
                if isinstance(layer, nn.Conv2d | nn.Linear | Fused):
                    layer.to(dtype)
            if is_as_exact(fast(example), plain, exact):
                return fast
        except Exception:  # a network that cannot be followed, an operator that changed
            continue
    return None


def has_operators(example: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are operators that end with more, where a tensor is, in a dtype."""
    return dtype in FUSED.get(example.device.type, ())


# of a model: when it was copied, for which dtype, and the copy, None where the model is better
_TWINS: WeakKeyDictionary[nn.Module, tuple[Snapshot, torch.dtype, nn.Module | None]]
_TWINS = WeakKeyDictionary()


def prediction_copy(
    model: nn.Module, dtype: torch.dtype, before: Tensor, after: Tensor
) -> nn.Module:
    """Return what to predict with: a copy whose decoder and fusions are fused, too.

    Its encoder counts as frozen, also one that has learnt. Where there is no such copy it is the
    model itself. The copy is kept with the model and made anew when a weight was written to;
    training never sees it.

    Args:
        model: in eval mode.
        dtype: that layers compute in; autocast's if it is on, else float32.
        before: (B, 3, H, W); the copy is compared with the model on the first pair.
        after: the same shape.
    """
    if not has_operators(before, dtype) or model._compiled_call_impl is not None:
        return model
    kept = _TWINS.get(model)
    if kept is None or kept[1] != dtype or not kept[0].is_current():
        pair, snapshot, twin = (before[:1], after[:1]), Snapshot(model), None
        try:
            found = _twin(model, dtype)
            with torch.autocast(before.device.type, enabled=False):
                exact = model(*pair)
            if is_as_exact(found(*pair), model(*pair), exact):
                twin = found
        except Exception:  # as in `fast_copy`
            twin = None
        kept = _TWINS[model] = (snapshot, dtype, twin)
    return model if kept[2] is None else kept[2]


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model, but for its encoder's weights, with fused decoder and fusions."""
    encoders = [(n, m) for n, m in model.named_modules() if hasattr(m, "frozen")]
    shared: list[Any] = [m if m.frozen else m.backbone for _, m in encoders]
    twin = copy.deepcopy(model, {id(module): module for module in shared})
    for name, _ in encoders:
        twin.get_submodule(name).frozen = True  # type: ignore[assignment]
    for name, module in list(twin.named_modules()):
        is_ours = not any(name.startswith(f"{n}.") for n, _ in encoders)
        if is_ours and isinstance(module, ConvNormReLU):
            twin.set_submodule(name, FusedSum(module).to(dtype))
    return twin


def is_as_exact(fast: Any, plain: Any, exact: Any) -> bool:
    """Whether results, of which `exact` is in float32, differ from it by rounding alone."""
    if not isinstance(exact, Tensor):
        parts = (x.values() if isinstance(x, dict) else x for x in (fast, plain, exact))
        return all(is_as_exact(*part) for part in zip(*parts, strict=True))
    gap, usual, size = (
        float((x.double() - y).square().mean().sqrt())
        for x, y in ((fast, exact), (plain, exact), (exact, torch.zeros_like(exact)))
    )
    in_float32 = exact.is_cpu and fast.dtype == torch.float32
    return gap <= 2 * usual + (SLACK_IN_FLOAT32 if in_float32 else SLACK) * size


class _Tracer(fx.Tracer):
    """Follows a network into every module but torch's own, and those that it fails to follow."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
        return is_layer or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever a module's code does to a tensor that has no numbers yet
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _fold(network: nn.Module) -> fx.GraphModule:
    """Copy a network, its BatchNorms within the convolutions before them."""
    twin = copy.deepcopy(network).eval()
    folded = fx.GraphModule(twin, _Tracer().trace(twin)).eval()
    graph = folded.graph
    graph.eliminate_dead_code()  # what failed to be followed has left a beginning
    for node in list(graph.nodes):
        module = _module(folded, node)
        if isinstance(module, nn.Identity | nn.Dropout):
            _replace(graph, [node], node.args[0])
        elif isinstance(module, nn.BatchNorm2d) and len(node.args[0].users) == 1:
            conv = _module(folded, node.args[0])
            if not isinstance(conv, nn.Conv2d):
                continue
            result = node.args[0]
            folded.set_submodule(result.target, fuse_conv_bn_eval(conv, module))
            for name in ("drop", "act"):  # timm's do what follows, too
                if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
                    with graph.inserting_before(node):
                        result = graph.call_module(f"{node.target}.{name}", (result,))
            _replace(graph, [node], result)
    folded.recompile()
    folded.delete_all_unused_submodules()
    return folded


def _fuse(folded: fx.GraphModule) -> fx.GraphModule:
    """Let convolutions and linear layers end with the sum and the activation that follow them."""
    graph = folded.graph
    for number, node in enumerate(list(graph.nodes)):
        layer = _module(folded, node)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        chain, inputs, in_place = [node], [node.args[0]], False
        follows = _only_user(node)
        if follows and _is_sum(follows) and isinstance(layer, nn.Conv2d) and layer.groups == 1:
            (other,) = set(follows.all_input_nodes) - {node}
            inputs.append(other)
            in_place = _may_be_written(folded, other, follows)
            chain.append(follows)
            follows = _only_user(follows)
        ending = _ending(folded, follows)
        if follows and ending and (len(inputs) == 1 or ending == RELU):  # a sum takes no other
            chain.append(follows)
        else:
            ending = NOTHING
        if _on_gpu(layer):
            pays = ending == RELU and _suits_cudnn(layer)
        else:
            pays = len(chain) > 1 or isinstance(layer, nn.Conv2d)
        if pays:
            name = f"fused_{number}"
            folded.add_submodule(name, Fused(layer, ending, in_place))
            with graph.inserting_before(chain[-1]):
                fused = graph.call_module(name, tuple(inputs))
            _replace(graph, chain, fused)
    folded.recompile()
    folded.delete_all_unused_submodules()
    return folded


class Fused(nn.Module):
    """A convolution or a linear layer with what follows: act(layer(x)) or act(layer(x) + other).

    Args:
        layer: has the weights.
        ending: the activation.
        in_place: the result may be written into `other`.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, ending: Ending, in_place: bool) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.ending, self.in_place = ending, in_place
        self.conv: tuple[Any, ...] = ()
        self.is_same = type(layer).__name__ == "Conv2dSame"  # ours, and timm's
        self._packed: tuple[Any, Tensor] | None = None
        if isinstance(layer, nn.Conv2d):
            is_known = type(layer) in (nn.Conv2d, Conv2dDepthwise) or self.is_same
            if not is_known or layer.padding_mode != "zeros":
                raise NotImplementedError(layer)
            self.conv = (layer.padding, layer.stride, layer.dilation, layer.groups)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Turn (N, C, h, w), and what to add to the result, into (N, D, h', w')."""
        x = x.to(self.weight.dtype)
        if not self.conv:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.ending)
        if self.is_same:
            x = pad_same(x, self.weight.shape[2:], self.conv[1])
        if _on_gpu(self):
            return self._by_cudnn(x, other)
        weight = self._weight_for(x)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, self.bias, *self.conv, *self.ending
            )
        name, numbers, _ = self.ending
        activation = (None if name == "none" else name, numbers, None)
        rest = (weight, self.bias, *self.conv, "add", 1.0, *activation)
        if self.in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *rest)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *rest)

    def _by_cudnn(self, x: Tensor, other: Tensor | None) -> Tensor:
        """Do it on a GPU, where the activation is ReLU."""
        padding, *rest = self.conv
        where = (rest[0], padding, *rest[1:])
        if other is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *where)
        return torch.cudnn_convolution_add_relu(x, self.weight, other, 1.0, self.bias, *where)

    def _weight_for(self, x: Tensor) -> Tensor:
        """Return the weight as oneDNN wants it for this size: else it is reordered at each call."""
        packed = self._packed
        if packed is None or packed[0] != x.shape:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            packed = x.shape, pack(self.weight, *self.conv, x.shape)
            self._packed = packed
        return packed[1]


class FusedSum(nn.Module):
    """`ConvNormReLU` of several maps: on a CPU a convolution of each, added to the one before.

    It is that of the maps' concatenation, which took a tenth of a prediction's time by itself.
    """

    def __init__(self, block: ConvNormReLU) -> None:
        super().__init__()
        parts: Any = block
        self.whole: nn.Conv2d = fuse_conv_bn_eval(parts[0], parts[1])
        self.parts: list[Fused] = []

    def forward(self, *maps: Tensor) -> Tensor:
        """Turn maps (B, C_i, h, w) into one (B, D, h, w)."""
        maps = (torch.cat(maps, dim=1),) if _on_gpu(self.whole) else maps
        if not self.parts:
            self.parts = self._split([x.shape[1] for x in maps])
        result: Tensor | None = None
        for part, x in zip(self.parts, maps, strict=True):
            result = part(x, result)
        assert result is not None
        return result

    def _split(self, widths: list[int]) -> list["Fused"]:
        parts = []
        for number, weight in enumerate(self.whole.weight.split(widths, dim=1)):
            layer: nn.Conv2d = copy.deepcopy(self.whole)
            layer.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), False)
            layer.bias = None if number else self.whole.bias
            ending = RELU if number == len(widths) - 1 else NOTHING
            parts.append(Fused(layer, ending, in_place=True))
        return parts


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad (N, C, h, w) with zeros as TensorFlow's `same` does: if unevenly, more at the end."""
    padding: list[int] = []
    for side, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-side // s) - 1) * s + k - side, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def _module(network: nn.Module, node: fx.Node | None) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return network.get_submodule(str(node.target))
    return None


def _on_gpu(layer: Any) -> bool:
    return bool(layer.weight.is_cuda)


def _suits_cudnn(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and not (layer.in_channels % ALIGNED or layer.out_channels % ALIGNED)
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two different results."""
    is_sum = node.target in (*SUMS, "add", "add_") and not node.kwargs
    return is_sum and len(node.args) == len(node.all_input_nodes) == 2


def _ending(network: nn.Module, node: fx.Node | None) -> Ending | None:
    module = _module(network, node)
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    key = type(module) if module is not None else node.target if node is not None else None
    return ENDINGS.get(key)


def _may_be_written(network: nn.Module, node: fx.Node, last: fx.Node) -> bool:
    """Whether a result is memory of its own that nothing reads after `last`."""
    fresh = nn.Conv2d | nn.MaxPool2d | Fused
    readers = [user for user in node.users if user is not last]
    return isinstance(_module(network, node), fresh) and all(
        isinstance(_module(network, user), fresh) and user < last for user in readers
    )


def _replace(graph: fx.Graph, chain: list[fx.Node], result: fx.Node) -> None:
    """Put a result in the place of the last of some nodes, and take them out."""
    chain[-1].replace_all_uses_with(result)
    for node in reversed(chain):
        graph.erase_node(node)
