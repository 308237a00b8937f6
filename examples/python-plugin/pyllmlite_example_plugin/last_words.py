"""``last-words``: what stood behind the last words before may follow them again."""

from pyllmlite import Proposer


class LastWords(Proposer):
    """Proposes the continuation of the latest earlier place, in prompt or output, that ends with
    the same n tokens (Saxena 2023): good for summaries, edits and code, free of a draft model.

    Per sequence it remembers behind which position each n-gram last ended, so a step costs a few
    look-ups however long the text is.  How much it proposes follows what was accepted.
    """

    name = "last-words"
    sizes = (4, 3, 2)
    most = 16

    def __init__(self, context):
        super().__init__(context)
        self.index = {}

    def open(self, seq):
        self.index[seq.id] = Index()

    def propose(self, seq, max_tokens):
        index, tokens = self.index[seq.id], seq.token_ids
        # All n-grams but those at the very end, which would only find themselves.
        for end in range(index.known + 1, len(tokens)):
            for n in self.sizes:
                if end >= n:
                    index.behind[tuple(tokens[end - n : end])] = end
        index.known = len(tokens) - 1
        for n in self.sizes:
            found = index.behind.get(tuple(tokens[-n:]))
            if found is not None:
                return tokens[found : found + min(max_tokens, index.length)]
        return []

    def verified(self, seq, num_proposed, num_accepted):
        index = self.index[seq.id]
        if num_accepted == num_proposed:
            index.length = min(2 * index.length, self.most)
        else:
            index.length = max(num_accepted + 1, 2)

    def close(self, seq):
        self.index.pop(seq.id, None)


class Index:
    """``behind``: n-gram to the position behind its last place; ``known``: tokens indexed."""

    def __init__(self):
        self.behind, self.known, self.length = {}, 0, 4
