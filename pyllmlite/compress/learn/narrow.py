"""A narrower model: channels, neurons and heads that the activations use least are left out.

Importance is that of Muralidharan et al. 2024 (Minitron, section 2.2), on the model's own text:
a hidden channel by the mean absolute output of all norms, one choice for the whole model, since the
residual stream runs through it; an MLP neuron by the mean absolute input of the down projection and
a head by the mean norm of its output, both chosen layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyllmlite.core.errors import ConfigError

if TYPE_CHECKING:
    from pyllmlite.compress.layered_model import LayeredModel
    from pyllmlite.compress.learn.student import Cut
    from pyllmlite.core.spec import ModelSpec

_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def narrowed(
    layered: LayeredModel,
    model: Any,
    cut: Cut,
    layers: list[int],
    texts: Sequence[list[int]],
    config: Any,
) -> dict[str, Any]:
    """The state of ``model`` with less of everything ``cut`` names; ``config`` is made to fit.

    Args:
        cut: Completed.
        layers: Those that will be kept: only their activations count.
        texts: Token ids to see activations on.
    Raises:
        ConfigError: See :func:`check_narrower`; or there is no text.
    """
    spec = layered.source.spec
    check_narrower(layered, cut)
    if not texts:
        raise ConfigError("a narrower student needs text to see which parts are used")
    seen = _importance(layered, model, layers, texts)
    state = dict(model.state_dict())
    hidden = _largest(seen["hidden"], cut.hidden) if cut.hidden else None
    for index in layers:
        at = f"{layered.layer_name(index)}."
        if cut.mlp:
            kept = _largest(seen[f"{index}.mlp"], cut.mlp)
            _keep(state, at + "mlp.gate_proj", rows=kept)
            _keep(state, at + "mlp.up_proj", rows=kept)
            _keep(state, at + "mlp.down_proj", columns=kept)
        if cut.heads and cut.kv_heads:
            groups, heads = _heads(seen[f"{index}.heads"], spec.num_kv_heads, cut)
            wide = _spread(heads, spec.head_dim)
            narrow = _spread(groups, spec.head_dim)
            _keep(state, at + "self_attn.q_proj", rows=wide)
            _keep(state, at + "self_attn.k_proj", rows=narrow)
            _keep(state, at + "self_attn.v_proj", rows=narrow)
            _keep(state, at + "self_attn.o_proj", columns=wide)
    if hidden is not None:
        for name, value in state.items():
            axis = _channels(name, value, spec)
            if axis is not None:
                state[name] = value[hidden] if axis == 0 else value[:, hidden]
        config.hidden_size = cut.hidden
    if cut.mlp:
        config.intermediate_size = cut.mlp
    if cut.heads:
        config.num_attention_heads, config.num_key_value_heads = cut.heads, cut.kv_heads
    config.head_dim = spec.head_dim  # no longer hidden size over heads
    return state


def check_narrower(layered: LayeredModel, cut: Cut) -> None:
    """``ConfigError`` unless this family can be cut so; it needs no weights."""
    spec = layered.source.spec
    names = {name for name, _ in layered.layers[0].named_modules()}
    if not names.issuperset(_PARTS):
        raise ConfigError(
            f"a narrower student cannot be cut out of {spec.architecture}: only layers with "
            "separate q, k, v, gate and up projections are known; keep to layers=N"
        )
    if cut.hidden:
        for name, value in layered.model.state_dict().items():
            _channels(name, value, spec)


def _importance(
    layered: LayeredModel, model: Any, layers: list[int], texts: Sequence[list[int]]
) -> dict[str, Any]:
    """Sums of absolute activations: ``hidden``, and for each layer ``N.mlp`` and ``N.heads``
    ``[num_heads]``."""
    spec = layered.source.spec
    sums: dict[str, Any] = {}

    def add(name: str, values: Any) -> None:
        total = values.detach().abs().double().reshape(-1, values.shape[-1]).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    def heads(name: str) -> Callable[..., None]:
        def seen(module: Any, given: tuple[Any, ...]) -> None:
            parts = given[0].detach().unflatten(-1, (spec.num_heads, spec.head_dim))
            add(name, parts.norm(dim=-1))

        return seen

    handles = []
    for index in layers:
        layer = model.get_submodule(layered.layer_name(index))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(heads(f"{index}.heads")))
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, given, name=f"{index}.mlp": add(name, given[0])
            )
        )
        for name, module in layer.named_children():
            if name.endswith("layernorm"):
                handles.append(
                    module.register_forward_hook(lambda module, given, out: add("hidden", out))
                )
    try:
        with torch.no_grad():
            for ids in texts:
                model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _largest(importance: Any, count: int) -> Any:
    """Indices of the ``count`` largest, in their old order."""
    return importance.topk(count).indices.sort().values


def _heads(importance: Any, kv_heads: int, cut: Cut) -> tuple[Any, Any]:
    """KV heads that are kept, those whose queries matter most; and of each the most important query
    heads."""
    assert cut.heads and cut.kv_heads
    by_group = importance.view(kv_heads, -1)
    groups = _largest(by_group.sum(-1), cut.kv_heads)
    each = cut.heads // cut.kv_heads
    heads = [int(g) * by_group.shape[1] + _largest(by_group[g], each) for g in groups]
    return groups, torch.cat(heads)


def _spread(heads: Any, head_dim: int) -> Any:
    """Rows of the heads' features."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)


def _keep(state: dict[str, Any], module: str, rows: Any = None, columns: Any = None) -> None:
    weight = state[module + ".weight"]
    if rows is not None:
        weight = weight[rows]
        if module + ".bias" in state:
            state[module + ".bias"] = state[module + ".bias"][rows]
    if columns is not None:
        weight = weight[:, columns]
    state[module + ".weight"] = weight


def _channels(name: str, value: Any, spec: ModelSpec) -> int | None:
    """Which axis of a tensor holds the residual stream's channels, that read or write it."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return 1 if kind == "weight" else None
    if last in ("o_proj", "down_proj"):
        return 0
    if last in ("q_norm", "k_norm") and value.shape == (spec.head_dim,):
        return None  # of a head's features
    if "norm" in last and value.shape == (spec.hidden_size,):
        return 0
    if value.shape:
        raise ConfigError(
            f"a student with fewer channels cannot be cut out of {spec.architecture}: what {name} "
            "belongs to is not known; leave hidden=N out"
        )
    return None
