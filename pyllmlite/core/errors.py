"""The errors a user meets.  Each carries one line: the cause, and what would work."""


class PyllmliteError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(PyllmliteError, ValueError):
    """An option that is unknown or out of range."""


class ModelError(PyllmliteError, ValueError):
    """A checkpoint, config or tokenizer that cannot be used."""


class PluginError(PyllmliteError, ValueError):
    """A plugin or a strategy that cannot be loaded or does not fit."""


class RequestError(PyllmliteError, ValueError):
    """A request that is refused before it runs: bad prompt or sampling parameters."""


class CapacityError(PyllmliteError, MemoryError):
    """Something does not fit into the memory or the cache it was given."""


class StepError(PyllmliteError, RuntimeError):
    """A step failed; the requests in it ended with an error, the engine goes on."""
