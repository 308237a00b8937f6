"""Ray Serve's choice of a replica for each call, by the prompt's prefix."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from pyllmlite.serve.ray import here
from pyllmlite.serve.ray.affinity import Affinity, block_names


class PrefixRouter(RequestRouter):
    """One per process that calls the engines.

    A call with a keyword ``at`` goes to the replica of that name; one with ``prompt_token_ids``
    to where its prefix is; any other to the idlest one.
    """

    def initialize_state(self, imbalance: int = 16, min_share: float = 0.25) -> None:
        """What ``RequestRouterConfig.request_router_kwargs`` holds; see :class:`Affinity`."""
        self._affinity = Affinity(imbalance=imbalance, min_share=min_share)
        here.router = self

    def set_capacity(self, tokens: int) -> None:
        """That one replica can hold."""
        self._affinity.set_capacity(tokens)

    def figures(self) -> dict[str, dict[str, Any]]:
        """Per replica what it has said of itself lately."""
        return {r.replica_id.unique_id: r.routing_stats for r in self.curr_replicas.values()}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._affinity.keep_only({r.replica_id.unique_id for r in replicas})

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica per rank: Serve goes on to the next rank when one takes no more."""
        named = {r.replica_id.unique_id: r for r in candidate_replicas}
        if pending_request is None:
            return [list(named.values())]
        pending_request.routing_context.should_backoff = True
        wanted = pending_request.kwargs.get("at")
        if wanted in named:
            return [[named[wanted]]]
        queue_lens = self.replica_queue_len_cache
        loads = {name: queue_lens.get(r.replica_id) or 0 for name, r in named.items()}
        ranked = self._affinity.rank(self._names(pending_request), loads)
        return [[named[name]] for name in ranked]

    @staticmethod
    def _names(pending_request: PendingRequest) -> list[bytes]:
        """Of the prompt's blocks; hashed once, however often it is asked."""
        kept = pending_request.kwargs.get("prompt_token_ids")
        if kept is None:
            return []
        context: Any = pending_request.routing_context
        if not hasattr(context, "block_names"):
            context.block_names = block_names(kept)
        return context.block_names

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        names = self._names(pending_request)
        if names:
            self._affinity.note(names, replica_id.unique_id)
