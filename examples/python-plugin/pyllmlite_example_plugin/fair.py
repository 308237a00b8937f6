"""``fair``: no client can push the others aside."""

from pyllmlite import Scheduler


class Fair(Scheduler):
    """The client that got the fewest tokens goes first (virtual token counters, Sheng et al.
    2024); one that comes anew starts at the level of the least served."""

    name = "fair"

    def __init__(self):
        self.served = {}

    def schedule(self, step):
        clients = {seq.request.client for seq in [*step.running, *step.waiting]}
        floor = min((n for client, n in self.served.items() if client in clients), default=0)
        self.served = {client: self.served.get(client, floor) for client in clients}
        order = sorted(step.running, key=lambda seq: self.served[seq.request.client])
        waiting = list(step.waiting)
        while order:
            if self.run(step, order[0]) == 0 and step.blocked_by_cache(order[0]):
                step.preempt(order.pop())  # the latest start of whoever got the most
                waiting = []
            else:
                order.pop(0)
        while waiting and step.budget > 0 and step.free_rows > 0:
            waiting.remove(seq := min(waiting, key=lambda seq: self.served[seq.request.client]))
            if self.run(step, seq) == 0 and step.blocked_by_cache(seq):
                break

    def run(self, step, seq):
        tokens = step.run(seq)
        self.served[seq.request.client] += tokens
        return tokens
