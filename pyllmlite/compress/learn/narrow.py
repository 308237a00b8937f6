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

from pyllmlite.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pyllmlite.compress.layered_model import LayeredModel
    from pyllmlite.compress.learn.student import Cut

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
        ConfigError: The family's layers are not Llama's, or there is no text.
    """
    spec = layered.source.spec
    names = {name for name, _ in layered.layers[0].named_modules()}
    if not names.issuperset(_PARTS):
        raise ConfigError(
            f"a narrower student cannot be cut out of {spec.architecture}: only layers with "
            "separate q, k, v, gate and up projections are known; keep to layers=N"
        )
    if not texts:
        raise ConfigError("a narrower student needs text to see which parts are used")
    seen = _importance(layered, model, layers, texts)
    state = dict(model.state_dict())
    tied = spec.tie_embeddings
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
        _keep_channels(state, hidden, spec.hidden_size, tied)
        config.hidden_size = cut.hidden
    if cut.mlp:
        config.intermediate_size = cut.mlp
    if cut.heads:
        config.num_attention_heads, config.num_key_value_heads = cut.heads, cut.kv_heads
    config.head_dim = spec.head_dim  # no longer hidden size over heads
    return state


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


def _keep_channels(state: dict[str, Any], kept: Any, size: int, tied: bool) -> None:
    """The residual stream's channels, in every tensor that reads or writes it."""
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            state[name] = value[:, kept] if kind == "weight" else value
        elif last in ("o_proj", "down_proj"):
            state[name] = value[kept]
        elif last in ("embed_tokens", "lm_head"):
            state[name] = value[:, kept] if kind == "weight" else value
        elif value.ndim == 1 and value.shape[0] == size and "norm" in last:
            if last not in ("q_norm", "k_norm"):
                state[name] = value[kept]
        elif value.shape:
            raise ModelError(f"a narrower student: what {name} belongs to is not known")
